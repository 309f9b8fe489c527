"""What a decoder-only model is, as plain data: enough to build its graphs and to allocate its cache.

Every reader (a Hugging Face config, GGUF metadata, a bundle.json) ends in one :class:`ModelSpec`; nothing after it
looks at a foreign config again. Standard library only.

Dimensions are spelled the same everywhere, here, in comments and in ONNX symbolic dims::

    batch     sequences decoded together        hidden    width of the residual stream
    seq       positions fed by this run         heads     query heads
    past      positions already in the cache    kv_heads  key/value heads
    total     past + seq                        head_dim  width of one head
    capacity  positions a cache buffer holds    rows      trailing positions the head is evaluated on
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from shortstack.graphs.errors import BundleError
from shortstack.graphs.kv_map import identity_kv_map, looks_up, validate_kv_map

DType = Literal["float32", "float16"]
HEAD_DIM_MULTIPLE = 16  # GroupQueryAttention with rotary embedding (onnxruntime 1.32)
RopeKind = Literal["default", "linear", "llama3", "factors"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
        kind: ``default`` (none), ``linear`` (positions divided by ``factor``), ``llama3`` (the smooth by-wavelength
            rule of Llama 3.1/3.2), ``factors`` (one divisor per frequency, read from the checkpoint: GGUF's
            ``rope_freqs.weight``).
        factor: Divisor of the low frequencies.
        low_freq_factor: ``llama3``: wavelengths above ``original_max_position_embeddings / low_freq_factor`` are
            divided.
        high_freq_factor: ``llama3``: wavelengths below ``original_max_position_embeddings / high_freq_factor`` are
            kept.
        original_max_position_embeddings: ``llama3``: the context length before stretching, in tokens.
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only model of the Llama shape: pre-norm blocks of attention and gated MLP.

    Attributes:
        model_type: The family, as in ``config.json``; names the file in ``export/arch/``.
        num_hidden_layers: L.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads; divides ``num_attention_heads``.
        head_dim: Width of one head; not always ``hidden_size / num_attention_heads``.
        vocab_size: Rows of the embedding and of the LM head.
        rms_norm_eps: Epsilon of every RMS norm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How they are stretched.
        max_position_embeddings: The longest context the model was made for, in tokens.
        tie_word_embeddings: The LM head is the embedding.
        qkv_bias: The q, k and v projections have a bias.
        attention_out_bias: The o projection has a bias.
        mlp_bias: The gate, up and down projections have a bias.
        kv_map: Which layer's K,V each layer uses; producers map to themselves. Length L.
        windows: How many positions each layer sees, its own included; 0 is all. Length L; empty where no layer has one.
        masks_diagonal: No layer sees its own position, as in LCKV's released checkpoints; otherwise only those that use
            the K,V of a layer above them do not.
    """

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
    rope_scaling: RopeScaling = RopeScaling()
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    kv_map: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    masks_diagonal: bool = False

    def __post_init__(self) -> None:
        if not self.kv_map:
            object.__setattr__(self, "kv_map", identity_kv_map(self.num_hidden_layers))
        validate_kv_map(self.kv_map, self.num_hidden_layers)
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_hidden_layers} layers")
        if any(type(window) is not int or window < 0 for window in self.windows):
            raise ValueError(f"windows {list(self.windows)} are not all 0 or more")
        if not any(self.windows):
            object.__setattr__(self, "windows", ())

    def window(self, layer: int) -> int:
        """Return how many positions a layer sees, its own included; 0 is all."""
        return self.windows[layer] if self.windows else 0

    def sees_itself(self, layer: int) -> bool:
        """Return whether a layer sees its own position."""
        return not (self.masks_diagonal or looks_up(self.kv_map, layer))

    @property
    def cache_head_dim(self) -> int:
        """Width of one head in the graphs and in the cache: ``head_dim`` rounded up to what the attention kernel takes.

        The extra columns of q, k, v and rows of o are zero, so they change neither scores nor outputs.
        """
        return -(-self.head_dim // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON-ready data; rare fields are left out where they have their defaults."""
        data = asdict(self)
        data["kv_map"] = list(self.kv_map)
        data["windows"] = list(self.windows)
        return {name: value for name, value in data.items() if value or name not in _RARE}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> ModelSpec:
        """Rebuild a spec that :meth:`to_json` wrote.

        Args:
            data: The parsed JSON object.
            where: File and field, for messages.

        Raises:
            BundleError: A field is missing, unknown or of another type.
        """
        known = {f.name: f for f in fields(cls)}
        missing = sorted(known.keys() - data.keys() - _RARE)
        extra = sorted(data.keys() - known.keys())
        if missing or extra:
            raise BundleError(
                f"{where} does not describe a model (missing: {', '.join(missing) or 'none'}; "
                f"unknown: {', '.join(extra) or 'none'})",
                remedy="re-export the bundle with this version of shortstack",
            )
        for name, value in data.items():
            expected = _JSON_TYPES[str(known[name].type).split("[")[0]]
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                raise _unusable(f"{where}.{name}", repr(value), str(known[name].type))
            if isinstance(value, int) and expected is int and value < 1:
                raise _unusable(f"{where}.{name}", value, "1 or more")
        if len(data["kv_map"]) != data["num_hidden_layers"]:
            found, depth = f"{len(data['kv_map'])} entries", data["num_hidden_layers"]
            raise _unusable(f"{where}.kv_map", found, f"num_hidden_layers = {depth}")
        for name in ("kv_map", "windows"):
            if not all(type(layer) is int for layer in data.get(name, ())):
                raise _unusable(f"{where}.{name}", data[name], "one integer per layer")
        try:
            scaling = RopeScaling(**data["rope_scaling"])
        except TypeError as error:
            raise _unusable(f"{where}.rope_scaling: {error}") from None
        try:
            maps: dict[str, Any] = {name: tuple(data[name]) for name in ("kv_map", "windows") if name in data}
            return cls(**{**data, "rope_scaling": scaling, **maps})
        except ValueError as error:
            raise _unusable(f"{where}.kv_map or .windows: {error}") from None


def _unusable(what: str, found: object = None, expected: object = None) -> BundleError:
    """Return the error about a field with a value that export never writes."""
    return BundleError(what, found=found, expected=expected, remedy="restore bundle.json or re-export the bundle")


_RARE = {"windows", "masks_diagonal"}
_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "RopeScaling": dict,
    "tuple": list,
}
