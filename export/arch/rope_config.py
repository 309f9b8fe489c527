"""Reads how rotary embedding is stretched: every spelling of transformers 4 and 5, as transformers 5 reads it.

==============================================  ============================================================
``rope_theta``, ``rope_scaling``                transformers 4; ``type`` in place of ``rope_type`` before 4.43
``rope_parameters``                             transformers 5: both in one object
``rope_scaling`` with ``rope_theta`` in it      a mixture; what stands in the object wins over the top
both objects                                    ``rope_scaling`` alone counts, unless it is empty
==============================================  ============================================================

That is ``RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`` in transformers 5.24. Where it leaves out a field
that says something else, one of the two is a mistake, and the config is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import cast

from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.spec import RopeKind, RopeScaling

DEFAULT_THETA = 10000.0
ORIGINAL_LENGTH = "original_max_position_embeddings"
_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "factors")
_TYPE_KEYS = ("rope_type", "type")
_LARGEST = 2**31 - 1  # of a size: no model comes near, and numbers that overflow stay out

log = logging.getLogger(__name__)


def read_rope(config: Config, context: int) -> tuple[float, RopeScaling]:
    """Read the rotary base and its scaling.

    Args:
        config: The model's config.
        context: Its ``max_position_embeddings``.

    Raises:
        CheckpointError: A field is missing, has the wrong type, is not positive, or contradicts another one.
        UnsupportedError: The rotary embedding is of a kind this version cannot export.
    """
    fields = _chosen(config)
    _refuse_partial([place for place in (config, fields) if place is not None])
    _refuse_nested(config)
    if fields is None:
        return positive_float(config, "rope_theta", DEFAULT_THETA), RopeScaling()
    theta = positive_float(fields if "rope_theta" in fields else config, "rope_theta", DEFAULT_THETA)
    key = next((key for key in _TYPE_KEYS if key in fields), None)
    if key is None:
        if "factor" in fields:
            raise CheckpointError(f"{fields.where('rope_type')} is missing", expected=f"one of {', '.join(_KINDS[:3])}")
        return theta, RopeScaling()
    kind = fields.read(str, key)
    if kind not in _KINDS:
        raise not_one_of(fields.where(key), kind, _KINDS[:3])
    if kind in ("default", "factors"):
        return theta, RopeScaling(kind=cast("RopeKind", kind))
    factor = positive_float(fields, "factor")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    low, high = positive_float(fields, "low_freq_factor"), positive_float(fields, "high_freq_factor")
    if high <= low:
        raise CheckpointError(
            fields.where("high_freq_factor"), found=high, expected=f"more than low_freq_factor, {low}"
        )
    return theta, RopeScaling("llama3", factor, low, high, _original_length(config, fields, context))


def positive_float(config: Config, key: str, default: float | None = None) -> float:
    """Read a number above 0; errors as in :meth:`Config.read`, and for one that is not positive."""
    value = config.read(float, key) if default is None else config.read(float, key, default)
    if value <= 0:
        raise config.wrong(key, "a positive number")
    return value


def _chosen(config: Config) -> Config | None:
    """Return the object that counts; refuse one that is left out although it says something else."""
    parameters, scaling = config.section("rope_parameters"), config.section("rope_scaling")
    if scaling is None or not scaling.data:
        return parameters
    if parameters is None:
        return scaling
    ignored = []
    for key, value in parameters.data.items():
        counts = scaling.data.get(key)
        if key == "rope_theta" and counts is None:
            counts = config.data.get(key, DEFAULT_THETA)
        is_default_kind = key in _TYPE_KEYS and value == "default"
        if value is not None and value != counts and not is_default_kind:
            ignored.append(f"{key} {value!r} where the other counts as {counts!r}")
    if ignored:
        raise CheckpointError(
            f"{config.where('rope_parameters')} and rope_scaling contradict each other: transformers reads "
            "rope_scaling alone when it is there",
            found=f"in rope_parameters {', '.join(ignored)}",
            remedy="keep rope_parameters alone, with all fields in it",
        )
    return scaling


def _refuse_partial(places: Sequence[Config]) -> None:
    for place in places:
        share = place.read(float, "partial_rotary_factor", 1.0)
        if share != 1.0:
            where = place.where("partial_rotary_factor")
            raise UnsupportedError(f"{where}: partial rotary embedding", found=share, expected="1.0")


def _refuse_nested(config: Config) -> None:
    """Refuse one rotary embedding per type of layer, as Gemma 3 has it: an object in the object."""
    places = [config.section("rope_parameters"), config.section("rope_scaling")]
    for place in [place for place in places if place is not None]:
        for key, value in place.data.items():
            if isinstance(value, Mapping):
                raise UnsupportedError(
                    f"{place.where(key)}: a rotary embedding for some layers",
                    found="an object",
                    expected="one rotary embedding for all layers",
                )


def _original_length(config: Config, fields: Config, context: int) -> int:
    """Return the length that the model was first trained on: at the top, else in the object, else the whole context.

    That is the order of transformers, whose ``standardize_rope_params`` lets the field at the top win.
    """
    for place in (config, fields):
        if ORIGINAL_LENGTH in place:
            return positive(place, ORIGINAL_LENGTH)
    log.warning(
        "%s is missing: max_position_embeddings, %d, takes its place, as in transformers",
        fields.where(ORIGINAL_LENGTH),
        context,
    )
    return context


def positive(config: Config, key: str, default: int | None = None) -> int:
    """Read an integer above 0; errors as in :meth:`Config.read`, and for one that is not positive."""
    value = config.read(int, key) if default is None else config.read(int, key, default)
    if value <= 0:
        raise config.wrong(key, "a positive integer")
    if value > _LARGEST:
        raise config.wrong(key, f"at most {_LARGEST}")
    return value
