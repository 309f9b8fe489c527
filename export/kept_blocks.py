"""Which matrices keep the blocks of their checkpoint, which are rounded anew, and which are floats.

==================================================  ==========================================================
what the checkpoint holds                           what the bundle gets
==================================================  ==========================================================
one type of blocks                                  the same blocks, in the narrowest format that holds them
several types in one stack (q, k and v)             the same blocks, in the narrowest format that holds all
blocks and floats in one stack                      int8, rounded to nearest: nearly exact
columns in several orders for one input             the same (act-order of GPTQ)
blocks that are turned, or of which columns move    the same (o_proj, where heads are padded)
floats                                              floats
==================================================  ==========================================================

A format with offsets is taken only where a matrix multiplies and all its tensors have that one format; what is looked
up, or also a head, and stacks of several types, take the format without. The choice is made from names and types
alone, before anything is read or written. How near a kept matrix is to the checkpoint's is measured when it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shortstack.export.checkpoint import Checkpoint
from shortstack.export.checkpoint.checkpoint import StoredBlocks
from shortstack.export.sources import MatrixSource
from shortstack.export.stacked_blocks import joint_format
from shortstack.graphs import names
from shortstack.graphs.errors import RequestError
from shortstack.graphs.ir.block_tensor import Order
from shortstack.graphs.origins import Origin, OriginGroup, grouped
from shortstack.graphs.precision import BlockFormat

REQUANTIZED_FORMAT = BlockFormat(8)
_MAX_LISTED = 4


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """How a bundle's matrices are stored; with nothing listed, all as floats.

    Attributes:
        kept: The type of blocks, such as ``Q4_0``, of each matrix that keeps them, by name in the bundle; of a stack
            of several types ``Q4_K+Q6_K``.
        requantized: What each matrix that is rounded to int8 is in the checkpoint, by name in the bundle.
        floats: Names of the matrices that are floats in the checkpoint and stay so.
        formats: The format of each matrix that keeps its blocks.
        errors: How far each matrix in blocks is from the checkpoint's, once that is measured.
        of_outputs: The matrices whose error is of their outputs on a calibration text, and not of their weights.
    """

    kept: Mapping[str, str] = field(default_factory=dict)
    requantized: Mapping[str, str] = field(default_factory=dict)
    floats: Sequence[str] = ()
    formats: Mapping[str, BlockFormat] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    of_outputs: Collection[str] = ()

    def measured(self, errors: Mapping[str, float]) -> KeptBlocks:
        """Return the same with the errors that were measured."""
        return replace(self, errors=dict(errors))

    def origins(self) -> dict[str, Origin]:
        """Return what each matrix in blocks was, and how near it is."""
        kinds = {**self.kept, **self.requantized}
        return {
            name: Origin(
                kind, name in self.kept, self.errors[name], "outputs" if name in self.of_outputs else "weights"
            )
            for name, kind in kinds.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return how many matrices of each type are kept, and the names of the others, as JSON-ready data."""
        groups = self._groups()
        exact = Counter(self.kept[name] for group in groups if group.fate == "exact" for name in group.matrices)
        near = [group for group in groups if group.fate == "near"]
        return {
            "kept": dict(exact),
            "nearly_kept": [
                {"kind": g.kind, "stored_as": g.stored_as, "matrices": len(g.matrices), "error": g.error} for g in near
            ],
            "requantized": {group.kind: list(group.matrices) for group in groups if group.fate == "rounded"},
            "floats": list(self.floats),
        }

    def lines(self) -> list[str]:
        """Return one sentence for each type of blocks, for people."""
        said = []
        for group in self._groups():
            if group.fate == "rounded":
                said.append(f"requantized {group.words}: {_listed(group.matrices)}")
            else:
                said.append(f"kept {group.words}")
        count = "1 matrix" if len(self.floats) == 1 else f"{len(self.floats)} matrices"
        return [*said, *([f"left {count} as floats ({_listed(self.floats)})"] if self.floats else [])]

    def _groups(self) -> list[OriginGroup]:
        requantized = dict.fromkeys(self.requantized, REQUANTIZED_FORMAT)
        return grouped(self.origins(), {**requantized, **self.formats})


def choose_blocks(checkpoint: Checkpoint, sources: Mapping[str, MatrixSource]) -> KeptBlocks:
    """Decide for each matrix of a bundle.

    Args:
        checkpoint: Where the tensors are; only their types and orders are looked at.
        sources: What each matrix is made of, by name.

    Raises:
        RequestError: No matrix could keep its blocks.
    """
    chosen = blocks_of(checkpoint, sources)
    if not chosen.kept:
        raise RequestError(
            f"--keep-blocks: {checkpoint.source} has no matrix whose blocks can be kept",
            found=", ".join(dict.fromkeys(chosen.requantized.values())) or "floats only",
            expected="a GGUF file with quantized matrices, such as Q4_K_M or Q8_0, or integers of GPTQ, AWQ or "
            "compressed-tensors",
            remedy="leave out --keep-blocks, and shrink the bundle with `shortstack quantize`",
        )
    return chosen


def dequantized_line(checkpoint: Checkpoint, sources: Mapping[str, MatrixSource]) -> str | None:
    """Return one sentence about the matrices that could keep their blocks and become floats; None without any."""
    kept = blocks_of(checkpoint, sources).kept
    if not kept:
        return None
    count = "1 matrix" if len(kept) == 1 else f"{len(kept)} matrices"
    kinds = ", ".join(dict.fromkeys(kept.values()))
    return f"dequantizing {count} to floats ({kinds}); --keep-blocks keeps the blocks"


def blocks_of(checkpoint: Checkpoint, sources: Mapping[str, MatrixSource]) -> KeptBlocks:
    """Return what can become of each matrix of a bundle, even if no matrix can keep its blocks."""
    kept: dict[str, str] = {}
    formats: dict[str, BlockFormat] = {}
    requantized: dict[str, str] = {}
    floats: list[str] = []
    orders: dict[str, Order] = {}
    for name, source in sources.items():
        stored = [checkpoint.blocks(tensor) for tensor in source.tensors]
        kinds = "+".join(dict.fromkeys("floats" if blocks is None else blocks.kind for blocks in stored))
        in_blocks = [blocks for blocks in stored if blocks is not None]
        if not in_blocks:
            floats.append(name)
        elif source.pads_columns:
            requantized[name] = f"{kinds} with padded heads"
        elif not source.keeps_blocks:
            requantized[name] = f"{kinds}, turned"
        elif len(in_blocks) < len(stored) or (chosen := _format(name, source, in_blocks)) is None:
            requantized[name] = kinds
        elif not _reads_one_order(name, [blocks.order for blocks in in_blocks], orders):
            requantized[name] = f"{kinds} with other orders for one input"
        else:
            kept[name], formats[name] = kinds, chosen
    return KeptBlocks(kept, requantized, tuple(floats), formats)


def _reads_one_order(name: str, found: Sequence[Order | None], known: dict[str, Order]) -> bool:
    """Whether all tensors of a matrix read its input in one order, and in that of the matrices before.

    Args:
        name: The matrix.
        found: The order of each of its tensors.
        known: The order of each input, by :func:`names.input_order`; that of this one is added.
    """
    first = found[0]
    if first is None:
        return all(order is None for order in found)
    usual = known.setdefault(names.input_order(name), first)
    is_one = all(order is not None and np.array_equal(order, usual) for order in found)
    return is_one and not names.is_looked_up(name)


def _format(name: str, source: MatrixSource, stored: Sequence[StoredBlocks]) -> BlockFormat | None:
    """Return the narrowest format that holds all tensors of a matrix; None if there is none."""
    narrowest = {blocks.format for blocks in stored}
    if len(narrowest) == 1 and not _needs_plain(name, source):
        return stored[0].format
    plain = [blocks.without_offsets for blocks in stored]
    found = [block_format for block_format in plain if block_format is not None]
    is_mixed = len({block_format.is_reordered for block_format in found}) > 1
    return joint_format(found) if len(found) == len(plain) and not is_mixed else None


def _needs_plain(name: str, source: MatrixSource) -> bool:
    """Whether a matrix is looked up or is a head, for which there are no offsets."""
    is_table = any(piece.weight is not None and not piece.weight.reads for piece in source.pieces)
    return is_table or name in (names.EMBED_TOKENS, names.LM_HEAD)


def _listed(found: Sequence[str]) -> str:
    shown = ", ".join(found[:_MAX_LISTED])
    return shown if len(found) <= _MAX_LISTED else f"{shown} and {len(found) - _MAX_LISTED} more"
