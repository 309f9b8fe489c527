"""SmolLM3: Llama in which every fourth layer has no rotary embedding.

https://huggingface.co/blog/smollm3
"""

from __future__ import annotations

from typing import Any

from shortstack.export.arch.family import FULL, SLIDING, Family, Key, llama_sources
from shortstack.export.arch.layer_types import listed
from shortstack.export.arch.make_family import architecture
from shortstack.export.checkpoint.config import Config, positive
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.spec import ModelSpec


def _has_rope(config: Config, types: tuple[str, ...]) -> tuple[bool, ...]:
    if "no_rope_layers" not in config:
        period = positive(config, "no_rope_layer_interval", 4)
        return tuple((layer + 1) % period != 0 for layer in range(len(types)))
    marks = config.read_ints("no_rope_layers")  # 1 says that the layer has one
    if len(marks) != len(types):
        where = config.where("no_rope_layers")
        raise CheckpointError(where, found=f"{len(marks)} entries", expected=f"num_hidden_layers = {len(types)}")
    return tuple(map(bool, marks))


def _layer_types(config: Config, layers: int) -> tuple[str, ...]:
    if "layer_types" in config:
        return listed(config, layers)
    if not config.read(bool, "use_sliding_window", False) or config.data.get("sliding_window") is None:
        return (FULL,) * layers
    return tuple(FULL if rotates else SLIDING for rotates in _has_rope(config, (FULL,) * layers))


def _no_rope_layers(spec: ModelSpec) -> dict[str, Any]:
    return {"no_rope_layers": [int(layer.attention.rope is not None) for layer in spec.layers]}


FAMILY = Family(
    model_type="smollm3",
    transformers_class="SmolLM3ForCausalLM",
    sources=llama_sources(),
    kv_heads=Key("num_key_value_heads", 4),
    context=Key("max_position_embeddings", 32768),
    tied=Key("tie_word_embeddings", True),
    mlp_bias=Key("mlp_bias", False),
    rope_theta=2_000_000.0,
    layer_types=_layer_types,
    has_rope=_has_rope,
    window_switch="use_sliding_window",
    extra_config=_no_rope_layers,
)

ARCH = architecture(FAMILY)
