"""Llama: Llama 2, 3, 3.1 and 3.2, SmolLM and SmolLM2, TinyLlama, and LayerSkip's checkpoints of them.

The fields and their defaults are those of ``transformers.LlamaConfig``. https://arxiv.org/abs/2307.09288 describes the
model. Layers may share keys and values and have windows, see :mod:`shortstack.export.arch.kv_sharing`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shortstack.export.arch.architecture import Architecture
from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.kv_sharing import read_sharing, sharing_config
from shortstack.export.arch.make_family import architecture
from shortstack.export.arch.read_family import read_family
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.kv_map import identity_kv_map
from shortstack.graphs.spec import ModelSpec


def _with_out_bias(config: Config, spec: ModelSpec) -> ModelSpec:
    """Read a bias of o alone, which only our GGUF reader tells apart from the others."""
    first = spec.layers[0].attention
    has_bias = config.read(bool, "attention_out_bias", first.qkv_bias)
    layers = (replace(layer, attention=replace(layer.attention, out_bias=has_bias)) for layer in spec.layers)
    return replace(spec, layers=tuple(layers))


def _with_sharing(config: Config, spec: ModelSpec) -> ModelSpec:
    spec = _with_out_bias(config, spec)
    return read_sharing(config, spec).of(spec)


def _extra_config(spec: ModelSpec) -> dict[str, Any]:
    attention = spec.layers[0].attention
    own = {} if attention.out_bias == attention.qkv_bias else {"attention_out_bias": attention.out_bias}
    return {"attention_bias": attention.qkv_bias, **own, **sharing_config(spec)}


def is_plain(spec: ModelSpec) -> bool:
    """Whether no layer shares keys and values or has a window, which transformers' Llama does not know."""
    return spec.kv_map == identity_kv_map(spec.num_hidden_layers) and not spec.windows and not spec.masks_diagonal


FAMILY = Family(
    model_type="llama",
    transformers_class="LlamaForCausalLM",
    sources=llama_sources(),
    mlp_bias=Key("mlp_bias", False),
    reads_sharing=True,
    extend=_with_sharing,
    extra_config=_extra_config,
    is_in_transformers=is_plain,
)


def read_stack(config: Config) -> ModelSpec:
    """Read all but the sharing and the windows, which related families spell differently; errors as in read_family."""
    return read_family(replace(FAMILY, extend=_with_out_bias), config)


ARCH: Architecture = architecture(FAMILY)
read_spec = ARCH.read_spec
