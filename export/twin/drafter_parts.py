"""What the PyTorch twins of all kinds of drafters share: weights, texts, layers, and what a comparison asks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shortstack.export.rope import rope_tables
from shortstack.export.twin.layer import KeyValue, Layer, Norm, Rotary
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import (
    EMBED_TOKENS,
    HEAD_IDS,
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
        rope_factors: Divisors of the frequencies of its own rotary embeddings, where they have some.
    """

    parts: Mapping[str, Array]
    layers: tuple[Mapping[str, Array], ...]
    rope_factors: Array | None = None


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
    """What rows give.

    Attributes:
        states: The states for the next rows, [seq, state].
        logits: [seq, rows of the head].
        scores: Of a head with centroids: those of its groups, [seq, centroids].
        missed: Likewise: by how much the group of each row misses being computed, as ``logits`` and in deviations of
            these; 0 of rows that are computed.
    """

    states: Tensor
    logits: Tensor
    scores: Tensor | None = None
    missed: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DraftedText:
    """What a drafter reads of a text.

    Attributes:
        tokens: Its tokens.
        states: The fused states of its positions, the last one's not needed, [seq, hidden].
        keys_values: Keys and values of all positions, by layer of the model, each [1, kv_heads, seq, head_dim].
    """

    tokens: Sequence[int]
    states: Tensor
    keys_values: Mapping[int, KeyValue] = field(default_factory=dict)


class TwinRound(Protocol):
    """The drafts after some tokens of a text."""

    def draft(self, before: Sequence[int], given: Tensor | None = None) -> Drafted:
        """Make the next draft, whose row is the last one that is returned; of the logits, only its row is.

        Args:
            before: The drafts so far, not always the twin's. Each call has one more than the call before it.
            given: States of the last rows of the draft before, [rows, state], which it reads instead of the twin's own.
        """
        ...


class TwinOfDrafter(Protocol):
    """A twin.

    Attributes:
        spec: What it is.
        head_ids: Its head's rows.
    """

    spec: DrafterSpec
    head_ids: HeadIds

    def fused(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Return the states [seq, hidden] of positions.

        Args:
            taps: What the model leaves, by port, [seq, model's hidden] each.
        """
        ...

    def all_rows(self, text: DraftedText) -> list[Drafted]:
        """Return first drafts, of rows 0 to T - 2; where each layer drafts one token, also those of the others."""
        ...

    def round(self, text: DraftedText, length: int) -> TwinRound:
        """Begin a round after the first ``length`` tokens, 2 or more."""
        ...


class HeadIds:
    """Which token ids the rows of a head are.

    Args:
        ids: They, [rows]; None where row i is token i.
    """

    def __init__(self, ids: Tensor | None) -> None:
        self._ids = None if ids is None else ids.tolist()
        self._rows = None if self._ids is None else {token: row for row, token in enumerate(self._ids)}

    def token(self, row: int) -> int:
        """Return the token id of a row of the head."""
        return row if self._ids is None else int(self._ids[row])

    def row(self, token: int) -> int | None:
        """Return the row of the head that a token id has; None if it has none."""
        return token if self._rows is None else self._rows.get(token)


class LayersTwin:
    """What twins of drafters with one head begin with.

    Args:
        spec: What the drafter is.
        weights: Its own weights.
        model: What it uses of its model.

    Attributes:
        spec: What it is.
        head_ids: Its head's rows; those of a head with centroids are in the order of their groups.
    """

    def __init__(self, spec: DrafterSpec, weights: DrafterWeights, model: ModelParts) -> None:
        self.spec, self._model, self._factors = spec, model, weights.rope_factors
        self._parts = {part: as_tensor(value) for part, value in weights.parts.items()}
        self.head_ids = HeadIds(self._parts.pop(HEAD_IDS, None))
        self._embedding = self._parts[EMBED_TOKENS] if spec.has_own_embedding else as_tensor(model.embedding)
        self._layers = [layer_twin(spec, number, own) for number, own in enumerate(weights.layers)]

    def _norm(self, x: Tensor, part: str) -> Tensor:
        return normalised(x, self.spec.norm, self._parts[part])


def with_given(states: Tensor, given: Tensor | None) -> Tensor:
    """Return states [seq, state], the last of them replaced by those that are given."""
    return states if given is None else torch.cat([states[: len(states) - len(given)], given])


def rotary_tables(spec: DrafterSpec, model: ModelParts, factors: Array | None, positions: Tensor) -> list[Rotary]:
    """Return the rotary embeddings of some positions [seq]: the model's, then the drafter's own."""
    found, count = list[Rotary](), int(positions.max()) + 1
    for number, rope in enumerate((*model.spec.ropes, *spec.ropes)):
        own = model.rope_factors if number < len(model.spec.ropes) else factors
        cos, sin = rope_tables(rope, count, own if rope.scaling.kind == "factors" else None, model.max_length)
        found.append(Rotary(torch.from_numpy(cos)[positions], torch.from_numpy(sin)[positions], positions))
    return found


def normalised(x: Tensor, kind: NormSpec, weight: Tensor) -> Tensor:
    """Apply a norm with these weights and no bias over the last dimension."""
    return Norm(0, kind).unit(x) * weight


def as_tensor(value: Array) -> Tensor:
    """Return a copy."""
    return torch.from_numpy(np.array(value))  # what is mapped from a file cannot be written


def layer_twin(spec: DrafterSpec, number: int, weights: Mapping[str, Array]) -> Layer:
    """Return a layer with its weights, by role."""
    with torch.device("meta"):
        layer = Layer(spec.layers[number], spec.hidden_size, is_consumer=bool(spec.shared))
        if spec.is_stacked and number == 0:  # its attention reads token and state side by side
            for name in ("q_proj", "k_proj", "v_proj"):
                own: nn.Linear = getattr(layer.self_attn, name)
                has_bias = own.bias is not None
                setattr(layer.self_attn, name, nn.Linear(spec.input_width, own.out_features, bias=has_bias))
    layer.load_state_dict({parameter_name(role): as_tensor(value) for role, value in weights.items()}, assign=True)
    return layer.eval()
