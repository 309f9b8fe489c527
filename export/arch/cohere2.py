"""Command R7B and Command A (Cohere 2): attention and MLP side by side behind one norm.

Sliding layers rotate neighbouring columns; full layers have no rotary embedding.
https://huggingface.co/CohereLabs/c4ai-command-r7b-12-2024
"""

from __future__ import annotations

from shortstack.export.arch.family import SLIDING, Family, Key, llama_sources
from shortstack.export.arch.layer_types import every
from shortstack.export.arch.make_family import architecture
from shortstack.export.checkpoint.config import Config


def _has_rope(config: Config, types: tuple[str, ...]) -> tuple[bool, ...]:
    return tuple(kind == SLIDING for kind in types)


FAMILY = Family(
    model_type="cohere2",
    transformers_class="Cohere2ForCausalLM",
    sources=llama_sources(),
    norms=("before_attention",),
    norm_kind="layer",
    norm_eps=Key("layer_norm_eps", 1e-5),
    is_parallel=True,
    context=Key("max_position_embeddings", 8192),
    tied=Key("tie_word_embeddings", True),
    rope_pairs="neighbours",
    logit_scale=Key("logit_scale", 0.0625),
    layer_types=every(4),
    has_rope=_has_rope,
    window=Key("sliding_window", 4096),
)

ARCH = architecture(FAMILY)
