"""Gemma 2: norms before and after each branch, soft caps, scaled embeddings.

A norm multiplies by 1 + weight. Gemma 1 has no norms after the branches, and neither windows nor caps.
https://arxiv.org/abs/2408.00118
"""

from __future__ import annotations

from shortstack.export.arch.family import POST_NORMS, PRE_NORMS, Family, Key, llama_sources
from shortstack.export.arch.layer_types import every
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="gemma2",
    transformers_class="Gemma2ForCausalLM",
    sources=llama_sources(
        {
            "attention_out_norm": "post_attention_layernorm",
            "post_attention_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        },
        plus=1.0,
    ),
    norms=(*PRE_NORMS, *POST_NORMS),
    kv_heads=Key("num_key_value_heads", 4),
    head_dim=Key("head_dim", 256),
    context=Key("max_position_embeddings", 8192),
    tied=Key("tie_word_embeddings", True),
    activation=Key("hidden_activation", "gelu_pytorch_tanh"),
    activations=("gelu_pytorch_tanh",),
    scale_base=Key("query_pre_attn_scalar", 256),
    softcap=Key("attn_logit_softcapping", 50.0),
    logit_softcap=Key("final_logit_softcapping", 30.0),
    embed_scale="root",
    layer_types=every(2, key=None),
    window=Key("sliding_window", 4096),
)

ARCH = architecture(FAMILY)
