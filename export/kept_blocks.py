"""Which matrices keep the blocks of their checkpoint, which are rounded anew, and which are floats.

==================================================  ==========================================================
what the checkpoint holds                           what the bundle gets
==================================================  ==========================================================
one type of blocks that the kernels compute with    the same blocks, bit for bit
another quantized type                              int8, rounded to nearest: nearly exact
several types in one stack (q, k and v)             the same
o_proj where heads are padded, in blocks            the same: its columns move, and blocks lie along columns
floats                                              floats
==================================================  ==========================================================

The choice is made from names and types alone, before anything is read or written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shortstack.export.checkpoint import Checkpoint
from shortstack.export.checkpoint.gguf_blocks import EXACT_FORMATS
from shortstack.export.sources import MatrixSource
from shortstack.graphs.errors import RequestError
from shortstack.graphs.precision import BlockFormat

REQUANTIZED_FORMAT = BlockFormat(8)
_MAX_LISTED = 4


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """How a bundle's matrices are stored; with nothing listed, all as floats.

    Attributes:
        kept: The type of blocks, such as ``Q4_0``, of each matrix that keeps them, by name in the bundle.
        requantized: What each matrix that is rounded to int8 is in the checkpoint, by name in the bundle.
        floats: Names of the matrices that are floats in the checkpoint and stay so.
    """

    kept: Mapping[str, str] = field(default_factory=dict)
    requantized: Mapping[str, str] = field(default_factory=dict)
    floats: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return how many matrices of each type are kept, and the names of the others, as JSON-ready data."""
        return {
            "kept": {kind: len(found) for kind, found in _by_kind(self.kept).items()},
            "requantized": _by_kind(self.requantized),
            "floats": list(self.floats),
        }

    def lines(self) -> list[str]:
        """Return one sentence for each type of blocks, for people."""
        return [
            *(f"kept {_matrices(found)} bit for bit ({kind})" for kind, found in _by_kind(self.kept).items()),
            *(
                f"requantized {_matrices(found)} to int8: {kind} ({_listed(found)})"
                for kind, found in _by_kind(self.requantized).items()
            ),
            *([f"left {_matrices(self.floats)} as floats ({_listed(self.floats)})"] if self.floats else []),
        ]


def choose_blocks(checkpoint: Checkpoint, sources: Mapping[str, MatrixSource]) -> KeptBlocks:
    """Decide for each matrix of a bundle.

    Args:
        checkpoint: Where the tensors are; only their types are looked at.
        sources: What each matrix is made of, by name.

    Raises:
        RequestError: No matrix could keep its blocks.
    """
    kept: dict[str, str] = {}
    requantized: dict[str, str] = {}
    floats: list[str] = []
    for name, source in sources.items():
        stored = [checkpoint.blocks(tensor) for tensor in source.tensors]
        kinds = list(dict.fromkeys("floats" if blocks is None else blocks.kind for blocks in stored))
        if all(blocks is None for blocks in stored):
            floats.append(name)
        elif len(kinds) > 1 or any(blocks is None or blocks.format is None for blocks in stored):
            requantized[name] = "+".join(kinds)
        elif source.pads_columns:
            requantized[name] = f"{kinds[0]} with padded heads"
        elif not source.keeps_blocks:
            requantized[name] = f"{kinds[0]}, turned"
        else:
            kept[name] = kinds[0]
    if not kept:
        raise RequestError(
            f"--keep-blocks: {checkpoint.source} has no matrix whose blocks can be kept",
            found=", ".join(_by_kind(requantized)) or "floats only",
            expected=f"a GGUF file with matrices in {' or '.join(EXACT_FORMATS)}",
            remedy="leave out --keep-blocks, and shrink the bundle with `shortstack quantize`",
        )
    return KeptBlocks(kept, requantized, tuple(floats))


def _by_kind(matrices: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, kind in matrices.items():
        found.setdefault(kind, []).append(name)
    return found


def _matrices(found: Sequence[str]) -> str:
    return "1 matrix" if len(found) == 1 else f"{len(found)} matrices"


def _listed(found: Sequence[str]) -> str:
    shown = ", ".join(found[:_MAX_LISTED])
    return shown if len(found) <= _MAX_LISTED else f"{shown} and {len(found) - _MAX_LISTED} more"
