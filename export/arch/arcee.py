"""Arcee (AFM): Llama with a plain MLP of squared ReLUs.

https://huggingface.co/arcee-ai/AFM-4.5B
"""

from __future__ import annotations

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="arcee",
    transformers_class="ArceeForCausalLM",
    sources=llama_sources(),
    norm_eps=Key("rms_norm_eps", 1e-5),
    context=Key("max_position_embeddings", 4096),
    activation=Key("hidden_act", "relu2"),
    activations=("relu2",),
    is_gated=False,
    mlp_bias=Key("mlp_bias", False),
)

ARCH = architecture(FAMILY)
