"""The architectures of llama.cpp that shortstack reads, and what it says about those that it does not.

What the tables say is what llama.cpp's converter writes (``conversion/``) and its models read (``src/models/``).
Values that it has in its code and not in the file are here as defaults. https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from shortstack.export.checkpoint.config import not_one_of
from shortstack.export.checkpoint.gguf_family import GROWTH, LAYER_EPS, ROTATED, YARN_LOG, GgufFamily, Number, Windows
from shortstack.export.checkpoint.gguf_gemma4 import GEMMA4
from shortstack.export.checkpoint.gguf_model import ANOTHER_MODEL, GgufModel
from shortstack.export.checkpoint.gguf_names import (
    FOUR_NORMS,
    FOUR_NORMS_OF_GLM,
    GPT2_NAMES,
    NEOX_NAMES,
    NO_GATE,
    NORMS_OF_EACH_HEAD,
    POST_NORMS,
    QK_NORMS,
    QK_NORMS_OF_HUNYUAN,
    STACKED_GATE,
    STACKED_QKV,
    llama_names,
)
from shortstack.export.checkpoint.gguf_transforms import Transform
from shortstack.graphs.errors import UnsupportedError

_QKV_BIAS = {"attention_bias": "attn_q"}
_QKV_AND_MLP_BIAS = {**_QKV_BIAS, "mlp_bias": "ffn_down"}
_EACH_BIAS = {**_QKV_AND_MLP_BIAS, "attention_out_bias": "attn_output"}
_NORMS = ("output_norm", "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")
_MINUS_ONE: Mapping[str, Transform] = dict.fromkeys(_NORMS, "minus_one")


def _scale_of_gemma(widest: int) -> Any:
    """Return what reads the scale of attention: the models of so many layers divide by the root of hidden / heads."""

    def read(model: GgufModel, config: Mapping[str, Any]) -> dict[str, object]:
        is_widest = config["num_hidden_layers"] == widest
        width = config["hidden_size"] // config["num_attention_heads"] if is_widest else config["head_dim"]
        return {"query_pre_attn_scalar": width}

    return read


def _multipliers_of_granite(model: GgufModel, config: Mapping[str, Any]) -> dict[str, object]:
    """Return the multipliers, of which 0 stands for none in llama.cpp."""
    if model.read(bool, "rope.scaling.finetuned", True) is False:
        raise model.unsupported("rope.scaling.finetuned", "a Granite model without rotary embedding", True)
    defaults = {"attention_multiplier": config["head_dim"] ** -0.5, "embedding_multiplier": 1.0}
    defaults["residual_multiplier"] = 1.0
    return {name: config[name] or default for name, default in defaults.items()}


def _layers_of_stablelm(model: GgufModel, config: Mapping[str, Any]) -> dict[str, object]:
    """Return what llama.cpp tells from the tensors, too."""
    return {
        "use_parallel_residual": not model.has("blk.0.ffn_norm"),
        "qk_layernorm": model.has("blk.0.attn_q_norm"),
    }


def _growth_of_ministral(model: GgufModel, config: Mapping[str, Any]) -> dict[str, object]:
    """Return how queries grow with their position, which transformers has in the object of the rotary embedding."""
    growth, of_all = model.positive_number(GROWTH), model.number(YARN_LOG, 0.0)
    original = model.positive("rope.scaling.original_context_length", config["max_position_embeddings"])
    rope = {**config["rope_parameters"], "llama_4_scaling_beta": growth, "original_max_position_embeddings": original}
    return {"rope_parameters": {**rope, **({"mscale": 1.0, "mscale_all_dim": of_all} if of_all else {})}}


def _residual_of_neox(model: GgufModel, config: Mapping[str, Any]) -> dict[str, object]:
    return {"use_parallel_residual": model.metadata.read(bool, model.key("use_parallel_residual"))}


_GEMMA2 = GgufFamily(
    model_type="gemma2",
    transformers_class="Gemma2ForCausalLM",
    names=llama_names(FOUR_NORMS),
    transforms=_MINUS_ONE,
    biases=_QKV_BIAS,
    numbers={
        "attn_logit_softcapping": Number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": Number("final_logit_softcapping", 30.0),
    },
    fixed={"hidden_activation": "gelu_pytorch_tanh"},
    windows=Windows(2, default=4096),
    extend=_scale_of_gemma(46),
)
_MISTRAL3 = GgufFamily(
    model_type="mistral",
    transformers_class="MistralForCausalLM",
    transforms=ROTATED,
    fixed={"sliding_window": None},
    with_growth=GgufFamily(
        model_type="ministral3",
        transformers_class="Ministral3ForCausalLM",
        transforms=ROTATED,
        ignores=(GROWTH, YARN_LOG),
        extend=_growth_of_ministral,
    ),
)
_OLMO2 = GgufFamily(
    model_type="olmo2",
    transformers_class="Olmo2ForCausalLM",
    names=llama_names(POST_NORMS, QK_NORMS),
    biases=_QKV_BIAS,
    windows=Windows(4),
    with_windows=GgufFamily(
        model_type="olmo3",
        transformers_class="Olmo3ForCausalLM",
        names=llama_names(POST_NORMS, QK_NORMS),
        biases=_QKV_BIAS,
        windows=Windows(4),
        local_theta="same",
    ),
)

FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "arcee": GgufFamily(
            model_type="arcee",
            transformers_class="ArceeForCausalLM",
            names=llama_names(NO_GATE),
            transforms=ROTATED,
            biases=_QKV_AND_MLP_BIAS,
            fixed={"hidden_act": "relu2"},
        ),
        "cohere2": GgufFamily(
            model_type="cohere2",
            transformers_class="Cohere2ForCausalLM",
            names=llama_names({"ffn_norm": None}),
            norm_eps=("layer_norm_eps", LAYER_EPS),
            biases=_QKV_BIAS,
            numbers={"logit_scale": Number("logit_scale")},
            has_head_dim=False,
            windows=Windows(4, is_required=True),
        ),
        "ernie4_5": GgufFamily(
            model_type="ernie4_5",
            transformers_class="Ernie4_5ForCausalLM",
            biases={"use_bias": "attn_q"},
        ),
        "exaone4": GgufFamily(
            model_type="exaone4",
            transformers_class="Exaone4ForCausalLM",
            names=llama_names(POST_NORMS, QK_NORMS),
            windows=Windows(4, of_depth={64: 4096}),
        ),
        "gemma": GgufFamily(
            model_type="gemma",
            transformers_class="GemmaForCausalLM",
            transforms=_MINUS_ONE,
            biases=_QKV_BIAS,
            fixed={"hidden_act": "gelu_pytorch_tanh"},
        ),
        "gemma2": _GEMMA2,
        "gemma3": replace(
            _GEMMA2,
            model_type="gemma3_text",
            transformers_class="Gemma3ForCausalLM",
            names=llama_names(FOUR_NORMS, QK_NORMS),
            numbers={"final_logit_softcapping": Number("final_logit_softcapping", 0.0)},
            windows=Windows(6),
            local_theta=10000.0,
            extend=_scale_of_gemma(62),
        ),
        "gemma4": GEMMA4,
        "glm4": GgufFamily(
            model_type="glm4",
            transformers_class="Glm4ForCausalLM",
            names=llama_names(FOUR_NORMS_OF_GLM, STACKED_GATE),
            biases=_QKV_BIAS,
            rope_share="partial_rotary_factor",
        ),
        "gpt2": GgufFamily(
            model_type="gpt2",
            transformers_class="GPT2LMHeadModel",
            names=GPT2_NAMES,
            transforms=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "turned"),
            norm_eps=("layer_norm_epsilon", LAYER_EPS),
            fixed={"activation_function": "gelu_new"},
            renames={
                "num_hidden_layers": "n_layer",
                "hidden_size": "n_embd",
                "intermediate_size": "n_inner",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
            },
            has_head_dim=False,
            has_rope=False,
        ),
        "gptneox": GgufFamily(
            model_type="gpt_neox",
            transformers_class="GPTNeoXForCausalLM",
            names=NEOX_NAMES,
            transforms={"attn_qkv": "heads_together"},
            norm_eps=("layer_norm_eps", LAYER_EPS),
            biases={"attention_bias": "attn_qkv"},
            fixed={"hidden_act": "gelu"},
            has_head_dim=False,
            rope_share="rotary_pct",
            extend=_residual_of_neox,
        ),
        "granite": GgufFamily(
            model_type="granite",
            transformers_class="GraniteForCausalLM",
            transforms=ROTATED,
            biases=_QKV_AND_MLP_BIAS,
            numbers={
                "attention_multiplier": Number("attention.scale", 0.0),
                "embedding_multiplier": Number("embedding_scale", 0.0),
                "residual_multiplier": Number("residual_scale", 0.0),
                "logits_scaling": Number("logit_scale"),
            },
            extend=_multipliers_of_granite,
        ),
        "hunyuan-dense": GgufFamily(
            model_type="hunyuan_v1_dense",
            transformers_class="HunYuanDenseV1ForCausalLM",
            names=llama_names(QK_NORMS_OF_HUNYUAN),
            biases=_QKV_BIAS,
        ),
        "llama": GgufFamily(
            model_type="llama",
            transformers_class="LlamaForCausalLM",
            transforms=ROTATED,
            biases=_EACH_BIAS,
            fixed={"hidden_act": "silu"},
            ignores=("attention.sliding_window",),
        ),
        "mistral3": _MISTRAL3,
        "olmo2": _OLMO2,
        "phi3": GgufFamily(
            model_type="phi3",
            transformers_class="Phi3ForCausalLM",
            names=llama_names(STACKED_QKV, STACKED_GATE),
            rope_share="partial_rotary_factor",
            windows=Windows(0),
        ),
        "qwen2": GgufFamily(model_type="qwen2", transformers_class="Qwen2ForCausalLM"),
        "qwen3": GgufFamily(
            model_type="qwen3",
            transformers_class="Qwen3ForCausalLM",
            names=llama_names(QK_NORMS),
            biases=_QKV_BIAS,
        ),
        "seed_oss": GgufFamily(
            model_type="seed_oss",
            transformers_class="SeedOssForCausalLM",
            names=llama_names({"ffn_norm": None, "post_attention_norm": "post_attention_layernorm"}),
            biases=_EACH_BIAS,
        ),
        "smollm3": GgufFamily(
            model_type="smollm3",
            transformers_class="SmolLM3ForCausalLM",
            transforms=ROTATED,
            biases=_QKV_AND_MLP_BIAS,
            fixed={"no_rope_layer_interval": 4},
        ),
        "stablelm": GgufFamily(
            model_type="stablelm",
            transformers_class="StableLmForCausalLM",
            names=llama_names(NORMS_OF_EACH_HEAD),
            norm_eps=("layer_norm_eps", LAYER_EPS),
            biases={"use_qkv_bias": "attn_q"},
            has_head_dim=False,
            rope_share="partial_rotary_factor",
            extend=_layers_of_stablelm,
        ),
        "starcoder2": GgufFamily(
            model_type="starcoder2",
            transformers_class="Starcoder2ForCausalLM",
            names=llama_names(NO_GATE, {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
            norm_eps=("norm_epsilon", LAYER_EPS),
            biases={"use_bias": "attn_q"},
            fixed={"hidden_act": "gelu_pytorch_tanh"},
            has_head_dim=False,
            windows=Windows(0),
        ),
    }
)
"""By ``general.architecture``."""

_MISSING: Mapping[str, str] = MappingProxyType(
    {
        "mixtures of experts": (
            "afmoe arctic bailingmoe bailingmoe2 dbrx deepseek deepseek2 deepseek2-ocr dots1 ernie4_5-moe exaone-moe "
            "glm-dsa glm4moe gpt-oss granitemoe grok grovemoe hunyuan-moe llada-moe llama4 mimo2 minimax-m2 mistral4 "
            "olmoe phimoe qwen2moe qwen3moe qwen3vlmoe rnd1 smallthinker step35"
        ),
        "recurrent layers": (
            "arwkv7 falcon-h1 granitehybrid jamba kimi-linear lfm2 lfm2moe mamba mamba2 nemotron_h nemotron_h_moe "
            "plamo2 qwen35 qwen35moe qwen3next rwkv6 rwkv6qwen2 rwkv7"
        ),
        "models that read a text in both directions": (
            "bert dream eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llada llama-embed modern-bert neo-bert "
            "nomic-bert nomic-bert-moe t5 t5encoder"
        ),
        "a drafter without its model": "dflash eagle3 gemma4-assistant",
        "inputs other than text": "clip cogvlm paddleocr qwen2vl qwen3vl wavtokenizer-dec",
    }
)
"""Architectures of llama.cpp by what this version would need for them."""


def unknown_architecture(where: str, architecture: str, families: Mapping[str, GgufFamily]) -> UnsupportedError:
    """Return the error for an architecture that is not one of those asked for.

    Args:
        where: The file and the field that names it.
        architecture: What it says.
        families: Those asked for: :data:`FAMILIES`, or drafters.
    """
    if families is not FAMILIES:
        remedy = "name a drafter, and the model's own file as the checkpoint"
        return not_one_of(where, architecture, families, remedy=remedy)
    for what, known in _MISSING.items():
        if architecture in known.split():
            return UnsupportedError(
                f"{where}: this version cannot export {what}",
                found=architecture,
                expected=f"one of {', '.join(sorted(FAMILIES))}",
                remedy=ANOTHER_MODEL,
            )
    return not_one_of(where, architecture, FAMILIES, remedy="export another model, or its safetensors")
