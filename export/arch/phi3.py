"""Phi-3, Phi-3.5 and Phi-4-mini: Llama with stacked projections.

https://arxiv.org/abs/2404.14219
"""

from __future__ import annotations

from types import MappingProxyType

from shortstack.export.arch.architecture import Source
from shortstack.export.arch.family import LAYER, Family, Key, llama_sources
from shortstack.export.arch.layer_types import all_slide
from shortstack.export.arch.make_family import architecture

_QKV = Source(f"{LAYER}.self_attn.qkv_proj.weight", stacked=("q_proj", "k_proj", "v_proj"))
_GATE_UP = Source(f"{LAYER}.mlp.gate_up_proj.weight", stacked=("gate_proj", "up_proj"))

FAMILY = Family(
    model_type="phi3",
    transformers_class="Phi3ForCausalLM",
    sources={
        **llama_sources(),
        **dict.fromkeys(("q_proj.weight", "k_proj.weight", "v_proj.weight"), _QKV),
        **dict.fromkeys(("gate_proj.weight", "up_proj.weight"), _GATE_UP),
    },
    norm_eps=Key("rms_norm_eps", 1e-5),
    context=Key("max_position_embeddings", 4096),
    qkv_bias=False,
    out_bias=False,
    rope_share=Key("partial_rotary_factor", 1.0),
    original_context=4096,
    rope_same_as=MappingProxyType({"yarn": "longrope"}),
    layer_types=all_slide(None, is_listed=False),
    has_null_window=True,
)

ARCH = architecture(FAMILY)
