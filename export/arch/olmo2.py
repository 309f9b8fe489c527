"""OLMo 2 and OLMo 3: norms after the branches alone, and norms of all queries and of all keys.

Layers of OLMo 3 slide but for each fourth, and full layers alone stretch their rotary embedding.
https://arxiv.org/abs/2501.00656
"""

from __future__ import annotations

from dataclasses import replace

from shortstack.export.arch.family import POST_NORMS, Family, Key, llama_sources
from shortstack.export.arch.layer_types import every
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="olmo2",
    transformers_class="Olmo2ForCausalLM",
    sources=llama_sources(
        {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
    ),
    norms=POST_NORMS,
    norm_eps=Key("rms_norm_eps", 1e-5),
    qk_norm="width",
)
OLMO3 = replace(
    FAMILY,
    model_type="olmo3",
    transformers_class="Olmo3ForCausalLM",
    rope_theta=500_000.0,
    local_rope=500_000.0,
    layer_types=every(4, key=None),
    window=Key("sliding_window", 4096),
)

ARCH = architecture(FAMILY)
OLMO3_ARCH = architecture(OLMO3)
