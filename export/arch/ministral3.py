"""Ministral 3: Mistral whose queries grow with their position, beyond the context that it was first trained on.

How they grow stands in the object of the rotary embedding, ``llama_4_scaling_beta``. Released folders also read
pictures (``mistral3``); the text of such a folder may be a Mistral, too. https://arxiv.org/abs/2601.08584
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shortstack.export.arch import mistral
from shortstack.export.arch.family import Key
from shortstack.export.arch.layer_types import all_slide
from shortstack.export.arch.make_family import architecture
from shortstack.export.arch.rope_config import ORIGINAL_LENGTH, rope_section
from shortstack.export.arch.text_part import text_part
from shortstack.export.arch.write_family import write_family
from shortstack.export.checkpoint.config import Config, positive
from shortstack.graphs.layer_spec import QueryScale
from shortstack.graphs.spec import ModelSpec

_BETA = "llama_4_scaling_beta"
_ROPE: dict[str, Any] = {  # of a config that says nothing about it
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    ORIGINAL_LENGTH: 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    _BETA: 0.1,
}


def _extend(config: Config, spec: ModelSpec) -> ModelSpec:
    section = rope_section(config, _ROPE)
    assert section is not None
    beta = section.read(float, _BETA)
    if beta < 0:
        raise section.wrong(_BETA, "a number of at least 0")
    original = spec.ropes[0].scaling.original_max_position_embeddings or positive(section, ORIGINAL_LENGTH)
    scale = QueryScale(beta, original)
    layers = (replace(layer, attention=replace(layer.attention, query_scale=scale)) for layer in spec.layers)
    return replace(spec, layers=tuple(layers))


FAMILY = replace(
    mistral.FAMILY,
    model_type="ministral3",
    transformers_class="Ministral3ForCausalLM",
    head_dim=Key("head_dim", 128),
    context=Key("max_position_embeddings", 262_144),
    norm_eps=Key("rms_norm_eps", 1e-5),
    layer_types=all_slide(None, is_listed=False),
    window=Key("sliding_window", None),
    rope_parameters=_ROPE,
    extend=_extend,
)


def _write_config(spec: ModelSpec) -> dict[str, Any]:
    config = write_family(FAMILY, spec)
    del config["layer_types"]  # not read by transformers
    scale = spec.layers[0].attention.query_scale
    assert scale is not None
    config["rope_parameters"] |= {_BETA: scale.beta, ORIGINAL_LENGTH: scale.original}
    return config


ARCH = architecture(FAMILY, _write_config)
WHOLE_ARCH = text_part("mistral3", mistral.ARCH, ARCH)
