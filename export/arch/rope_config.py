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
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import cast

from shortstack.export.arch.family import FULL, SLIDING, Family, Key
from shortstack.export.checkpoint.config import Config, not_one_of, positive
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.layer_spec import Rope, RopeKind, RopeScaling

DEFAULT_THETA = 10000.0
ORIGINAL_LENGTH = "original_max_position_embeddings"
_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn", "longrope", "proportional", "factors")
_SHOWN = _KINDS[:-1]  # in messages: the last is of GGUF files
_SAME_AS = {"dynamic": "default", "su": "longrope"}
"""``dynamic`` changes nothing up to the model's context, beyond which no bundle goes; ``su`` is an older name."""
_TYPE_KEYS = ("rope_type", "type")

log = logging.getLogger(__name__)


def read_ropes(family: Family, config: Config, context: int, head_dim: int, types: Collection[str]) -> dict[str, Rope]:
    """Read the rotary embedding of each type of layer.

    Args:
        family: The family, for its defaults.
        config: The model's config.
        context: Its longest context, in tokens.
        head_dim: Width of its heads.
        types: The types of the layers that have a rotary embedding.

    Raises:
        CheckpointError: A field is missing, has the wrong type, is not positive, or contradicts another one.
        UnsupportedError: The rotary embedding is of a kind this version cannot export.
    """
    fields = rope_section(config, family.rope_parameters)
    if family.local_rope is None:
        _refuse_nested(config)
        rope = _rope(family, config, fields, Key(family.theta_key, family.rope_theta), context, head_dim)
        return dict.fromkeys(types, rope)
    _refuse_flat(config)
    return {kind: _rope_of_type(family, config, fields, family.local_rope, kind, context, head_dim) for kind in types}


def rope_of_type(family: Family, config: Config, kind: str, context: int, head_dim: int) -> Rope:
    """Read the rotary embedding of one type of layer; arguments and errors as in :func:`read_ropes`."""
    assert family.local_rope is not None
    return _rope_of_type(family, config, rope_section(config), family.local_rope, kind, context, head_dim)


def _rope_of_type(
    family: Family, config: Config, fields: Config | None, local: Key | float, kind: str, context: int, head_dim: int
) -> Rope:
    """Read the rotary embedding of one type of layer of a family in which they differ.

    transformers 5 has an object per type. Before that, the fields were those of the full layers, and sliding layers had
    a base of their own and no scaling.
    """
    own = None if fields is None else fields.section(kind)
    if kind != FULL:
        return _rope(family, config, own, local, context, head_dim)
    key = Key(family.theta_key, family.rope_theta)
    return _rope(family, config, fields if own is None else own, key, context, head_dim)


def _rope(
    family: Family, config: Config, fields: Config | None, base: Key | float, context: int, head_dim: int
) -> Rope:
    """Read one rotary embedding from its object, if it has one, and its base from the object or from the top."""
    dims = _dims(family, config, fields, head_dim)
    if fields is not None and "rope_theta" in fields:
        theta = _base(fields, "rope_theta")
        if isinstance(base, Key):
            _say_ignored(config, base.name, fields, "rope_theta")
    else:
        theta = _base(config, base.name, base.default) if isinstance(base, Key) else base
    scaling = RopeScaling() if fields is None else _scaling(family, config, fields, context, dims)
    return Rope(theta, head_dim, dims, scaling)


def _base(config: Config, key: str, default: float = DEFAULT_THETA) -> float:
    theta = config.read(float, key, default)
    if theta <= 1:
        raise config.wrong(key, "a number above 1")
    return theta


def _scaling(family: Family, config: Config, fields: Config, context: int, dims: int) -> RopeScaling:
    key = next((key for key in _TYPE_KEYS if key in fields), None)
    if key is None:
        if "factor" in fields:
            raise CheckpointError(f"{fields.where('rope_type')} is missing", expected=f"one of {', '.join(_SHOWN)}")
        return RopeScaling()
    kind = fields.read(str, key)
    _say_ignored(fields, _TYPE_KEYS[1], fields, _TYPE_KEYS[0])
    if kind == "dynamic":
        positive_float(fields, "factor")
    kind = {**_SAME_AS, **family.rope_same_as}.get(kind, kind)
    if kind not in _KINDS:
        raise not_one_of(fields.where(key), kind, _SHOWN)
    if kind in ("default", "factors"):
        return RopeScaling(kind=cast("RopeKind", kind))
    if kind == "longrope":
        return _longrope(family, config, fields, context, dims)
    if kind == "proportional":
        return RopeScaling("proportional", positive_float(fields, "factor", 1.0))
    factor = positive_float(fields, "factor")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        return _yarn(family, config, fields, context, factor)
    low, high = positive_float(fields, "low_freq_factor"), positive_float(fields, "high_freq_factor")
    if high <= low:
        raise CheckpointError(
            fields.where("high_freq_factor"), found=high, expected=f"more than low_freq_factor, {low}"
        )
    return RopeScaling("llama3", factor, low, high, _original_length(family, config, fields, context))


def _yarn(family: Family, config: Config, fields: Config, context: int, factor: float) -> RopeScaling:
    original = _original_length(family, config, fields, context)
    if "attention_factor" in fields:
        attention_factor = positive_float(fields, "attention_factor")
    else:
        mscale, of_all = fields.read(float, "mscale", 0.0), fields.read(float, "mscale_all_dim", 0.0)
        ratio = (_mscale(factor, mscale), _mscale(factor, of_all) or math.inf)
        attention_factor = ratio[0] / ratio[1] if mscale and of_all else _mscale(factor)
        if not 0 < attention_factor < math.inf:
            raise fields.wrong("mscale", "a number that gives a positive factor of attention with mscale_all_dim")
    fast, slow = fields.read(float, "beta_fast", 32.0) or 32.0, fields.read(float, "beta_slow", 1.0) or 1.0
    if not 0 < slow < fast:
        raise CheckpointError(fields.where("beta_slow"), found=slow, expected=f"above 0 and below beta_fast, {fast}")
    truncate = fields.read(bool, "truncate", True)
    if family.local_rope is not None and not truncate:
        raise UnsupportedError(
            f"{fields.where('truncate')}: transformers does not read it in the object of one type of layer",
            found=truncate,
            expected="true, or null",
            remedy="remove the field: what transformers computes has bounds that are whole columns",
        )
    return RopeScaling(
        "yarn", factor, original_max_position_embeddings=original, attention_factor=attention_factor, beta_fast=fast,
        beta_slow=slow, truncate=truncate,
    )  # fmt: skip


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(family: Family, config: Config, fields: Config, context: int, dims: int) -> RopeScaling:
    original = _original_length(family, config, fields, context)
    divisors = []
    for key in ("short_factor", "long_factor"):
        found = fields.data.get(key)
        numbers = found if isinstance(found, list) else []
        if len(numbers) != dims // 2 or not all(
            type(x) in (int, float) and 0 < x <= sys.float_info.max for x in numbers
        ):
            raise CheckpointError(
                fields.where(key),
                found=f"{len(numbers)} values" if numbers else repr(found),
                expected=f"{dims // 2} positive numbers, one per frequency",
            )
        divisors.append(tuple(map(float, numbers)))
    factor = positive_float(fields, "factor", context / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return RopeScaling(
        "longrope",
        factor,
        original_max_position_embeddings=original,
        attention_factor=positive_float(fields, "attention_factor", default),
        short_factors=divisors[0],
        long_factors=divisors[1],
    )


def _dims(family: Family, config: Config, fields: Config | None, head_dim: int) -> int:
    """Return how many columns of a head are rotated."""
    places = [place for place in (fields, config) if place is not None]
    if not isinstance(family.rope_share, Key):
        _refuse_partial(places, family.rope_share)
        return int(head_dim * family.rope_share)
    key = family.rope_share
    spellings = [(fields, "partial_rotary_factor"), (config, key.name)]
    found = next(((place, name) for place, name in spellings if place is not None and name in place), None)
    if found is not None and found[0] is fields:
        _say_ignored(config, key.name, *found)
    share = key.default if found is None else found[0].read(float, found[1])
    dims = int(head_dim * share) if 0 < share <= 1 else 0
    if dims < 2 or dims % 2:
        place, name = found or (config, key.name)
        raise CheckpointError(
            place.where(name), found=share, expected=f"a share of {head_dim} columns that is an even number of them"
        )
    return dims


def _say_ignored(config: Config, key: str, wins: Config, winner: str) -> None:
    """Warn of a field that says something else than the one that counts."""
    ignored, used = config.data.get(key), wins.data.get(winner)
    if ignored is not None and used is not None and ignored != used:
        log.warning(
            "%s, %r, is not used: %s, %r, takes its place, as in transformers",
            config.where(key),
            ignored,
            wins.where(winner),
            used,
        )


def positive_float(config: Config, key: str, default: float | None = None) -> float:
    """Read a number above 0; errors as in :meth:`Config.read`, and for one that is not positive."""
    value = config.read(float, key) if default is None else config.read(float, key, default)
    if value <= 0:
        raise config.wrong(key, "a positive number")
    return value


def rope_section(config: Config, default: Mapping[str, object] | None = None) -> Config | None:
    """Return the object that counts; refuse one that is left out although it says something else.

    Args:
        config: The config.
        default: The object of a config that has none; None for none.
    """
    parameters, scaling = config.section("rope_parameters"), config.section("rope_scaling")
    if scaling is None or not scaling.data:
        if parameters is not None or default is None:
            return parameters
        return Config(default, config.file, f"{config.prefix}rope_parameters.")
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


def _refuse_partial(places: Sequence[Config], expected: float) -> None:
    for place in places:
        share = place.read(float, "partial_rotary_factor", expected)
        if share != expected:
            where = place.where("partial_rotary_factor")
            raise UnsupportedError(f"{where}: partial rotary embedding", found=share, expected=expected)


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


def _refuse_flat(config: Config) -> None:
    """Refuse fields outside the objects of the types of layers, which transformers does not read in these families."""
    scaling = config.section("rope_scaling")
    if scaling is not None and "type" in scaling and "rope_type" not in scaling:
        raise CheckpointError(
            f"{scaling.where('type')}: transformers 5 does not read this name in a model whose layers have different "
            "rotary embeddings, and transformers 4 does",
            found=repr(scaling.data["type"]),
            expected="the name rope_type",
            remedy="rename the field if the model was trained with it, else remove rope_scaling",
        )
    parameters = config.section("rope_parameters")
    if parameters is None or any(parameters.section(kind) is not None for kind in (FULL, SLIDING)):
        return
    for key, value in parameters.data.items():
        if value is not None and not (key in _TYPE_KEYS and value == "default"):
            raise CheckpointError(
                f"{parameters.where(key)} says nothing of the layers that it is for",
                found=repr(value),
                expected=f"an object for each type of layer, {FULL} and {SLIDING}",
                remedy="move the fields into these objects",
            )


def _original_length(family: Family, config: Config, fields: Config, context: int) -> int:
    """Return the length that the model was first trained on: at the top, else in the object, else the whole context.

    That is the order of transformers, whose ``standardize_rope_params`` lets the field at the top win, even where it is
    the default of the config's class, and does not read it where each type of layer has an object.
    """
    if family.local_rope is None and (ORIGINAL_LENGTH in config or family.original_context is not None):
        return positive(config, ORIGINAL_LENGTH, family.original_context)
    if ORIGINAL_LENGTH in fields:
        return positive(fields, ORIGINAL_LENGTH)
    log.warning(
        "%s is missing: max_position_embeddings, %d, takes its place, as in transformers",
        fields.where(ORIGINAL_LENGTH),
        context,
    )
    return context
