"""Tiny random models of every family, one row each."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, CONTEXT = 300, 48
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "vocab_size": VOCAB,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPT2_SIZES = {"n_embd": 64, "n_inner": 96, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT}
_NOT_OF_GPT2 = _SIZES.keys() - {"vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}


@dataclass(frozen=True)
class FamilyRow:
    """One tiny model.

    Attributes:
        model_type: Its family.
        name: What people call the models of the family.
        fields: Fields of its config; those of ``_SIZES`` besides.
        mlp_exits: Its layers have a norm before the MLP, which exits of the kind ``mlp`` share.
        same_as: The family in transformers whose model it is, where transformers has none of its own.
        unread: Tensors of its checkpoints that are left out, by name, and their shapes.
    """

    model_type: str
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    mlp_exits: bool = True
    same_as: str = ""
    unread: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def config(self) -> Any:
        """Return the config, of transformers' class."""
        fields = {**_SIZES, **self.fields}
        if self.model_type == "gpt2":
            fields = {name: value for name, value in fields.items() if name not in _NOT_OF_GPT2} | _GPT2_SIZES
        if self.model_type == "gpt_neox":
            del fields["num_key_value_heads"]
        return CONFIG_MAPPING[self.same_as or self.model_type](**fields)

    def model(self) -> Any:
        """Return transformers' model with random weights, norms and biases included."""
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(repr(self).encode()))
            model = AutoModelForCausalLM.from_config(self.config()).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(0.0, 0.2)
                    elif "norm" in name or "ln_" in name or "layer_scalar" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.2)
        return model


_SLIDES = {"sliding_window": 6}
_GROWS = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
_GEMMA4 = {
    "head_dim": 32,
    "global_head_dim": 48,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 24,
    "vocab_size_per_layer_input": VOCAB,
    "final_logit_softcapping": 3.0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
    **_SLIDES,
}
ROWS: tuple[FamilyRow, ...] = (
    FamilyRow("llama", "Llama 2, 3.x, SmolLM2, TinyLlama", {"head_dim": 16}),
    FamilyRow("qwen2", "Qwen2, Qwen2.5"),
    FamilyRow("qwen3", "Qwen3", {"head_dim": 24}),
    FamilyRow("mistral", "Mistral", {"head_dim": 32, **_SLIDES}),
    FamilyRow("ministral", "Ministral", {"head_dim": 16, **_SLIDES}),
    FamilyRow("ministral3", "Ministral 3", {"head_dim": 16, "rope_parameters": _GROWS}),
    FamilyRow("gemma", "Gemma", {"head_dim": 32}),
    FamilyRow(
        "gemma2", "Gemma 2",
        {"head_dim": 32, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
         **_SLIDES},
    ),
    FamilyRow(
        "gemma3_text", "Gemma 3", {"head_dim": 32, "query_pre_attn_scalar": 24, "num_hidden_layers": 7, **_SLIDES}
    ),
    FamilyRow("gemma4_text", "Gemma 4 E2B, E4B", {**_GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    FamilyRow(
        "gemma4_text", "Gemma 4 12B, 31B",
        {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    ),
    FamilyRow(
        "phi3", "Phi-3, Phi-3.5, Phi-4-mini",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}, **_SLIDES},
    ),
    FamilyRow("smollm3", "SmolLM3", {"num_hidden_layers": 5}),
    FamilyRow("olmo2", "OLMo 2", mlp_exits=False),
    FamilyRow("olmo3", "OLMo 3", {"num_hidden_layers": 5, **_SLIDES}, mlp_exits=False),
    FamilyRow(
        "granite", "Granite 3",
        {"embedding_multiplier": 2.5, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 0.5},
    ),
    FamilyRow("gpt2", "GPT-2"),
    FamilyRow("gpt_neox", "GPT-NeoX, Pythia", {"hidden_act": "gelu"}, mlp_exits=False),
    FamilyRow("starcoder2", "StarCoder2", _SLIDES),
    FamilyRow("stablelm", "StableLM 2"),
    FamilyRow("stablelm", "StableLM, parallel", {"use_parallel_residual": True}, mlp_exits=False),
    FamilyRow("stablelm", "StableLM, norms of heads", {"qk_layernorm": True, "num_attention_heads": 8}),
    FamilyRow("cohere2", "Command R7B", {"num_hidden_layers": 5, "logit_scale": 1.5, **_SLIDES}, mlp_exits=False),
    FamilyRow("exaone4", "EXAONE 4", {"num_hidden_layers": 5, "sliding_window_pattern": 4, **_SLIDES}, mlp_exits=False),
    FamilyRow("glm4", "GLM-4", {"head_dim": 32}),
    FamilyRow("arcee", "Arcee AFM", {"head_dim": 16}),
    FamilyRow("seed_oss", "Seed-OSS", {"head_dim": 32}),
    FamilyRow("ernie4_5", "ERNIE 4.5", {"head_dim": 32}),
    FamilyRow("helium", "Helium", {"head_dim": 16}),
    FamilyRow(
        "hunyuan_v1_dense", "HunYuan, dense",
        {"head_dim": 24, "rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0, "rope_theta": 1e4}},
    ),
    FamilyRow(
        "mimo", "MiMo", same_as="qwen2",
        unread={"model.mtp_layers.0.input_proj.weight": (64, 128), "model.mtp_layers.0.final_layernorm.weight": (64,)},
    ),
)  # fmt: skip
