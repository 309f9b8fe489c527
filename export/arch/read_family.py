"""Turns a config into a spec, by the table of its family (:mod:`shortstack.export.arch.family`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from shortstack.export.arch.family import ACTIVATIONS, FULL, NEUTRAL, REQUIRED, SLIDING, Family, Key
from shortstack.export.arch.rope_config import read_ropes
from shortstack.export.checkpoint.checkpoint import MAX_LAYERS
from shortstack.export.checkpoint.config import Config, not_one_of, positive
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.layer_spec import Attention, Ends, Layer, Mlp, Norm
from shortstack.graphs.spec import ModelSpec

_OTHER_FILE = "correct the field, or take the file from the model's original repository"
_OTHER_MODEL = "export a model that does not ask for it"
_EVEN = "an even number, for rotary embedding"
T = TypeVar("T", bool, int, float, str)


def read_family(family: Family, config: Config) -> ModelSpec:
    """Read a ``config.json``.

    Raises:
        CheckpointError: A field is missing, has the wrong type, or contradicts another one.
        UnsupportedError: The config asks for something this version cannot export.
    """
    with remedies():
        return _read(family, config)


@contextmanager
def remedies() -> Iterator[None]:
    """Give errors about a config that have no remedy the usual one."""
    try:
        yield
    except CheckpointError as error:
        if not error.has_remedy:
            remedy = _OTHER_MODEL if isinstance(error, UnsupportedError) else _OTHER_FILE
            raise type(error)(error.problem, remedy=remedy) from None
        raise


def _read(family: Family, config: Config) -> ModelSpec:
    _check_neutral(family, config)
    mlp = _mlp(family, config)
    attention, hidden = _attention(family, config)
    norm = Norm(family.norm_kind, _above_0(config, family.norm_eps), family.norm_bias)
    if family.qk_norm is not None:
        attention = replace(attention, qk_norm=Norm("rms", norm.eps), qk_norm_over=family.qk_norm)
    depth = _positive(config, family.num_layers)
    if depth > MAX_LAYERS:
        raise config.wrong(family.num_layers.name, f"at most {MAX_LAYERS}")
    context = _positive(config, family.context)
    types = family.layer_types(config, depth)
    rotates = family.has_rope(config, types)
    used = list(dict.fromkeys(kind for kind, is_rotated in zip(types, rotates, strict=True) if is_rotated))
    by_type = read_ropes(family, config, context, attention.head_dim, used)
    ropes = tuple(dict.fromkeys(by_type.values()))
    window = _window(family, config, types)
    layer = Layer(
        attention,
        mlp,
        before_attention=norm if "before_attention" in family.norms else None,
        after_attention=norm if "after_attention" in family.norms else None,
        before_mlp=norm if "before_mlp" in family.norms else None,
        after_mlp=norm if "after_mlp" in family.norms else None,
        is_parallel=_value(config, family.is_parallel, bool),
        residual_scale=_value(config, family.residual_scale, float),
    )

    def layer_of(kind: str, is_rotated: bool) -> Layer:
        own = replace(
            attention,
            rope=ropes.index(by_type[kind]) if is_rotated else None,
            window=window if kind == SLIDING else 0,
            qk_norm_after_rope=family.qk_norm_after_rope,
        )
        return replace(layer, attention=own)

    spec = ModelSpec(
        model_type=family.model_type,
        hidden_size=hidden,
        vocab_size=_positive(config, family.vocab),
        max_position_embeddings=context,
        tie_word_embeddings=_value(config, family.tied, bool),
        layers=tuple(layer_of(kind, is_rotated) for kind, is_rotated in zip(types, rotates, strict=True)),
        ends=_ends(family, config, norm, hidden, context if family.learns_positions else 0),
        ropes=ropes,
    )
    return family.extend(config, spec)


def _check_neutral(family: Family, config: Config) -> None:
    """Refuse a config that asks for what the family's graphs do not compute."""
    for name, value in {**NEUTRAL, **family.neutral}.items():
        found = config.data.get(name)
        if found is not None and (type(found) is not type(value) or found != value):
            shown = "null" if value is None else f"{str(value).lower()}, or null"
            raise UnsupportedError(
                f"{config.where(name)} changes what the model computes",
                found=repr(found),
                expected=shown,
            )


def _window(family: Family, config: Config, types: tuple[str, ...]) -> int:
    if SLIDING not in types:
        return 0
    key, switch = family.window, family.window_switch
    if key.name in config.data and config.data[key.name] is None:
        raise CheckpointError(
            f"{config.where(key.name)} is null, and layer {types.index(SLIDING)} is of type {SLIDING}",
            expected="the number of positions that a sliding layer sees",
        )
    if switch is not None and not config.read(bool, switch, False):
        raise CheckpointError(
            f"{config.where(switch)} is false, and layer {types.index(SLIDING)} is of type {SLIDING}",
            expected=f"true, or {FULL} for all layers",
        )
    return _positive(config, key)


def _mlp(family: Family, config: Config) -> Mlp:
    activation = _value(config, family.activation, str)
    if activation not in family.activations:
        raise not_one_of(config.where(family.activation.name), activation, family.activations)
    inner = family.inner
    if inner.default is None and inner.name not in config:  # GPT-2
        width = 4 * _positive(config, family.hidden)
    else:
        width = _positive(config, inner)
    kind = family.activation_means.get(activation) or ACTIVATIONS[activation]
    return Mlp(width, kind, family.is_gated, _value(config, family.mlp_bias, bool))


def _attention(family: Family, config: Config) -> tuple[Attention, int]:
    """Return the attention that all layers have, without windows and rotary embeddings, and the hidden size."""
    heads = _positive(config, family.heads)
    kv_heads = heads
    if family.kv_heads is not None and not _is_null(config, family.kv_heads):
        kv_heads = positive(config, family.kv_heads.name, family.kv_heads.default or heads)
        if heads % kv_heads:
            raise CheckpointError(
                config.where(family.kv_heads.name),
                found=kv_heads,
                expected=f"a divisor of {family.heads.name}, {heads}",
            )
    hidden, head_dim = _positive(config, family.hidden), 0
    key = family.head_dim
    if key is not None and not _is_null(config, key) and (key.name in config or key.default is not None):
        head_dim = _positive(config, key)
        if head_dim % 2:
            raise CheckpointError(
                config.where(key.name), found=head_dim, expected="an even number, for rotary embedding"
            )
    else:
        absent = "" if key is None else f", and {key.name} is not given"
        if hidden % heads:
            raise CheckpointError(
                f"{config.where(family.hidden.name)} does not divide into {heads} heads{absent}", found=hidden
            )
        head_dim = hidden // heads
        if head_dim % 2:
            raise CheckpointError(
                f"{config.where(family.hidden.name)} gives heads of {head_dim}",
                found=hidden,
                expected=f"heads whose width is {_EVEN}",
            )
        if key is None and (given := config.read(int, "head_dim", head_dim)) != head_dim:
            raise CheckpointError(
                f"{config.where('head_dim')} contradicts the other fields",
                found=given,
                expected=f"{family.hidden.name} / {family.heads.name} = {head_dim}",
            )
    return Attention(
        heads,
        kv_heads,
        head_dim,
        scale=_scale(family, config),
        softcap=_at_least_0(config, family.softcap),
        qkv_bias=_value(config, family.qkv_bias, bool),
        out_bias=_value(config, family.out_bias, bool),
    ), hidden


def _scale(family: Family, config: Config) -> float | None:
    if family.scale_base is not None:
        return float(_above_0(config, family.scale_base) ** -0.5)
    return None if family.scale is None else _above_0(config, family.scale)


def _ends(family: Family, config: Config, norm: Norm, hidden: int, positions: int) -> Ends:
    scale = _value(config, family.logit_scale, float)
    if family.divides_logits:
        if abs(scale) < sys.float_info.min:
            assert isinstance(family.logit_scale, Key)
            raise config.wrong(family.logit_scale.name, "a number other than 0, which logits are divided by")
        scale = 1.0 / scale
    embed_scale = float(hidden**0.5) if family.embed_scale == "root" else family.embed_scale
    return Ends(
        final_norm=norm,
        embed_scale=_value(config, embed_scale, float),
        learned_positions=positions,
        logit_scale=scale,
        logit_softcap=_at_least_0(config, family.logit_softcap),
    )


def _value(config: Config, value: Key | T, kind: type[T]) -> T:
    """Return a fixed value, or what the config says."""
    if not isinstance(value, Key):
        return value
    return config.read(kind, value.name) if value.default == REQUIRED else config.read(kind, value.name, value.default)


def _is_null(config: Config, key: Key) -> bool:
    """Whether the field is there and null, which for some fields says something else than its absence."""
    return config.data.get(key.name, key.default) is None


def _positive(config: Config, key: Key) -> int:
    return positive(config, key.name) if key.default == REQUIRED else positive(config, key.name, key.default)


def _above_0(config: Config, key: Key) -> float:
    found = _value(config, key, float)
    if found <= 0:
        raise config.wrong(key.name, "a positive number")
    return found


def _at_least_0(config: Config, value: Key | float) -> float:
    """Return a cap; null and 0 stand for none."""
    if not isinstance(value, Key):
        return value
    found = 0.0 if config.data.get(value.name, value.default) is None else _value(config, value, float)
    if found < 0:
        raise config.wrong(value.name, "a positive number, or null for none")
    return found
