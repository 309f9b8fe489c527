"""Mistral and Ministral: Llama whose layers all slide, unless the config says that there is no window.

A config without ``sliding_window`` has one of 4096 positions, the default of its class in transformers; those of
Mistral 0.2 and later say null. https://arxiv.org/abs/2310.06825
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.layer_types import all_slide
from shortstack.export.arch.make_family import architecture
from shortstack.export.arch.write_family import write_family
from shortstack.graphs.spec import ModelSpec

FAMILY = Family(
    model_type="mistral",
    transformers_class="MistralForCausalLM",
    sources=llama_sources(),
    kv_heads=Key("num_key_value_heads", 8),
    context=Key("max_position_embeddings", 131072),
    qkv_bias=False,
    out_bias=False,
    layer_types=all_slide(4096),
    window=Key("sliding_window", 4096),
    has_null_window=True,
)


def _write_config(spec: ModelSpec) -> dict[str, Any]:
    """Leave out layers of one type, which the window says: transformers takes a Mistral that lists them for another.

    That other one, Ministral, cannot do without a window.
    """
    config = write_family(FAMILY, spec)
    if len(set(config["layer_types"])) == 1:
        del config["layer_types"]
    return config


ARCH = architecture(FAMILY, _write_config)
MINISTRAL_ARCH = architecture(
    replace(FAMILY, model_type="ministral", transformers_class="MinistralForCausalLM", has_null_window=False)
)
