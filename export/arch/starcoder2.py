"""StarCoder2: Llama with layer norms, a plain MLP and biases.

https://arxiv.org/abs/2402.19173
"""

from __future__ import annotations

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.layer_types import all_slide
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="starcoder2",
    transformers_class="Starcoder2ForCausalLM",
    sources=llama_sources({"up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}),
    kv_heads=Key("num_key_value_heads", 2),
    context=Key("max_position_embeddings", 4096),
    tied=Key("tie_word_embeddings", True),
    norm_kind="layer",
    norm_bias=True,
    norm_eps=Key("norm_epsilon", 1e-5),
    activation=Key("hidden_act", "gelu_pytorch_tanh"),
    activations=("gelu_pytorch_tanh", "gelu"),
    is_gated=False,
    qkv_bias=Key("use_bias", True),
    out_bias=Key("use_bias", True),
    mlp_bias=Key("use_bias", True),
    layer_types=all_slide(None, is_listed=False),
    has_null_window=True,
)

ARCH = architecture(FAMILY)
