"""GPT-NeoX and Pythia: attention and MLP side by side.

https://arxiv.org/abs/2204.06745, 2304.01373
"""

from __future__ import annotations

from shortstack.export.arch.architecture import Source
from shortstack.export.arch.family import KINDS, Family, Key
from shortstack.export.arch.make_family import architecture

_BLOCK = "gpt_neox.layers.{layer}"
_MODULES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "o_proj": "attention.dense",
    "up_proj": "mlp.dense_h_to_4h",
    "down_proj": "mlp.dense_4h_to_h",
}
_STACKED = ("q_proj", "k_proj", "v_proj")

FAMILY = Family(
    model_type="gpt_neox",
    transformers_class="GPTNeoXForCausalLM",
    sources={
        "embed_tokens.weight": Source("gpt_neox.embed_in.weight"),
        "final_norm.weight": Source("gpt_neox.final_layer_norm.weight"),
        "final_norm.bias": Source("gpt_neox.final_layer_norm.bias"),
        "lm_head.weight": Source("embed_out.weight"),
        **{f"{role}.{kind}": Source(f"{_BLOCK}.{name}.{kind}") for role, name in _MODULES.items() for kind in KINDS},
        **{
            f"{role}.{kind}": Source(f"{_BLOCK}.attention.query_key_value.{kind}", stacked=_STACKED, by_head=True)
            for role in _STACKED
            for kind in KINDS
        },
    },
    kv_heads=None,
    head_dim=None,
    norm_kind="layer",
    norm_bias=True,
    norm_eps=Key("layer_norm_eps", 1e-5),
    is_parallel=Key("use_parallel_residual", True),
    activation=Key("hidden_act", "gelu"),
    activations=("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    is_gated=False,
    qkv_bias=Key("attention_bias", True),
    out_bias=Key("attention_bias", True),
    mlp_bias=True,
    theta_key="rotary_emb_base",
    rope_share=Key("rotary_pct", 0.25),
)

ARCH = architecture(FAMILY)
