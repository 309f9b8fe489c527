"""EXAONE 4: norms after the branches, normalised queries and keys; full layers have no rotary embedding.

Where the config has no window, all layers see everything and all have one. https://arxiv.org/abs/2507.11407
"""

from __future__ import annotations

from typing import Any

from shortstack.export.arch.family import FULL, POST_NORMS, SLIDING, Family, Key, llama_sources
from shortstack.export.arch.layer_types import listed
from shortstack.export.arch.make_family import architecture
from shortstack.export.checkpoint.config import Config, positive
from shortstack.graphs.spec import ModelSpec


def _layer_types(config: Config, layers: int) -> tuple[str, ...]:
    if "layer_types" in config:
        return listed(config, layers)
    if config.data.get("sliding_window", 4096) is None:
        return (FULL,) * layers
    pattern = config.data.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:  # local and global, repeated
        return tuple(SLIDING if pattern[layer % len(pattern)] == "L" else FULL for layer in range(layers))
    period = positive(config, "sliding_window_pattern", 4)
    return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))


def _has_rope(config: Config, types: tuple[str, ...]) -> tuple[bool, ...]:
    has_window = config.data.get("sliding_window", 4096) is not None
    return tuple(kind == SLIDING or not has_window for kind in types)


def _window(spec: ModelSpec) -> dict[str, Any]:
    """Return a window where no layer has one and none a rotary embedding: without it, all would have one."""
    has_rope = any(layer.attention.rope is not None for layer in spec.layers)
    return {} if has_rope or spec.windows else {"sliding_window": FAMILY.window.default}


FAMILY = Family(
    model_type="exaone4",
    transformers_class="Exaone4ForCausalLM",
    sources=llama_sources(
        {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
    ),
    norms=POST_NORMS,
    norm_eps=Key("rms_norm_eps", 1e-5),
    kv_heads=Key("num_key_value_heads", 32),
    qk_norm="head",
    qkv_bias=False,
    out_bias=False,
    layer_types=_layer_types,
    has_rope=_has_rope,
    extra_config=_window,
    window=Key("sliding_window", 4096),
    has_null_window=True,
)

ARCH = architecture(FAMILY)
