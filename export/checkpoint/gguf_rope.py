"""Turns the rotary embedding of a GGUF file's metadata into the fields of a config.

==================================  ===============================================================================
metadata                            config
==================================  ===============================================================================
``rope.freq_base``                  ``rope_theta``; 10000 where it is absent
``rope.freq_base_swa``              that of sliding layers, where they have a rotary embedding of their own
``rope.dimension_count``            the share of a head that is rotated; all of it where it is absent
``rope.scaling.*``                  ``rope_type`` linear or yarn; llama.cpp spells none as ``none``, or as factor 0 or 1
``rope_freqs.weight``               ``rope_type`` factors: one divisor per frequency
``rope_factors_{short,long}``       ``rope_type`` longrope, with ``rope.scaling.attn_factor``
==================================  ===============================================================================
"""

from __future__ import annotations

import math

from shortstack.export.checkpoint.checkpoint import ROPE_FACTORS
from shortstack.export.checkpoint.gguf_family import YARN_LOG, GgufFamily
from shortstack.export.checkpoint.gguf_model import CONVERT_AGAIN, GgufModel, shortest
from shortstack.graphs.errors import CheckpointError, UnsupportedError

ORIGINAL = "original_max_position_embeddings"
LONGROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that become fields of the config."""


def rope_fields(family: GgufFamily, model: GgufModel, head_dim: int, context: int) -> dict[str, object]:
    """Return the fields of the config.

    Args:
        family: The architecture.
        model: The file.
        head_dim: Width of its heads.
        context: The longest context, in tokens.

    Raises:
        CheckpointError: A field has the wrong type, is missing, or contradicts another one.
        UnsupportedError: The rotary embedding is of a kind that this version cannot export.
    """
    theta = rope_base(model, "rope.freq_base", 10000.0)
    scaled = {**_scaling(family, model, context), "rope_theta": theta}
    found: dict[str, object] = {"rope_parameters": scaled}
    if (original := scaled.get(ORIGINAL)) is not None:  # at the top it wins over the default of a class
        found[ORIGINAL] = original
    dims = model.positive("rope.dimension_count", head_dim)
    if family.rope_share is not None:
        found[family.rope_share] = _share(model, dims, head_dim)
    elif dims != head_dim:
        raise model.unsupported("rope.dimension_count", "partial rotary embedding", f"the head size {head_dim}")
    local = family.local_theta
    swa = rope_base(model, "rope.freq_base_swa", theta if local is None or local == "same" else local)
    if local is not None:
        plain = {"rope_type": "default", "rope_theta": swa}
        found["rope_parameters"] = {"full_attention": scaled, "sliding_attention": plain}
    elif swa != theta:
        raise model.unsupported("rope.freq_base_swa", "a rotary base of sliding layers", f"that of all, {theta:g}")
    return found


def rope_base(model: GgufModel, key: str, default: float) -> float:
    """Read the base of the rotary frequencies; errors as in :func:`rope_fields`."""
    value = model.number(key, default)
    if value < 1:
        raise model.metadata.wrong(model.key(key), "a number of at least 1")
    return value


def _share(model: GgufModel, dims: int, head_dim: int) -> float:
    """Return the share whose product with ``head_dim``, rounded down, is ``dims``."""
    if dims > head_dim or dims % 2:
        where = model.where("rope.dimension_count")
        raise CheckpointError(
            where, found=dims, expected=f"an even number, at most the head size {head_dim}", remedy=CONVERT_AGAIN
        )
    return partial_share(dims, head_dim)


def partial_share(dims: int, head_dim: int) -> float:
    """Return the share of a head whose product with ``head_dim``, rounded down, is ``dims``."""
    share = dims / head_dim
    return share if int(head_dim * share) == dims else math.nextafter(share, math.inf)


def _scaling(family: GgufFamily, model: GgufModel, context: int) -> dict[str, object]:
    for key, neutral in ((YARN_LOG, 0.0), ("rope.scaling.yarn_ext_factor", 1.0)):
        if key not in family.ignores and model.number(key, neutral) != neutral:
            raise model.unsupported(key, "a variant of yarn", neutral)
    is_longrope = all(model.has(name) for name in LONGROPE_FACTORS)
    attention_factor = model.positive_number("rope.scaling.attn_factor", 1.0)
    if attention_factor != 1.0 and not is_longrope:  # llama.cpp multiplies cos and sin by it, whatever the kind
        raise UnsupportedError(
            model.where("rope.scaling.attn_factor"), found=attention_factor, expected="1.0", remedy=CONVERT_AGAIN
        )
    kind = model.read(str, "rope.scaling.type", None)
    factor = model.number("rope.scaling.factor", 0.0) or model.number("rope.scale_linear", 0.0)  # until 2023-10
    if factor < 0:
        raise model.metadata.wrong(model.key("rope.scaling.factor"), "a positive number")
    if kind is None:
        kind = "linear" if factor else "none"  # llama.cpp's own default
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise model.unsupported("rope.scaling.type", "another kind of scaling", "none, linear, yarn or longrope")
    is_plain = kind == "none" or (kind == "linear" and factor in (0.0, 1.0))
    if ROPE_FACTORS in model.tensors or is_longrope:
        if not (is_plain or (is_longrope and kind == "longrope")):
            where = f"{model.where('rope.scaling.type')}: {kind} on top of {ROPE_FACTORS}"
            raise UnsupportedError(f"{where} cannot be exported", remedy=CONVERT_AGAIN)
        return _longrope(model, attention_factor) if is_longrope else {"rope_type": "factors"}
    if kind == "longrope":
        raise CheckpointError(
            f"{model.where('rope.scaling.type')}: longrope needs {' and '.join(LONGROPE_FACTORS)}",
            found="no such tensors",
            remedy=CONVERT_AGAIN,
        )
    if is_plain:
        return {"rope_type": "default"}
    fields: dict[str, object] = {"rope_type": kind, "factor": factor or 1.0}
    return fields | (_yarn(model, context) if kind == "yarn" else {})


def _longrope(model: GgufModel, attention_factor: float) -> dict[str, object]:
    short, long = (list(map(shortest, model.read_tensor(name).reshape(-1).tolist())) for name in LONGROPE_FACTORS)
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "attention_factor": attention_factor,
        ORIGINAL: model.positive("rope.scaling.original_context_length"),
    }


def _yarn(model: GgufModel, context: int) -> dict[str, object]:
    original = model.positive("rope.scaling.original_context_length", context)
    fields: dict[str, object] = {ORIGINAL: original}
    names = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    for key, name in names.items():
        if model.key(f"rope.scaling.{key}") in model.metadata:
            fields[name] = model.positive_number(f"rope.scaling.{key}")
    return fields
