"""The config of a model that LCKV has released."""

from __future__ import annotations

from typing import Any

TINYLLAMA_LCKV_W10: dict[str, Any] = {
    "architectures": ["LCKVLlamaForCausalLM"],
    "attention_bias": False,
    "backward_passes": 2,
    "force_nodiag": True,
    "forward_passes": 7,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "layer_types": "0_1_2_3_4_16_16_16_16_16_16_16_16_16_16_16_16_17_18_19_20_21",
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "lckv-llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sequential": False,
    "vocab_size": 32000,
}
"""The fields of ``config.json`` of https://huggingface.co/whynlp/tinyllama-lckv-w10-100b."""
