"""Granite 3: Llama with four multipliers.

https://huggingface.co/ibm-granite
"""

from __future__ import annotations

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="granite",
    transformers_class="GraniteForCausalLM",
    sources=llama_sources(),
    mlp_bias=Key("mlp_bias", False),
    scale=Key("attention_multiplier", 1.0),
    residual_scale=Key("residual_multiplier", 1.0),
    embed_scale=Key("embedding_multiplier", 1.0),
    logit_scale=Key("logits_scaling", 1.0),
    divides_logits=True,
)

ARCH = architecture(FAMILY)
