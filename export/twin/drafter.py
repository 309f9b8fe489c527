"""A trained drafter in PyTorch, in float32: the formula of :mod:`shortstack.graphs.drafter_spec`, without a cache.

All rows of a text run anew each time, each pair at its own position. It shares the layer with the twin of models
(:mod:`shortstack.export.twin.layer`), and no code with the graphs. A kind of another form is a twin of its own beside
this one; what compares them (:mod:`shortstack.export.parity.drafter`) needs the methods of :class:`DrafterTwin`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from shortstack.export.rope import rope_tables
from shortstack.export.twin.layer import Layer, Norm, Rotary, soft_capped
from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import (
    EMBED_TOKENS,
    FINAL_NORM,
    FUSE,
    HEAD,
    HEAD_IDS,
    INPUT,
    INPUT_BIAS,
    STATE_NORM,
    TOKEN_NORM,
    feature_norms,
)
from shortstack.graphs.layer_spec import Norm as NormSpec
from shortstack.graphs.layer_weights import parameter_name
from shortstack.graphs.spec import ModelSpec

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class DrafterWeights:
    """What a drafter has of its own, as its formula has it: matrices [out, in], heads not padded.

    Attributes:
        parts: What is outside the layers, by part (:mod:`shortstack.graphs.drafter_weights`).
        layers: The weights of each layer, by role.
    """

    parts: Mapping[str, Array]
    layers: tuple[Mapping[str, Array], ...]


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a drafter uses of its model.

    Attributes:
        spec: The model.
        embedding: [vocab, hidden].
        head: [vocab, hidden].
        max_length: The longest text that the bundle takes, in positions.
        rope_factors: Divisors of rotary frequencies, where the model has some.
    """

    spec: ModelSpec
    embedding: Array
    head: Array
    max_length: int
    rope_factors: Array | None = None


class Drafted(NamedTuple):
    """What rows give: the states for the next rows [seq, hidden], and the logits [seq, rows of the head]."""

    states: Tensor
    logits: Tensor


class DrafterTwin:
    """A drafter.

    Args:
        spec: What it is.
        weights: Its own weights.
        model: What it uses of its model.

    Attributes:
        spec: What it is.
    """

    def __init__(self, spec: DrafterSpec, weights: DrafterWeights, model: ModelParts) -> None:
        self.spec, self._model = spec, model
        self._parts = {part: _tensor(value) for part, value in weights.parts.items()}
        self._ids = self._parts.pop(HEAD_IDS, None)
        self._embedding = self._parts.get(EMBED_TOKENS) if spec.has_own_embedding else _tensor(model.embedding)
        self._head = self._parts[HEAD] if spec.has_own_head else _tensor(model.head)
        self._layers = [_layer(spec, number, own) for number, own in enumerate(weights.layers)]

    def token(self, row: int) -> int:
        """Return the token id of a row of the head."""
        return row if self._ids is None else int(self._ids[row])

    def row(self, token: int) -> int | None:
        """Return the row of the head that a token id has; None if it has none."""
        if self._ids is None:
            return token
        found = (self._ids == token).nonzero()
        return int(found[0]) if len(found) else None

    @torch.no_grad()
    def fused(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Return the states [seq, hidden] of true rows.

        Args:
            taps: What the model leaves, by port, [seq, model's hidden] each.
        """
        if not self.spec.features:
            return taps[names.DRAFT_STATE]
        found = [taps[names.feature(depth)] for depth in self.spec.features]
        norms = feature_norms(self.spec)
        if self.spec.feature_norm == "each":
            found = [self._norm(x, part) for x, part in zip(found, norms, strict=True)]
        joined = torch.cat(found, dim=-1)
        if self.spec.feature_norm == "all":
            joined = self._norm(joined, norms[0])
        return functional.linear(joined, self._parts[FUSE])

    @torch.no_grad()
    def rows(self, states: Tensor, ids: Tensor, heads: int | None = None) -> Drafted:
        """Run all rows of a text.

        Args:
            states: u of each row, [seq, hidden]: fused ones of true rows, then what the rows before gave.
            ids: The token that is newer by one, int64 [seq].
            heads: How many of the last rows get logits; None for all.

        Returns:
            The states of all rows, and the logits of the last ``heads``.
        """
        spec = self.spec
        assert self._embedding is not None
        token = self._embedding[ids] * spec.embed_scale
        if spec.has_token_norm:
            token = self._norm(token, TOKEN_NORM)
        normed = self._norm(states, STATE_NORM) if spec.has_state_norm else states
        pair = torch.cat([normed, token] if spec.state_first else [token, normed], dim=-1)
        rotaries = self._rotaries(len(ids))
        if spec.is_stacked:
            first, x = self._layers[0], normed if spec.normed_stream else states
            reads = pair[None]
            attended = first.self_attn(reads, rotaries, first.self_attn.key_value(reads, rotaries))
            stream, rest = first.above(x[None], reads, attended)[1], self._layers[1:]
        else:
            stream, rest = functional.linear(pair, self._parts[INPUT], self._parts.get(INPUT_BIAS))[None], self._layers
        for layer in rest:
            stream = layer(stream, rotaries)[0]
        read = self._norm(stream[0], FINAL_NORM) if spec.has_final_norm else stream[0]
        logits = functional.linear(read if heads is None else read[len(read) - heads :], self._head)
        if not spec.has_own_head:
            ends = self._model.spec.ends
            logits = soft_capped(logits * ends.logit_scale, ends.logit_softcap)
        return Drafted(read if spec.feedback == "normed" else stream[0], logits)

    def _norm(self, x: Tensor, part: str) -> Tensor:
        return normalised(x, self.spec.norm, self._parts[part])

    def _rotaries(self, count: int) -> list[Rotary]:
        ropes, found = (*self._model.spec.ropes, *self.spec.ropes), []
        for rope in ropes:
            factors = self._model.rope_factors if rope.scaling.kind == "factors" else None
            cos, sin = rope_tables(rope, count, factors, self._model.max_length)
            found.append(Rotary(torch.from_numpy(cos), torch.from_numpy(sin), torch.arange(count)))
        return found


def normalised(x: Tensor, kind: NormSpec, weight: Tensor) -> Tensor:
    """Apply a norm with these weights and no bias over the last dimension."""
    return Norm(0, kind).unit(x) * weight


def _tensor(value: Array) -> Tensor:
    return torch.from_numpy(np.array(value))  # what is mapped from a file cannot be written


def _layer(spec: DrafterSpec, number: int, weights: Mapping[str, Array]) -> Layer:
    with torch.device("meta"):
        layer = Layer(spec.layers[number], spec.hidden_size)
        if spec.is_stacked and number == 0:  # its attention reads token and state side by side
            for name in ("q_proj", "k_proj", "v_proj"):
                own: nn.Linear = getattr(layer.self_attn, name)
                has_bias = own.bias is not None
                setattr(layer.self_attn, name, nn.Linear(spec.input_width, own.out_features, bias=has_bias))
    layer.load_state_dict({parameter_name(role): _tensor(value) for role, value in weights.items()}, assign=True)
    return layer.eval()
