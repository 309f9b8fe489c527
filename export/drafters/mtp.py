"""Layers for multi-token prediction inside a model's own checkpoint (https://arxiv.org/abs/2412.19437).

::

    MiMo             model.mtp_layers.I.{token_layernorm, hidden_layernorm, input_proj, final_layernorm, self_attn...}
    DeepSeek, GLM    model.layers.L+I.{enorm, hnorm, eh_proj, shared_head.norm, self_attn...}, L the number of layers

MiMo's projection reads [state ; token], the others' [token ; state]. The rest of such a layer is named as the model's
own layers are. One layer drafts all tokens of a round, of several each drafts one
(:mod:`shortstack.graphs.drafter_spec`). The second form may have copies of the model's embedding and head,
``embed_tokens`` and ``shared_head.head``. They are stored only where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from shortstack.export.arch.architecture import EMBEDDING, LM_HEAD, Architecture
from shortstack.export.checkpoint.checkpoint import Checkpoint, read_part
from shortstack.export.drafters.drafter import Drafter, ModelOfDrafter
from shortstack.export.sources import Piece, layer_pieces
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import (
    EMBED_TOKENS,
    FINAL_NORM,
    HEAD,
    INPUT,
    STATE_NORM,
    TOKEN_NORM,
    stage_part,
)
from shortstack.graphs.errors import CheckpointError, UnsupportedError

_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")
_MOST_LAYERS = 15  # as many as a round may draft
_CHUNK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class _Naming:
    """How a family names such layers.

    Attributes:
        layer: What the names of one begin with; ``{above}`` is its number above the model's layers, ``{index}`` from 0.
        tensors: The module of each part outside the decoder layer.
        copies: The module of each part that may be a copy of the model's.
        state_first: The projection reads the state first.
    """

    layer: str
    tensors: Mapping[str, str]
    copies: Mapping[str, str]
    state_first: bool

    def prefix(self, depth: int, index: int) -> str:
        """Return what the names of a layer's tensors begin with, dot included."""
        return self.layer.format(above=depth + index, index=index) + "."

    def last(self, present: frozenset[str], depth: int) -> int:
        """Return the number of layers of which there are tensors, counted to the last one."""
        pattern = re.escape(self.layer).replace(r"\{above\}", r"(\d+)").replace(r"\{index\}", r"(\d+)") + r"\."
        first = depth if "{above}" in self.layer else 0
        found = [int(match[1]) - first for name in present if (match := re.match(pattern, name))]
        return max(found, default=-1) + 1


_NAMINGS = (
    _Naming(
        "model.mtp_layers.{index}",
        {
            TOKEN_NORM: "token_layernorm",
            STATE_NORM: "hidden_layernorm",
            INPUT: "input_proj",
            FINAL_NORM: "final_layernorm",
        },
        {},
        state_first=True,
    ),
    _Naming(
        "model.layers.{above}",
        {TOKEN_NORM: "enorm", STATE_NORM: "hnorm", INPUT: "eh_proj", FINAL_NORM: "shared_head.norm"},
        {EMBED_TOKENS: "embed_tokens", HEAD: "shared_head.head"},
        state_first=False,
    ),
)


def read_mtp(model: ModelOfDrafter) -> Drafter:
    """Read the layers for multi-token prediction that a model's checkpoint has.

    Raises:
        CheckpointError: It has none, or not all of them: all that is missing is listed.
        UnsupportedError: They are of another kind than the model's last layer.
    """
    checkpoint, spec = model.checkpoint, model.spec
    present, depth = checkpoint.names(), spec.num_hidden_layers
    naming = next((own for own in _NAMINGS if own.last(present, depth)), None)
    if naming is None:
        raise _nothing(checkpoint, depth)
    count = _said(checkpoint) or naming.last(present, depth)
    if count > _MOST_LAYERS:
        raise UnsupportedError(
            f"{checkpoint.source}: layers for multi-token prediction",
            found=count,
            expected=f"at most {_MOST_LAYERS}, as many tokens as a round may draft",
        )
    layer, norm = replace(spec.layers[-1], attention=replace(spec.layers[-1].attention, window=0)), spec.ends.final_norm
    has_plus = model.arch.source("final_norm.weight").plus != 0
    if layer.per_layer_input is not None or norm.has_bias or has_plus or not spec.owns_kv(depth - 1):
        raise UnsupportedError(f"{checkpoint.source}: a layer for multi-token prediction in a model of this family")
    copies, tensors = _own_copies(model, naming, count), dict[str, str]()
    for index in range(count):
        prefix = naming.prefix(depth, index)
        tensors |= {stage_part(part, index): f"{prefix}{name}.weight" for part, name in naming.tensors.items()}
        tensors |= {stage_part(part, index): names[index] for part, names in copies.items()}
    found = DrafterSpec(
        kind="mtp",
        hidden_size=spec.hidden_size,
        layers=(layer,) * count,
        norm=norm,
        state_first=naming.state_first,
        feedback="normed",
        embed_scale=spec.ends.embed_scale,
        has_own_embedding=EMBED_TOKENS in copies,
        has_own_head=HEAD in copies,
        most_drafts=count,
        layer_per_draft=count > 1,
    )
    pieces = tuple(_pieces(model, naming, found, index) for index in range(count))
    layers = tuple({role: piece.tensor for role, piece in own.items()} for own in pieces)
    return Drafter(checkpoint, found, tensors, layers, pieces=pieces).checked(model)


def _nothing(checkpoint: Checkpoint, depth: int) -> CheckpointError:
    """Return the error for a checkpoint without such layers."""
    return CheckpointError(
        f"{checkpoint.source} has no layer for multi-token prediction",
        expected=f"tensors such as {_NAMINGS[0].prefix(depth, 0)}input_proj.weight, or "
        f"{_NAMINGS[1].prefix(depth, 0)}eh_proj.weight",
        remedy="take the checkpoint from the model's original repository, since copies often leave them out",
    )


def _said(checkpoint: Checkpoint) -> int:
    """Return how many layers the config says that there are; 0 where it does not.

    Raises:
        CheckpointError: The field is no number of layers.
    """
    for key in _COUNTS:
        count = checkpoint.config.read(int, key, 0)
        if count < 0:
            raise checkpoint.config.wrong(key, "0 or more")
        if count:
            return count
    return 0


def _pieces(model: ModelOfDrafter, naming: _Naming, drafter: DrafterSpec, index: int) -> dict[str, Piece]:
    """Return where each role of a layer comes from, as if the layer stood above the model's last one."""
    spec, depth = model.spec, model.spec.num_hidden_layers
    number = depth + index
    kv_map = (*spec.kv_map, *range(depth, number + 1))
    above = replace(spec, layers=(*spec.layers, *drafter.layers[: index + 1]), kv_map=kv_map)
    return {
        role: replace(piece, tensor=piece.tensor.replace(f"model.layers.{number}.", naming.prefix(depth, index)))
        for role, piece in layer_pieces(model.arch, above, number).items()
    }


def _own_copies(model: ModelOfDrafter, naming: _Naming, count: int) -> dict[str, list[str]]:
    """Return the tensors of embeddings and heads, of each layer, by part; without those that all equal the model's."""
    checkpoint, depth = model.checkpoint, model.spec.num_hidden_layers
    found = {}
    for part, module in naming.copies.items():
        shared = _shared_tensor(model.arch, model.spec.tie_word_embeddings, part)
        wanted = [f"{naming.prefix(depth, index)}{module}.weight" for index in range(count)]
        tensors = [name if name in checkpoint.names() else shared for name in wanted]
        if any(name != shared and not _is_same(checkpoint, name, shared) for name in tensors):
            found[part] = tensors
    return found


def _shared_tensor(arch: Architecture, is_tied: bool, part: str) -> str:
    return arch.tensor_name(LM_HEAD if part == HEAD and not is_tied else EMBEDDING)


def _is_same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two matrices are equal; those of other shapes are not, and are refused later."""
    if checkpoint.shape(first) != checkpoint.shape(second):
        return False
    rows = checkpoint.shape(first)[0]
    for start in range(0, rows, _CHUNK_ROWS):
        part = slice(start, min(start + _CHUNK_ROWS, rows))
        one, other = (read_part(checkpoint, name, part, slice(None)) for name in (first, second))
        if not np.array_equal(one, other):
            return False
    return True
