"""Tiny models of every architecture that the GGUF reader knows: one row each, and more where files can differ."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from helpers.tiny_models import write_tokenizer

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, CONTEXT = 64, 96, 4, 2, 104, 64
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class GgufCase:
    """A tiny model.

    Attributes:
        name: What is special about it; also seeds its weights.
        architecture: llama.cpp's name.
        model: The class in transformers, without ``ForCausalLM``.
        options: Of its config.
        config: The class of its config, if it is not named after the model.
        in_transformers: transformers reads its GGUF files, too: where GPT-2 has 1024 positions and Qwen3 heads of 128.
        is_exact: The file says all that the folder says, the scaling of the rotary embedding included.
    """

    name: str
    architecture: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    in_transformers: bool = False
    is_exact: bool = True

    @property
    def config_class(self) -> Any:
        """The class of its config."""
        return getattr(transformers, self.config or f"{self.model}Config")

    def save(self, folder: Path) -> Path:
        """Write the model with random weights, and a tokenizer."""
        config = self.config_class(**self._sizes(), **self.options)
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.name.encode()))
            head = "LMHeadModel" if self.model == "GPT2" else "ForCausalLM"
            model = getattr(transformers, f"{self.model}{head}")(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 1:
                        centre = 0.0 if name.endswith("bias") or "Gemma" in self.model else 1.0
                        parameter.uniform_(centre - 0.5, centre + 0.5)
                    else:
                        parameter.normal_(0.0, 0.3)
                for name, buffer in model.named_buffers():
                    if name.endswith("layer_scalar"):
                        buffer.uniform_(0.5, 1.5)
        model.save_pretrained(folder)
        write_tokenizer(folder, VOCAB)
        return folder

    def _sizes(self) -> dict[str, Any]:
        if self.model == "GPT2":
            sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": CONTEXT}
        else:
            sizes = {
                "hidden_size": HIDDEN,
                "intermediate_size": INNER,
                "num_hidden_layers": 2,
                "num_attention_heads": HEADS,
                "max_position_embeddings": CONTEXT,
            }
        if self.model not in ("GPT2", "GPTNeoX"):
            sizes["num_key_value_heads"] = KV_HEADS
        chosen = {**sizes, "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return {key: value for key, value in chosen.items() if key not in self.options}


def _rope(kind: str = "default", theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **fields}


def _types(count: int, period: int) -> list[str]:
    return [SLIDING if (layer + 1) % period else FULL for layer in range(count)]


_SHORT, _LONG = [1.0 + 0.05 * i for i in range(8)], [1.5 + i for i in range(8)]
_LONGROPE = _rope("longrope", short_factor=_SHORT, long_factor=_LONG)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0)
_GROWS = {"original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 0.5}
_LLAMA3 = _rope(
    "llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_hidden_layers": 5,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
    "sliding_window": 8,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCAB + 4,
    "rope_parameters": {SLIDING: _rope(), FULL: _rope("proportional", 1e6, partial_rotary_factor=0.25)},
}
_UNTIED = {"tie_word_embeddings": False}

CASES: tuple[GgufCase, ...] = (
    GgufCase("llama", "llama", "Llama", in_transformers=True),
    GgufCase("llama-biases", "llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    GgufCase("llama-llama3", "llama", "Llama", {"rope_parameters": _LLAMA3}, is_exact=False),
    GgufCase("qwen2", "qwen2", "Qwen2", in_transformers=True),
    GgufCase("qwen2-yarn", "qwen2", "Qwen2", {"rope_parameters": _YARN, "tie_word_embeddings": True}),
    GgufCase("qwen3", "qwen3", "Qwen3", {"head_dim": 128}, in_transformers=True),
    GgufCase("qwen3-biases", "qwen3", "Qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
    GgufCase("gemma", "gemma", "Gemma", {"head_dim": 32}),
    GgufCase(
        "gemma2",
        "gemma2",
        "Gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 3},
        in_transformers=True,
    ),
    GgufCase(
        "gemma2-27b",
        "gemma2",
        "Gemma2",
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 46,
            "head_dim": 32,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
        },
    ),
    GgufCase(
        "gemma3",
        "gemma3",
        "Gemma3",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7},
        config="Gemma3TextConfig",
        in_transformers=True,
    ),
    GgufCase(
        "gemma3-linear",
        "gemma3",
        "Gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "rope_parameters": {FULL: _rope("linear", 1e6, factor=8.0), SLIDING: _rope()},
        },
        config="Gemma3TextConfig",
    ),
    GgufCase(
        "gemma4",
        "gemma4",
        "Gemma4",
        {**_GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 5.0},
        config="Gemma4TextConfig",
    ),
    GgufCase(
        "gemma4-dense",
        "gemma4",
        "Gemma4",
        {
            **_GEMMA4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
        },
        config="Gemma4TextConfig",
    ),
    GgufCase("phi3", "phi3", "Phi3", {"original_max_position_embeddings": 64}, in_transformers=True),
    GgufCase(
        "phi3-window-partial",
        "phi3",
        "Phi3",
        {
            "original_max_position_embeddings": 64,
            "sliding_window": 8,
            "rope_parameters": _rope(partial_rotary_factor=0.75),
        },
    ),
    GgufCase("phi3-longrope", "phi3", "Phi3", {"original_max_position_embeddings": 16, "rope_parameters": _LONGROPE}),
    GgufCase("smollm3", "smollm3", "SmolLM3", {"num_hidden_layers": 4}),
    GgufCase("smollm3-biases", "smollm3", "SmolLM3", {"attention_bias": True, **_UNTIED}),
    GgufCase("olmo2", "olmo2", "Olmo2"),
    GgufCase("olmo3", "olmo2", "Olmo3", {"num_hidden_layers": 4, "sliding_window": 8}),
    GgufCase(
        "olmo3-yarn",
        "olmo2",
        "Olmo3",
        {"layer_types": [FULL, SLIDING], "sliding_window": 8, "rope_parameters": _YARN | {"attention_factor": 1.25}},
    ),
    GgufCase(
        "granite",
        "granite",
        "Granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "attention_bias": True,
        },
    ),
    GgufCase("gptneox", "gptneox", "GPTNeoX", {"rope_parameters": _rope(partial_rotary_factor=0.25)}),
    GgufCase("gptneox-serial", "gptneox", "GPTNeoX", {"use_parallel_residual": False}),
    GgufCase("gpt2", "gpt2", "GPT2", {"n_positions": 1024}, in_transformers=True),
    GgufCase("starcoder2", "starcoder2", "Starcoder2", in_transformers=True),
    GgufCase("starcoder2-plain", "starcoder2", "Starcoder2", {"use_bias": False, **_UNTIED}),
    GgufCase("stablelm", "stablelm", "StableLm", {"use_qkv_bias": True}, in_transformers=True),
    GgufCase("stablelm-parallel", "stablelm", "StableLm", {"use_parallel_residual": True}, in_transformers=True),
    GgufCase("stablelm-heads", "stablelm", "StableLm", {"qk_layernorm": True}),
    GgufCase("cohere2", "cohere2", "Cohere2", {"num_hidden_layers": 5, "sliding_window": 8, "logit_scale": 0.25}),
    GgufCase(
        "exaone4", "exaone4", "Exaone4", {"layer_types": _types(4, 4), "num_hidden_layers": 4, "sliding_window": 8}
    ),
    GgufCase("exaone4-full", "exaone4", "Exaone4", {"layer_types": [FULL, FULL], "sliding_window": None}),
    GgufCase("glm4", "glm4", "Glm4", {"head_dim": 32}),
    GgufCase("arcee", "arcee", "Arcee", {"rope_parameters": _YARN}),
    GgufCase("seed_oss", "seed_oss", "SeedOss", {"head_dim": 32, "attention_out_bias": True}),
    GgufCase("mistral3", "mistral3", "Mistral", {"head_dim": 32, "sliding_window": None, "rope_parameters": _YARN}),
    GgufCase("ministral3", "mistral3", "Ministral3", {"head_dim": 32, "rope_parameters": {**_YARN, **_GROWS}}),
    GgufCase("hunyuan", "hunyuan-dense", "HunYuanDenseV1", {"head_dim": 32}),
    GgufCase(
        "hunyuan-stretched",
        "hunyuan-dense",
        "HunYuanDenseV1",
        {
            "head_dim": 16,
            "attention_bias": True,
            "max_position_embeddings": 262_144,
            "rope_parameters": _rope("dynamic", alpha=50.0, factor=1.0),
        },
    ),
    GgufCase("ernie4_5", "ernie4_5", "Ernie4_5", {"head_dim": 32}),
    GgufCase("ernie4_5-biases", "ernie4_5", "Ernie4_5", {"use_bias": True}),
)
