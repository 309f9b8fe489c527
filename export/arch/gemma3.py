"""Gemma 3: Gemma 2 with normalised queries and keys and without caps; sliding layers have a rotary base of their own.

Folders of the larger models also read pictures; most of their ``text_config`` is left to the defaults of transformers'
class. transformers' model does not read ``attn_logit_softcapping``. https://arxiv.org/abs/2503.19786
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shortstack.export.arch import gemma2
from shortstack.export.arch.family import Key
from shortstack.export.arch.layer_types import every
from shortstack.export.arch.make_family import architecture
from shortstack.export.arch.text_part import text_part

FAMILY = replace(
    gemma2.FAMILY,
    model_type="gemma3_text",
    transformers_class="Gemma3ForCausalLM",
    context=Key("max_position_embeddings", 131072),
    qk_norm="head",
    softcap=0.0,
    logit_softcap=Key("final_logit_softcapping", None),
    rope_theta=1_000_000.0,
    local_rope=Key("rope_local_base_freq", 10000.0),
    layer_types=every(6),
)

ARCH = architecture(FAMILY)
DEFAULT_SIZES: dict[str, Any] = {
    "num_layers": Key("num_hidden_layers", 26),
    "hidden": Key("hidden_size", 2304),
    "inner": Key("intermediate_size", 9216),
    "heads": Key("num_attention_heads", 8),
    "vocab": Key("vocab_size", 262_208),
}
"""Those that the config of a text within a whole may leave out."""
WHOLE_ARCH = text_part("gemma3", architecture(replace(FAMILY, **DEFAULT_SIZES)))
