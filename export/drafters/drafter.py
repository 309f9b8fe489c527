"""A drafter that was opened: what it is, where its weights come from, and whether it fits its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from shortstack.export.arch import ARCHITECTURES
from shortstack.export.arch.architecture import Architecture
from shortstack.export.checkpoint.checkpoint import ROPE_FACTORS, Checkpoint
from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.export.sources import Piece
from shortstack.graphs.drafter_spec import DrafterSpec, check_drafter
from shortstack.graphs.drafter_weights import HEAD, HEAD_IDS, MODEL_NORM, drafter_layer_weights, end_parts
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.layer_spec import Layer, Rope
from shortstack.graphs.layer_weights import Shape, parameter_name
from shortstack.graphs.spec import ModelSpec

Array = npt.NDArray[Any]
DECODER_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")  # whose layers are Llama's, biases and norms of heads aside
_REMEDY = "take the drafter that was trained for this model, and all of its files"


@runtime_checkable
class RawReader(Protocol):
    """A checkpoint that can read tensors that are no floats."""

    def raw(self, name: str) -> Array:
        """Read a tensor in its stored type."""


@dataclass(frozen=True, slots=True)
class ModelOfDrafter:
    """The model that a drafter drafts for.

    Attributes:
        checkpoint: Its checkpoint.
        spec: What it is.
        arch: Its family, which names its tensors.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    arch: Architecture


@dataclass(frozen=True, slots=True)
class Drafter:
    """An opened drafter.

    Attributes:
        checkpoint: Where its weights are.
        spec: What it is.
        tensors: The tensor of each weight outside the layers, by part.
        layers: The tensor of each weight of each layer, by role.
        offsets: The tensor of the offsets that turn rows of a trimmed head into token ids: id = row + offset.
        holds_ids: ``offsets`` holds the token ids themselves.
        pieces: Where each weight of each layer is in its tensor, by role, where it is not all of it as it stands.
        ordering: The tensor of the token ids of a head with centroids, group by group.
    """

    checkpoint: Checkpoint
    spec: DrafterSpec
    tensors: Mapping[str, str]
    layers: tuple[Mapping[str, str], ...]
    offsets: str | None = None
    holds_ids: bool = False
    pieces: tuple[Mapping[str, Piece], ...] = ()
    ordering: str | None = None

    def part(self, part: str) -> Array:
        """Read a weight outside the layers, as its formula has it: a matrix [out, in], rows of the head by id.

        Those of a head with centroids are in the order of their groups.
        """
        if part == HEAD_IDS:
            return self._ids() if self.offsets is None else np.sort(self._ids())
        value = self.checkpoint.tensor(self.tensors[part])
        if part == HEAD and self.ordering is not None:
            return value[self._ids()]
        return value[np.argsort(self._ids(), kind="stable")] if part == HEAD and self.offsets is not None else value

    def role(self, layer: int, role: str) -> Array:
        """Read a weight of a layer."""
        value = self.checkpoint.tensor(self.layers[layer][role])
        return self.pieces[layer][role].of(value) if self.pieces else value

    def _ids(self) -> npt.NDArray[np.int64]:
        if self.ordering is not None:
            return _integers(self.checkpoint, self.ordering)
        assert self.offsets is not None
        offsets = _integers(self.checkpoint, self.offsets)
        return offsets if self.holds_ids else np.arange(len(offsets), dtype=np.int64) + offsets

    def rope_factors(self) -> Array | None:
        """Return the divisors of its own rotary frequencies, [dims / 2]; None if there are none."""
        return self.checkpoint.tensor(ROPE_FACTORS) if self._has_factors() else None

    def _has_factors(self) -> bool:
        return any(rope.scaling.kind == "factors" for rope in self.spec.ropes)

    def checked(self, model: ModelOfDrafter, known: Sequence[str] = ()) -> Drafter:
        """Return the drafter, if all of it is there and fits the model.

        Args:
            model: The model.
            known: What is known not to fit.

        Raises:
            CheckpointError: Listing all that is missing, misshapen or does not fit.
        """
        problems = list(known)
        try:
            check_drafter(self.spec, model.spec)
        except ValueError as error:
            problems.append(str(error))
        wanted: dict[str, Shape] = {}
        for part, shape in end_parts(self.spec, model.spec.hidden_size, model.spec.vocab_size).items():
            if part not in (HEAD_IDS, MODEL_NORM):
                wanted[self.tensors[part]] = shape
        if self.offsets is not None and self.spec.draft_vocab is not None:
            wanted[self.offsets] = (self.spec.draft_vocab,)
        if self._has_factors():
            wanted[ROPE_FACTORS] = (self.spec.ropes[0].dims // 2,)
        if self.ordering is not None:
            wanted[self.ordering] = (model.spec.vocab_size,)
        for number in range(len(self.spec.layers)):
            wanted |= self._layer_shapes(number)
        present = self.checkpoint.names()
        missing = sorted(wanted.keys() - present)
        if missing:
            problems.append(f"it has no tensor {', '.join(missing)}")
        problems += [
            f"tensor {name} is {list(self.checkpoint.shape(name))}, not {list(wanted[name])}"
            for name in sorted(wanted.keys() & present)
            if self.checkpoint.shape(name) != wanted[name]
        ]
        if self.offsets is not None and not problems:
            ids, vocab = self._ids(), model.spec.vocab_size
            outside = ids[(ids < 0) | (ids >= vocab)]
            if len(outside):
                problems.append(f"{self.offsets} names token id {outside[0]}, and the model has 0..{vocab - 1}")
            elif len(np.unique(ids)) != len(ids):
                problems.append(f"{self.offsets} names a token id twice")
        if self.ordering is not None and not problems:
            problems += _order_problems(self.ordering, self._ids())
        if problems:
            raise CheckpointError(
                f"{self.checkpoint.source} does not draft for {model.checkpoint.source}: {'; '.join(problems)}",
                remedy=_REMEDY,
            )
        return self

    def _layer_shapes(self, layer: int) -> dict[str, Shape]:
        """Return the shape of each tensor of a layer; one may hold the rows of several weights."""
        found: dict[str, Shape] = {}
        for weight in drafter_layer_weights(self.spec, layer):
            name = self.layers[layer][weight.role]
            rows = found[name][0] if name in found else 0
            found[name] = (rows + weight.shape[0], *weight.shape[1:])
        turned = {piece.tensor for piece in self.pieces[layer].values() if piece.transposed} if self.pieces else set()
        return {name: shape[::-1] if name in turned else shape for name, shape in found.items()}


def _order_problems(name: str, ids: npt.NDArray[np.int64]) -> list[str]:
    """Say which token id an order of all of them has too often, if it does."""
    found, counts = np.unique(ids, return_counts=True)
    if np.array_equal(found, np.arange(len(ids))):
        return []
    wrong = next((token for token in found if not 0 <= token < len(ids)), None)
    if wrong is not None:
        return [f"{name} names token id {wrong}, and the model has 0..{len(ids) - 1}"]
    return [f"{name} names token id {found[counts.argmax()]} {counts.max()} times"]


def _integers(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.int64]:
    """Read a tensor of whole numbers.

    Raises:
        CheckpointError: It holds something else.
    """
    value = checkpoint.raw(name) if isinstance(checkpoint, RawReader) else checkpoint.tensor(name)
    if value.ndim != 1 or not np.issubdtype(value.dtype, np.integer):
        raise CheckpointError(
            f"{checkpoint.source}: tensor {name}",
            found=f"{value.dtype} {list(value.shape)}",
            expected="whole numbers, one for each row of the head",
            remedy="take the file from the drafter's original repository",
        )
    return np.asarray(value, np.int64)


def read_layers(config: Config, count: int | None = None) -> ModelSpec:
    """Read a drafter's layers from a config, which is that of a small model of a known family.

    Args:
        config: The config.
        count: How many layers; None as the config says.

    Raises:
        CheckpointError: A field is missing or wrong.
        UnsupportedError: Its layers are of another family.
    """
    data = dict(config.data)
    if count is not None:
        data["num_hidden_layers"] = count
        data.pop("layer_types", None)
    kind = config.read(str, "model_type", "llama")
    if kind not in DECODER_FAMILIES:
        raise not_one_of(config.where("model_type"), kind, DECODER_FAMILIES)
    return ARCHITECTURES[kind].read_spec(Config(data, config.file, config.prefix, config.remedy))


def with_model_ropes(
    layers: tuple[Layer, ...], ropes: tuple[Rope, ...], model: ModelSpec
) -> tuple[tuple[Layer, ...], tuple[Rope, ...]]:
    """Return layers that name the model's rotary embeddings where these are the same, and the others.

    Args:
        layers: The drafter's layers.
        ropes: Its rotary embeddings.
        model: The model.
    """
    known, own = list(model.ropes), list[Rope]()
    places = []
    for rope in ropes:
        if rope in known and rope.scaling.kind != "factors":  # its divisors are in a tensor of its own
            places.append(known.index(rope))
        else:
            known.append(rope)
            own.append(rope)
            places.append(len(known) - 1)
    moved = tuple(
        layer
        if layer.attention.rope is None
        else replace(layer, attention=replace(layer.attention, rope=places[layer.attention.rope]))
        for layer in layers
    )
    return moved, tuple(own)


def layer_tensors(prefix: str, spec: DrafterSpec, layer: int) -> dict[str, str]:
    """Return the tensor of each weight of a layer, by role, where names are transformers' Llama's."""
    return {weight.role: f"{prefix}.{parameter_name(weight.role)}" for weight in drafter_layer_weights(spec, layer)}


def matrix_size(checkpoint: Checkpoint, name: str, axis: int) -> int:
    """Return the size of an axis of a matrix.

    Raises:
        CheckpointError: The tensor is no matrix.
    """
    shape = checkpoint.shape(name)
    if len(shape) != 2:
        raise CheckpointError(
            f"{checkpoint.source}: tensor {name}",
            found=f"shape {list(shape)}",
            expected="a matrix",
            remedy="take the file from the drafter's original repository",
        )
    return shape[axis]


def draft_vocab(checkpoint: Checkpoint) -> int:
    """Return the rows of a trimmed head.

    Raises:
        CheckpointError: There are too few to choose from.
    """
    rows = matrix_size(checkpoint, "lm_head.weight", 0)
    if rows < 2:
        raise CheckpointError(
            f"{checkpoint.source}: tensor lm_head.weight",
            found=f"{rows} rows",
            expected="2 or more, one for each token that the head drafts",
            remedy="take the file from the drafter's original repository",
        )
    return rows
