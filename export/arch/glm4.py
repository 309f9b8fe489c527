"""GLM-4: norms before and after each branch, neighbouring columns rotated in half of each head.

https://arxiv.org/abs/2406.12793
"""

from __future__ import annotations

from shortstack.export.arch.architecture import Source
from shortstack.export.arch.family import LAYER, POST_NORMS, PRE_NORMS, Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture

_GATE_UP = Source(f"{LAYER}.mlp.gate_up_proj.weight", stacked=("gate_proj", "up_proj"))

FAMILY = Family(
    model_type="glm4",
    transformers_class="Glm4ForCausalLM",
    sources={
        **llama_sources({"attention_out_norm": "post_self_attn_layernorm", "mlp_out_norm": "post_mlp_layernorm"}),
        **dict.fromkeys(("gate_proj.weight", "up_proj.weight"), _GATE_UP),
    },
    norms=(*PRE_NORMS, *POST_NORMS),
    norm_eps=Key("rms_norm_eps", 0.00000015625),
    kv_heads=Key("num_key_value_heads", 2),
    head_dim=Key("head_dim", 128),
    context=Key("max_position_embeddings", 131072),
    qkv_bias=Key("attention_bias", True),
    out_bias=False,
    rope_share=Key("partial_rotary_factor", 0.5),
    rope_pairs="neighbours",
)

ARCH = architecture(FAMILY)
