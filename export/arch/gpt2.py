"""GPT-2: layer norms, learned positions, no rotary embedding, projections stored as [in, out].

https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""

from __future__ import annotations

from shortstack.export.arch.architecture import Source
from shortstack.export.arch.family import KINDS, Family, Key
from shortstack.export.arch.make_family import architecture
from shortstack.export.checkpoint.config import Config

_BLOCK = "transformer.h.{layer}"
_STACKED = ("q_proj", "k_proj", "v_proj")
_MODULES = {"o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}
_NORMS = {"input_norm": "ln_1", "post_attention_norm": "ln_2"}


def _no_rope(config: Config, types: tuple[str, ...]) -> tuple[bool, ...]:
    return (False,) * len(types)


FAMILY = Family(
    model_type="gpt2",
    transformers_class="GPT2LMHeadModel",
    sources={
        "embed_tokens.weight": Source("transformer.wte.weight"),
        "embed_positions.weight": Source("transformer.wpe.weight"),
        "lm_head.weight": Source("lm_head.weight"),
        **{f"final_norm.{kind}": Source(f"transformer.ln_f.{kind}") for kind in KINDS},
        **{f"{role}.{kind}": Source(f"{_BLOCK}.{name}.{kind}") for role, name in _NORMS.items() for kind in KINDS},
        **{
            f"{role}.{kind}": Source(f"{_BLOCK}.{name}.{kind}", transposed=kind == "weight")
            for role, name in _MODULES.items()
            for kind in KINDS
        },
        **{
            f"{role}.{kind}": Source(f"{_BLOCK}.attn.c_attn.{kind}", stacked=_STACKED, transposed=kind == "weight")
            for role in _STACKED
            for kind in KINDS
        },
    },
    prefixes=("transformer.", ""),
    num_layers=Key("n_layer", 12),
    hidden=Key("n_embd", 768),
    inner=Key("n_inner", None),
    heads=Key("n_head", 12),
    kv_heads=None,
    head_dim=None,
    vocab=Key("vocab_size", 50257),
    context=Key("n_positions", 1024),
    tied=Key("tie_word_embeddings", True),
    norm_kind="layer",
    norm_bias=True,
    norm_eps=Key("layer_norm_epsilon", 1e-5),
    activation=Key("activation_function", "gelu_new"),
    activations=("gelu_new", "gelu_pytorch_tanh", "gelu", "silu"),
    is_gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    has_rope=_no_rope,
    learns_positions=True,
    neutral={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
)

ARCH = architecture(FAMILY)
