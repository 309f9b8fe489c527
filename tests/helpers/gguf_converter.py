"""Writes GGUF files from folders as llama.cpp's converter does (its ``conversion/*.py``), told again independently.

Names come from the gguf package; what the converter changes in tensors and leaves out of metadata is written down here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from helpers.gguf_files import Edit, Kind, permute

Config = dict[str, Any]
Tensors = Iterator[tuple[str, np.ndarray]]
OWN_METADATA = ("gemma", "gemma2", "gpt2", "gptneox", "phi3", "stablelm")
PERMUTED = ("llama", "mistral3", "granite", "smollm3", "arcee")
PLUS_ONE = ("gemma", "gemma2", "gemma3")


def convert(
    folder: Path,
    file: Path,
    architecture: str,
    *,
    kind: Kind | None = None,
    edit: Edit | None = None,
    skip: str | None = None,
    extra: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Path:
    """Convert a folder that transformers saved.

    Args:
        folder: The model.
        file: The file to write.
        architecture: llama.cpp's name of its architecture.
        kind: Type of all matrices; None for float32.
        edit: Changes the metadata last.
        skip: A part of the names of tensors to leave out.
        extra: Further tensors, by GGUF name.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    if architecture not in OWN_METADATA:
        _base(writer, config)
    if (own := _METADATA.get(architecture)) is not None:
        own(writer, config)
    if edit is not None:
        edit(writer)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(arch, layers)
    for name, value in _modified(architecture, config, load_file(folder / "model.safetensors")):
        if skip is not None and skip in name:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if kind is not None and value.ndim == 2 and not stored.endswith("_norm.weight"):
            writer.add_tensor(stored, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(value, np.float32))
    for name, value in extra.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _rope(config: Config) -> Config:
    parameters: Config = config.get("rope_parameters") or {}
    return parameters.get("full_attention", parameters)


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])


def _base(writer: gguf.GGUFWriter, config: Config) -> None:
    """``TextModel.set_gguf_parameters``."""
    _sizes(writer, config)
    if config.get("num_key_value_heads") is not None:
        writer.add_head_count_kv(config["num_key_value_heads"])
    rope = _rope(config)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    writer.add_rope_freq_base(rope["rope_theta"])
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if (eps := config.get("layer_norm_eps") or config.get("norm_epsilon")) is not None:
        writer.add_layer_norm_eps(eps)
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _llama(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(_head_dim(config))


def _mistral3(writer: gguf.GGUFWriter, config: Config) -> None:
    _llama(writer, config)
    if config["model_type"] == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(_rope(config)["mscale_all_dim"])
        writer.add_attn_temperature_scale(_rope(config)["llama_4_scaling_beta"])


def _hunyuan(writer: gguf.GGUFWriter, config: Config) -> None:
    rope, width = _rope(config), config["head_dim"]
    if rope["rope_type"] == "dynamic":
        writer.kv_data[0].pop("hunyuan-dense.rope.freq_base")
        writer.add_rope_freq_base(rope["rope_theta"] * rope["alpha"] ** (width / (width - 2)))
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1)
        writer.add_rope_scaling_orig_ctx_len(256 * 1024)
        writer.kv_data[0].pop("hunyuan-dense.context_length")
        writer.add_context_length(256 * 1024)


def _granite(writer: gguf.GGUFWriter, config: Config) -> None:
    _llama(writer, config)
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _gemma(writer: gguf.GGUFWriter, config: Config) -> None:
    _sizes(writer, config)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])


def _gemma2(writer: gguf.GGUFWriter, config: Config) -> None:
    _gemma(writer, config)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _gemma3(writer: gguf.GGUFWriter, config: Config) -> None:
    if config["final_logit_softcapping"]:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _full_heads(config: Config) -> tuple[int, int]:
    """Return width and number of the key/value heads of Gemma 4's full layers."""
    layer = str(config["layer_types"].index("full_attention"))
    own = {key: config[key] for key in ("head_dim", "num_key_value_heads")} | config["per_layer_config"][layer]
    return own["head_dim"], own["num_key_value_heads"]


def _gemma4(writer: gguf.GGUFWriter, config: Config) -> None:
    """Later values replace earlier ones, here as there."""
    fields = writer.kv_data[0]
    layers, types, shared = config["num_hidden_layers"], config["layer_types"], config["num_kv_shared_layers"]
    for key in ("key_length", "value_length"):
        fields.pop(f"gemma4.attention.{key}")
    _gemma3(writer, config)
    slides = [kind == "sliding_attention" for kind in types]
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"] or 0)
    writer.add_sliding_window_pattern(slides)
    head_dim, of_full = _full_heads(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    if config["use_double_wide_mlp"]:
        fields.pop("gemma4.feed_forward_length")
        inner = config["intermediate_size"]
        writer.add_feed_forward_length([inner if layer < layers - shared else 2 * inner for layer in range(layers)])
    if of_full != config["num_key_value_heads"]:
        fields.pop("gemma4.attention.head_count_kv")
        writer.add_head_count_kv([config["num_key_value_heads"] if sliding else of_full for sliding in slides])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_dimension_count_swa(config["head_dim"])


def _cohere2(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_logit_scale(config["logit_scale"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _slides(writer: gguf.GGUFWriter, config: Config) -> None:
    if config.get("sliding_window") is not None:
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def _glm4(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_rope_dimension_count(int(_head_dim(config) * _rope(config)["partial_rotary_factor"]))


def _gpt2(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _gptneox(writer: gguf.GGUFWriter, config: Config) -> None:
    _sizes(writer, config)
    writer.add_rope_dimension_count(int(_rope(config)["partial_rotary_factor"] * _head_dim(config)))
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])


def _stablelm(writer: gguf.GGUFWriter, config: Config) -> None:
    _gptneox(writer, config)
    writer.add_head_count_kv(config["num_key_value_heads"])


def _phi3(writer: gguf.GGUFWriter, config: Config) -> None:
    _sizes(writer, config)
    rope, original = _rope(config), config["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    share = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * config["hidden_size"]) // config["num_attention_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config["sliding_window"] or 0)
    if "long_factor" in rope:
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


_METADATA: dict[str, Callable[[gguf.GGUFWriter, Config], None]] = {
    **dict.fromkeys(("llama", "smollm3", "arcee"), _llama),
    **dict.fromkeys(("olmo2", "exaone4"), _slides),
    "cohere2": _cohere2,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "glm4": _glm4,
    "gpt2": _gpt2,
    "gptneox": _gptneox,
    "granite": _granite,
    "hunyuan-dense": _hunyuan,
    "mistral3": _mistral3,
    "phi3": _phi3,
    "stablelm": _stablelm,
}


def _modified(architecture: str, config: Config, tensors: dict[str, np.ndarray]) -> Tensors:
    """``modify_tensors`` and ``generate_extra_tensors``."""
    heads = config.get("num_attention_heads") or config["n_head"]
    for layer, kind in itertools.product(range(config.get("num_hidden_layers", 0)), "qk"):
        module = f"model.layers.{layer}.self_attn.{kind}_layernorm"
        norms = [name for name in tensors if name.startswith(f"{module}.norms.")]
        if norms:
            yield f"{module}.weight", np.stack([tensors.pop(f"{module}.norms.{i}.weight") for i in range(len(norms))])
    for name, value in tensors.items():
        if architecture in PERMUTED and ".q_proj." in name:
            yield name, permute(value, heads)
        elif architecture in PERMUTED and ".k_proj." in name:
            yield name, permute(value, config["num_key_value_heads"])
        elif architecture in PLUS_ONE and name.endswith("norm.weight"):
            yield name, value + np.float32(1)
        elif "query_key_value" in name:
            by_head = value.reshape(heads, 3, value.shape[0] // heads // 3, *value.shape[1:])
            yield name, np.concatenate([by_head[:, part].reshape(-1, *value.shape[1:]) for part in range(3)])
        elif architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            yield name, value.T
        elif name.endswith("layer_scalar"):
            yield f"{name}.weight", value
        else:
            yield name, value
    rope = _rope(config)
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(rope["short_factor"], np.float32)
    if rope.get("rope_type") == "proportional":
        half = _full_heads(config)[0] // 2
        rotated = int(half * rope["partial_rotary_factor"])
        yield "rope_freqs.weight", np.array([1.0] * rotated + [1e30] * (half - rotated), np.float32)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, _head_dim(config))


def _llama3_factors(rope: Config, head_dim: int) -> np.ndarray:
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / rope["factor"] + smooth), np.float32)
