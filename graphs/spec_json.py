"""A :class:`ModelSpec` as the JSON object ``model`` of bundle.json, and back.

Format 4 writes the dataclasses of :mod:`shortstack.graphs.layer_spec` field by field and leaves out what has its
default. Equal layers are written once::

    {"model_type": "llama", "hidden_size": 576, ..., "ends": {"final_norm": {"eps": 1e-05}},
     "ropes": [{"theta": 100000.0, "head_dim": 64, "dims": 64}],
     "layer_kinds": [{"attention": {...}, "mlp": {"width": 1536}, "before_attention": {...}, "before_mlp": {...}}],
     "layers": [0, 0, 0, ...], "kv_map": [0, 1, 2, ...]}

Formats 1 to 3 know Llama's layers alone, as a flat list of fields (:func:`llama_spec`). Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.errors import BundleError
from shortstack.graphs.kv_map import validate_kv_map
from shortstack.graphs.layer_spec import Attention, Ends, Layer, Mlp, Norm, Rope, RopeScaling
from shortstack.graphs.spec import ModelSpec

T = TypeVar("T")
_KIND_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
NO_SCALING = RopeScaling()
_MAX_LAYERS = 10_000  # far above any model; a number in a damaged file allocates nothing large
_LARGEST = 2**31 - 1  # of sizes and numbers of layers, as for configs of checkpoints


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """Return a spec as JSON-ready data."""
    kinds = list(dict.fromkeys(spec.layers))
    data = {name: getattr(spec, name) for name in _SIZES}
    return data | {
        "ends": _encode(spec.ends),
        "ropes": [_encode(rope) for rope in spec.ropes],
        "layer_kinds": [_encode(kind) for kind in kinds],
        "layers": [kinds.index(layer) for layer in spec.layers],
        "kv_map": list(spec.kv_map),
        **({"masks_diagonal": True} if spec.masks_diagonal else {}),
    }


def spec_from_json(data: Mapping[str, Any], where: str, *, is_flat: bool = False) -> ModelSpec:
    """Rebuild a spec that :func:`spec_to_json` wrote.

    Args:
        data: The parsed JSON object.
        where: File and field, for messages.
        is_flat: It is of format 1, 2 or 3.

    Raises:
        BundleError: A field is missing, unknown, of another type or out of range.
    """
    if not isinstance(data, Mapping):
        raise _unusable(where, repr(data), "an object")
    if is_flat:
        return _from_flat(data, where)
    written = _decode(_Written, data, where)
    if len(written.layers) > _MAX_LAYERS or not written.layers:
        raise _unusable(f"{where}.layers", f"{len(written.layers)} entries", f"1..{_MAX_LAYERS}")
    for number in written.layers:
        if not 0 <= number < len(written.layer_kinds):
            raise _unusable(f"{where}.layers", str(number), f"0..{len(written.layer_kinds) - 1}, one of layer_kinds")
    if len(written.kv_map) != len(written.layers):
        raise _unusable(
            f"{where}.kv_map", f"{len(written.kv_map)} entries", f"one for each of layers, {len(written.layers)}"
        )
    _checked(f"{where}.kv_map", lambda: validate_kv_map(written.kv_map, len(written.layers)))
    shared = {name: getattr(written, name) for name in (*_SIZES, "ends", "ropes", "kv_map", "masks_diagonal")}
    layers = tuple(written.layer_kinds[number] for number in written.layers)
    return _checked(where, lambda: ModelSpec(**shared, layers=layers))


def drafter_to_json(drafter: DrafterSpec) -> dict[str, Any]:
    """Return a drafter as JSON-ready data: its fields, without those that have their default."""
    data: dict[str, Any] = _encode(drafter)
    return data


def drafter_from_json(data: object, where: str) -> DrafterSpec:
    """Rebuild a drafter that :func:`drafter_to_json` wrote; errors as in :func:`spec_from_json`."""
    found: DrafterSpec = _decode(DrafterSpec, data, where)
    return found


def llama_spec(
    *,
    model_type: str,
    num_hidden_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    vocab_size: int,
    rms_norm_eps: float,
    rope_theta: float,
    max_position_embeddings: int,
    tie_word_embeddings: bool,
    rope_scaling: RopeScaling = NO_SCALING,
    qkv_bias: bool = False,
    attention_out_bias: bool = False,
    mlp_bias: bool = False,
    kv_map: tuple[int, ...] = (),
    windows: tuple[int, ...] = (),
    masks_diagonal: bool = False,
) -> ModelSpec:
    """Return a model of Llama's layers; the arguments are the fields of ``model`` in formats 1 to 3.

    Raises:
        ValueError: They do not fit each other.
    """
    norm = Norm("rms", rms_norm_eps)
    attention = Attention(
        num_attention_heads, num_key_value_heads, head_dim, qkv_bias=qkv_bias, out_bias=attention_out_bias
    )
    layer = Layer(attention, Mlp(intermediate_size, has_bias=mlp_bias), before_attention=norm, before_mlp=norm)
    spec = ModelSpec(
        model_type=model_type,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        layers=(layer,) * num_hidden_layers,
        ends=Ends(norm),
        ropes=(Rope(rope_theta, head_dim, head_dim, rope_scaling),),
        kv_map=kv_map,
        masks_diagonal=masks_diagonal,
    )
    return spec.with_windows(windows)


_SIZES = ("model_type", "hidden_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings")


@dataclass(frozen=True)
class _Written:
    """The fields of the object, as they are written."""

    model_type: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    ends: Ends
    ropes: tuple[Rope, ...]
    layer_kinds: tuple[Layer, ...]
    layers: tuple[int, ...]
    kv_map: tuple[int, ...]
    masks_diagonal: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not 1 or more")


@dataclass(frozen=True)
class _Flat:
    """The fields of formats 1 to 3, with their types."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: RopeScaling
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    kv_map: tuple[int, ...]
    windows: tuple[int, ...] = ()
    masks_diagonal: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ValueError(f"{field.name} is {value}, not 1 or more")
        if not 1 <= self.num_hidden_layers <= _MAX_LAYERS:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}, not 1..{_MAX_LAYERS}")
        if len(self.kv_map) != self.num_hidden_layers:
            raise ValueError(f"kv_map has {len(self.kv_map)} entries, not num_hidden_layers = {self.num_hidden_layers}")


def _from_flat(data: Mapping[str, Any], where: str) -> ModelSpec:
    flat = _decode(_Flat, data, where)
    return _checked(where, lambda: llama_spec(**{field.name: getattr(flat, field.name) for field in fields(flat)}))


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if not is_dataclass(value):
        return value
    found = {field.name: (getattr(value, field.name), field.default) for field in fields(value)}
    return {name: _encode(own) for name, (own, default) in found.items() if own != default}


def _decode(kind: Any, data: object, where: str) -> Any:
    """Return ``data`` as a value of a type: a dataclass, a tuple of one type, a choice, or a plain value."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_object(kind, data, where)
    if get_origin(kind) is UnionType:  # X | None
        (inner,) = (part for part in get_args(kind) if part is not type(None))
        return None if data is None else _decode(inner, data, where)
    if get_origin(kind) is tuple:
        if not isinstance(data, list):
            raise _unusable(where, repr(data), "a list")
        return tuple(_decode(get_args(kind)[0], entry, f"{where}[{number}]") for number, entry in enumerate(data))
    if get_origin(kind) is Literal:
        if data not in get_args(kind):
            raise _unusable(where, repr(data), " or ".join(get_args(kind)))
        return data
    accepted = (int, float) if kind is float else kind
    if not isinstance(data, accepted) or (isinstance(data, bool) and kind is not bool):
        raise _unusable(where, repr(data), _KIND_NAMES[kind])
    if kind is int and not 0 <= data <= _LARGEST:
        raise _unusable(where, repr(data), f"0..{_LARGEST}")
    return _finite(data, where) if kind is float else data


def _finite(data: Any, where: str) -> float:
    try:
        number = float(data)
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise _unusable(where, repr(data), "a finite number")
    return number


def _decode_object(kind: type, data: object, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _unusable(where, repr(data), "an object")
    known = {field.name: field for field in fields(kind)}
    needed = {name for name, field in known.items() if field.default is MISSING}
    missing, extra = sorted(needed - data.keys()), sorted(map(str, data.keys() - known.keys()))
    if missing or extra:
        raise BundleError(
            f"{where} does not describe a model (missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(extra) or 'none'})",
            remedy="re-export the bundle with this version of shortstack",
        )
    types = get_type_hints(kind)
    values = {name: _decode(types[name], value, f"{where}.{name}") for name, value in data.items()}
    return _checked(where, lambda: kind(**values))


def _checked(where: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        raise _unusable(f"{where}: {error}") from None


def _unusable(what: str, found: str | None = None, expected: str | None = None) -> BundleError:
    """Return the error about a field with a value that export never writes."""
    return BundleError(what, found=found, expected=expected, remedy="restore bundle.json or re-export the bundle")
