"""Joins the parts of a Megatron model: pipeline stages into one stack, tensor-parallel ranks into one matrix.

How the ranks of a tensor are joined, by the end of its name (after Megatron-LM, https://arxiv.org/abs/1909.08053)::

    word_embeddings, output_layer, exit_output_layer.{k}   rows of the vocabulary, rank after rank
    self_attention.query_key_value   rows; of each group of heads [q ... q, k, v], head_dim rows each
    mlp.dense_h_to_4h                rows; of each *rank* [gate; up]
    self_attention.dense, mlp.dense_4h_to_h   columns; their biases are whole on every rank
    norms                            whole on every rank

Rotary embedding pairs rows in the same way as transformers, so the heads stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.megatron_files import RankFile
from shortstack.graphs.errors import CheckpointError, UnsupportedError

Shards = dict[str, tuple[torch.Tensor, ...]]
"""One tensor per rank, by Megatron's name, with the layer's number in the whole model."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAYER = re.compile(r"language_model\.encoder\.layers\.(\d{1,6})\.(.+)")
_EXIT_HEAD = re.compile(r"language_model\.exit_output_layer\.(\d{1,6})\.weight")
_NAMES = {
    "language_model.embedding.word_embeddings.weight": "word_embeddings.weight",
    "language_model.encoder.final_norm.weight": "final_norm.weight",
    "language_model.output_layer.weight": "output_layer.weight",
}
_HEAD_COPY = "word_embeddings_for_head.weight"


@dataclass(frozen=True, slots=True)
class Piece:
    """The Megatron tensor, or part of one, that a tensor of the exported model comes from.

    Attributes:
        source: The tensor in :data:`Shards`.
        join: What each rank holds: some of the ``rows``, some of the ``columns``, or the ``same`` tensor.
        part: Which part of each rank's rows it is; ``vocab`` is all of them without the padding at the end.
    """

    source: str
    join: Literal["rows", "columns", "same"]
    part: Literal["all", "vocab", "query", "key", "value", "gate", "up"] = "all"


def layer_pieces(source: str, target: str, mlp: str = "mlp") -> dict[str, Piece]:
    """Return the pieces of a layer, by transformers' names. Biases are included, even if the model has none.

    Args:
        source: The prefix of Megatron's names, such as ``layers.3.``.
        target: The prefix of transformers' names, such as ``model.layers.3.``.
        mlp: Megatron's name of the layer's MLP.
    """
    pieces = {
        f"{target}input_layernorm.weight": Piece(f"{source}input_norm.weight", "same"),
        f"{target}post_attention_layernorm.weight": Piece(f"{source}post_attention_norm.weight", "same"),
    }
    for kind in ("weight", "bias"):
        packed = f"{source}self_attention.query_key_value.{kind}"
        pieces[f"{target}self_attn.q_proj.{kind}"] = Piece(packed, "rows", "query")
        pieces[f"{target}self_attn.k_proj.{kind}"] = Piece(packed, "rows", "key")
        pieces[f"{target}self_attn.v_proj.{kind}"] = Piece(packed, "rows", "value")
    pieces[f"{target}self_attn.o_proj.weight"] = Piece(f"{source}self_attention.dense.weight", "columns")
    pieces[f"{target}self_attn.o_proj.bias"] = Piece(f"{source}self_attention.dense.bias", "same")
    return pieces | mlp_pieces(f"{source}{mlp}", f"{target}mlp")


def mlp_pieces(source: str, target: str) -> dict[str, Piece]:
    """Return the pieces of a gated MLP; arguments as in :func:`layer_pieces`, but without the dot at the end."""
    pieces: dict[str, Piece] = {}
    for kind in ("weight", "bias"):
        pieces[f"{target}.gate_proj.{kind}"] = Piece(f"{source}.dense_h_to_4h.{kind}", "rows", "gate")
        pieces[f"{target}.up_proj.{kind}"] = Piece(f"{source}.dense_h_to_4h.{kind}", "rows", "up")
    pieces[f"{target}.down_proj.weight"] = Piece(f"{source}.dense_4h_to_h.weight", "columns")
    pieces[f"{target}.down_proj.bias"] = Piece(f"{source}.dense_4h_to_h.bias", "same")
    return pieces


class Merger:
    """Reads whole tensors out of their shards.

    Args:
        shards: The shards.
        config: The model's Hugging Face config.
        vocab_size: Number of rows to keep of the embedding and of each head.
    """

    def __init__(self, shards: Shards, config: Config, vocab_size: int) -> None:
        self.shards = shards
        self.vocab_size = vocab_size
        self._head_dim = config.read(int, "head_dim")
        self._group = config.read(int, "num_attention_heads") // max(config.read(int, "num_key_value_heads"), 1)

    def shape(self, piece: Piece) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data; that of the first shard if the shards do not fit."""
        shards = [torch.empty(shard.shape, device="meta") for shard in self.shards[piece.source]]
        try:
            return tuple(self._merge(piece, shards).shape)
        except (RuntimeError, IndexError):  # which torch raises for shapes that do not fit
            return tuple(shards[0].shape)

    def read(self, piece: Piece) -> npt.NDArray[np.float32]:
        """Read one tensor as C-contiguous float32.

        Raises:
            CheckpointError: The shards do not fit together.
        """
        try:
            merged = self._merge(piece, self.shards[piece.source])
        except (RuntimeError, IndexError):
            found = ", ".join(str(list(shard.shape)) for shard in self.shards[piece.source][:4])
            raise CheckpointError(f"the shards of {piece.source} do not fit together", found=found) from None
        array: npt.NDArray[Any] = merged.to(torch.float32).contiguous().numpy()
        return array

    def _merge(self, piece: Piece, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        if piece.join == "same":
            return shards[0]
        parts = [self._part(piece, shard) for shard in shards]
        merged = torch.cat(parts, dim=0 if piece.join == "rows" else 1)
        return merged[: self.vocab_size] if piece.part == "vocab" else merged

    def _part(self, piece: Piece, shard: torch.Tensor) -> torch.Tensor:
        rest = shard.shape[1:]  # [hidden] of a weight, [] of a bias
        if piece.part in ("gate", "up"):
            halves = shard.reshape(2, -1, *rest)  # [2, intermediate / ranks, *rest]
            return halves[0] if piece.part == "gate" else halves[1]
        if piece.part in ("query", "key", "value"):
            group = self._group
            groups = shard.reshape(-1, group + 2, self._head_dim, *rest)  # [kv_heads / ranks, ., head_dim, *rest]
            first, last = {"query": (0, group), "key": (group, group + 1), "value": (group + 1, group + 2)}[piece.part]
            return groups[:, first:last].reshape(-1, *rest)
        return shard


def collect_shards(stages: Sequence[Sequence[RankFile]], exit_numbers: Sequence[int]) -> Shards:
    """Return all tensors of a model under names that do not depend on its pipeline stages.

    Args:
        stages: The files of each stage, one per rank.
        exit_numbers: The layers that exits belong to, counted from 1, in the order in which they are stored.

    Raises:
        CheckpointError: The ranks of a stage do not hold the same tensors, or two stages hold the same tensor.
        UnsupportedError: A file holds something that is not a readable tensor.
    """
    shards: Shards = {}
    below = 0  # layers in the stages below
    for index, files in enumerate(stages):
        ranks = [_flat(file) for file in files]
        layers = 1 + max((int(m[1]) for name in ranks[0] if (m := _LAYER.fullmatch(name))), default=-1)
        numbers = [number for number in exit_numbers if below < number <= below + layers]
        for file, rank in zip(files, ranks, strict=True):
            if differing := sorted(rank.keys() ^ ranks[0].keys()):
                raise CheckpointError(
                    f"{file.path} and {files[0].path} do not hold the same tensors ({', '.join(differing[:8])})",
                    remedy="copy the whole checkpoint again: its files belong to different models",
                )
        for name in ranks[0]:
            if name == _HEAD_COPY and index < len(stages) - 1:
                continue  # a copy of the embedding, for the exits of this stage
            whole = _whole_name(name, below, numbers)
            if whole in shards:
                raise CheckpointError(
                    f"{files[0].path} holds {name}, as another stage does",
                    remedy="copy the whole checkpoint again: its files belong to different models",
                )
            shards[whole] = tuple(rank[name] for rank in ranks)
        below += layers
    return shards


def _whole_name(name: str, below: int, numbers: Sequence[int]) -> str:
    if match := _LAYER.fullmatch(name):
        return f"layers.{below + int(match[1])}.{match[2]}"
    if (match := _EXIT_HEAD.fullmatch(name)) and int(match[1]) < len(numbers):
        return f"exit_output_layer.{numbers[int(match[1])]}.weight"
    return _NAMES.get(name, name)


def _flat(file: RankFile) -> dict[str, torch.Tensor]:
    """Return the tensors of one file, by dotted name."""
    found: dict[str, torch.Tensor] = {}
    todo: list[tuple[str, object]] = [("", file.model)]
    seen: set[int] = set()  # a hostile pickle can nest a dict in itself
    while todo:
        prefix, value = todo.pop()
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            todo += [(f"{prefix}.{key}" if prefix else str(key), entry) for key, entry in value.items()]
        elif isinstance(value, torch.Tensor) and (unreadable := _unreadable_kind(value)) is None:
            found[prefix] = value
        else:
            raise UnsupportedError(
                f"{file.path}: {'.'.join(filter(None, ('model', prefix[:200])))}",
                found=unreadable if isinstance(value, torch.Tensor) else f"a {type(value).__name__}",
                expected=f"a dense tensor of {', '.join(str(dtype) for dtype in _FLOATS)}",
                remedy="name a checkpoint that Megatron or EE-LLM saved in float32, bfloat16 or float16",
            )
    return found


def _unreadable_kind(tensor: torch.Tensor) -> str | None:
    """Describe a tensor that cannot be read; None for one that can."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _FLOATS:
        return f"a tensor of {tensor.dtype} ({tensor.layout}, {tensor.device})"
    if (
        tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):  # a few bytes can stand for terabytes
        return f"{tensor.untyped_storage().nbytes()} bytes for a tensor of {list(tensor.shape)}"
    return None
