"""Reads any checkpoint that ``export`` reads into the twin, and writes the folder that ``export`` reads back.

::

    config.json          the spec under transformers' names; kv_map, windows and masks_diagonal if the model has them;
                         forward_passes and backward_passes, LCKV's names, if it has iterated groups
    model.safetensors    the weights under transformers' tensor names
    tokenizer.json ...   copied from the source
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shortstack.export.arch import ARCHITECTURES, expected_tensors, resolve
from shortstack.export.arch.architecture import EMBEDDING
from shortstack.export.checkpoint import Checkpoint, open_checkpoint
from shortstack.export.checkpoint.checkpoint import ROPE_FACTORS
from shortstack.export.checkpoint.config import Config
from shortstack.export.twin.model import Passes, Twin
from shortstack.graphs.bundle import staged_folder
from shortstack.graphs.kv_map import iterated_groups
from shortstack.graphs.spec import ModelSpec


def load_twin(source: str) -> Twin:
    """Load a checkpoint.

    Args:
        source: A folder, a GGUF file or a hub id.

    Raises:
        CheckpointError: It cannot be read.
        UnsupportedError: It can be read, but this version does not know its kind.
    """
    return twin_of(open_checkpoint(source))


def twin_of(checkpoint: Checkpoint) -> Twin:
    """Build the twin of an open checkpoint, in float32; errors as in :func:`load_twin`."""
    arch, spec = resolve(checkpoint)
    factors = checkpoint.tensor(ROPE_FACTORS) if spec.rope_scaling.kind == "factors" else None
    with torch.device("meta"):  # no time spent on random weights
        twin = Twin(spec)
    twin = twin.to_empty(device="cpu")
    twin.rope_factors = factors
    twin.passes = read_passes(checkpoint.config)
    usual = ARCHITECTURES[arch.model_type]
    stored = {usual.tensor_name(EMBEDDING): arch.tensor_name(EMBEDDING)}
    twin.load_state_dict({name: torch.tensor(checkpoint.tensor(stored.get(name, name))) for name in twin.state_dict()})
    return twin


def save_twin(twin: Twin, folder: Path, files: Mapping[str, bytes], *, dtype: torch.dtype = torch.float32) -> None:
    """Write a twin as a checkpoint folder, which appears complete or not at all.

    Args:
        twin: The model.
        folder: The folder to write.
        files: The tokenizer's files, as :meth:`Checkpoint.files` returns them.
        dtype: Type of the stored weights.

    Raises:
        BundleError: The folder is not empty, or cannot be written.
    """
    arch = ARCHITECTURES[twin.spec.model_type]
    wanted = expected_tensors(arch, twin.spec)
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in twin.state_dict().items()}
    if twin.rope_factors is not None:
        state[ROPE_FACTORS] = torch.from_numpy(twin.rope_factors)
    assert state.keys() == wanted.keys(), sorted(state.keys() ^ wanted.keys())
    config = config_of(twin.spec, dtype)
    if iterated_groups(twin.spec.kv_map):
        config["forward_passes"] = twin.passes.without_gradient
        config["backward_passes"] = twin.passes.with_gradient
    with staged_folder(folder) as staged:
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(state, staged / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (staged / name).write_bytes(content)


def read_passes(config: Config) -> Passes:
    """Read how often iterated groups run in training, from the fields of LCKV's configs.

    Raises:
        CheckpointError: A field is not an integer, or is too small.
    """
    default = Passes()
    without = config.read(int, "forward_passes", default.without_gradient)
    if without < 0:
        raise config.wrong("forward_passes", "0 or more")
    with_gradient = config.read(int, "backward_passes", default.with_gradient)
    if with_gradient < 1:
        raise config.wrong("backward_passes", "1 or more")
    return Passes(without, with_gradient)


def config_of(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return a ``config.json`` for a spec, under transformers' names."""
    scaling = spec.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": spec.rope_theta}
    if scaling.kind in ("linear", "llama3"):
        rope["factor"] = scaling.factor
    if scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": spec.model_type,
        "num_hidden_layers": spec.num_hidden_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_parameters": rope,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if spec.attention_out_bias != spec.qkv_bias:
        config["attention_out_bias"] = spec.attention_out_bias
    if spec.kv_map != tuple(range(spec.num_hidden_layers)):
        config["kv_map"] = list(spec.kv_map)
    if spec.windows:
        config["windows"] = list(spec.windows)
    if spec.masks_diagonal:
        config["masks_diagonal"] = True
    return config
