"""Writes a model and its exits as EE-LLM saves them: Megatron's folders, one pickle per rank and pipeline stage.

It follows ``megatron/checkpointing.py``, ``megatron/model/language_model.py`` and ``transformer.py`` of
https://github.com/pan-x-c/EE-LLM. The files also hold what a training run saves: one of Megatron's enums among the
options, numpy's random state, and an optimizer's state.
"""

from __future__ import annotations

import argparse
import enum
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.tiny_models import write_tokenizer
from shortstack.export.twin.exits import ExitNode
from shortstack.export.twin.model import Twin

RANK_FILE = "model_optim_rng.pt"
ITERATION = 100
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How a model is split over files, and how its exits are stored.

    Attributes:
        ranks: Number of tensor-parallel ranks.
        stages: Number of pipeline stages, which have equal numbers of layers.
        is_pre: Exits belong to the layer whose input they read.
        divisible_by: The vocabulary is padded to a multiple of this times ``ranks``.
        dtype: Type of the stored weights.
    """

    ranks: int = 1
    stages: int = 1
    is_pre: bool = False
    divisible_by: int = 16
    dtype: torch.dtype = torch.float32


def write(
    folder: Path,
    twin: Twin,
    nodes: Sequence[ExitNode] = (),
    layout: Layout | None = None,
    edit: Callable[[dict[str, Any]], object] = lambda model: None,
    **changed: Any,
) -> Path:
    """Write a checkpoint with its tracker file and a tokenizer; return the folder.

    Args:
        folder: The folder to write.
        twin: The model.
        nodes: Its exits, in the order in which EE-LLM lists them.
        layout: How the model is split.
        edit: Changes the tensors of each file before they are saved.
        changed: Megatron options that replace the usual ones.
    """
    layout = Layout() if layout is None else layout
    args = options_of(twin, nodes, layout) | changed
    whole = twin.state_dict() | {"lm_head.weight": twin.head_weight}
    per_stage = twin.spec.num_hidden_layers // layout.stages
    iteration = folder / f"iter_{ITERATION:07d}"
    for rank in range(layout.ranks):
        for stage in range(layout.stages):
            layers = range(stage * per_stage, (stage + 1) * per_stage)
            model = _stage(twin, {k: v.detach() for k, v in whole.items()}, nodes, layout, rank, layers)
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if layout.stages > 1 else "")
            edit(model)
            save(iteration / name / RANK_FILE, {**args, "rank": rank + stage * layout.ranks}, model)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    write_tokenizer(folder, twin.spec.vocab_size)
    return folder


def options_of(twin: Twin, nodes: Sequence[ExitNode], layout: Layout) -> dict[str, Any]:
    """Return the options that ``args`` hold."""
    spec, exits = twin.spec, [node.exit_spec for node in nodes]
    attention = spec.layers[0].attention
    multiple = layout.divisible_by * layout.ranks
    return {
        "num_layers": spec.num_hidden_layers,
        "encoder_num_layers": spec.num_hidden_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.layers[0].mlp.width,
        "num_attention_heads": attention.heads,
        "kv_channels": attention.head_dim,
        "group_query_attention": attention.kv_heads != attention.heads,
        "num_query_groups": attention.kv_heads if attention.kv_heads != attention.heads else 1,
        "seq_length": spec.max_position_embeddings,
        "max_position_embeddings": spec.max_position_embeddings,
        "normalization": "RMSNorm",
        "norm_epsilon": spec.norm_eps,
        "swiglu": True,
        "add_bias_linear": spec.layers[0].mlp.has_bias,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_seq_len_interpolation_factor": None,
        "untie_embeddings_and_output_weights": not spec.tie_word_embeddings,
        "transformer_impl": "local",
        "num_experts": None,
        "tensor_model_parallel_size": layout.ranks,
        "pipeline_model_parallel_size": layout.stages,
        "virtual_pipeline_model_parallel_size": None,
        "make_vocab_size_divisible_by": layout.divisible_by,
        "padded_vocab_size": -(-spec.vocab_size // multiple) * multiple,
        "params_dtype": layout.dtype,
        "data_path": ["0.5", "/data/a"],
        "exit_layer_nums": [e.exit_layer + layout.is_pre for e in exits],
        "exit_layer_weight": [1.0 for _ in exits],
        "exit_layer_temperature": [1.0 for _ in exits],
        "pre_exit": layout.is_pre,
        "use_exit_norm": any(e.norm == "own" for e in exits),
        "use_exit_mlp": any(e.branch == "mlp" for e in exits),
        "use_exit_block": any(e.branch == "block" for e in exits),
        "untie_exit_output_weights": any(e.head == "own" for e in exits),
        "tune_exit": False,
    }


def save(path: Path, options: dict[str, Any], tensors: dict[str, Any], **instead: Any) -> None:
    """Write the file of one rank; ``instead`` replaces entries of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _megatron() as model_type:
        content = {
            "args": argparse.Namespace(**options, model_type=model_type.encoder_or_decoder),
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            "model": tensors,
            "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}},
            "opt_param_scheduler": {"max_lr": 3e-4, "num_steps": ITERATION},
            "rng_state": [
                {
                    "random_rng_state": random.getstate(),
                    "np_rng_state": np.random.get_state(),
                    "torch_rng_state": torch.get_rng_state(),
                    "rng_tracker_states": {},
                }
            ],
            **instead,
        }
        torch.save(content, path)


@contextmanager
def _megatron() -> Iterator[Any]:
    """Make ``megatron.core.enums`` importable while something is pickled."""
    modules = {name: types.ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.enums")}
    model_type = enum.Enum("ModelType", ["encoder_or_decoder"], module="megatron.core.enums")
    modules["megatron.core.enums"].ModelType = model_type  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield model_type
    finally:
        for name in modules:
            del sys.modules[name]


def _stage(
    twin: Twin, whole: Weights, nodes: Sequence[ExitNode], layout: Layout, rank: int, layers: range
) -> dict[str, Any]:
    spec = twin.spec
    is_first, is_last = layers.start == 0, layers.stop == spec.num_hidden_layers
    here = [node for node in nodes if node.exit_spec.exit_layer + layout.is_pre - 1 in layers]
    has_own_heads = any(node.exit_spec.head == "own" for node in nodes)
    embedding = _vocabulary(whole["model.embed_tokens.weight"], layout, rank)
    language: dict[str, Any] = {}
    if is_first:
        language["embedding"] = {"word_embeddings": OrderedDict(weight=embedding)}
    if has_own_heads and here:
        language["exit_output_layer"] = OrderedDict(
            (f"{k}.weight", _vocabulary(node.head.weight.detach(), layout, rank)) for k, node in enumerate(here)
        )
    encoder: Weights = OrderedDict()
    for local, layer in enumerate(layers):
        parts = _layer(_under(whole, f"model.layers.{layer}."), twin, layout, rank)
        node = next((n for n in here if n.exit_spec.exit_layer + layout.is_pre - 1 == layer), None)
        if node is not None:
            own = {name: value.detach() for name, value in node.state_dict().items()}
            if node.exit_spec.branch == "mlp":
                parts = {name.replace("mlp.", "mlp.trunk."): value for name, value in parts.items()}
                branch = _mlp(_under(own, "mlp."), layout, rank)
                parts |= {f"mlp.branch.{name}": value for name, value in branch.items()}
            if node.exit_spec.branch == "block":
                block = _layer(_under(own, "block."), twin, layout, rank)
                parts |= {f"exit_block.{name}": value for name, value in block.items()}
            if node.exit_spec.norm == "own":
                parts["exit_norm.weight"] = own["norm.weight"].to(layout.dtype)
        encoder |= {f"layers.{local}.{name}": value for name, value in parts.items()}
    if is_last:
        encoder["final_norm.weight"] = whole["model.norm.weight"].to(layout.dtype)
        if not spec.tie_word_embeddings:
            language["output_layer"] = OrderedDict(weight=_vocabulary(whole["lm_head.weight"], layout, rank))
    language["encoder"] = encoder
    model: dict[str, Any] = {"language_model": language}
    if spec.tie_word_embeddings and not is_first and (is_last or here):
        model["word_embeddings_for_head"] = OrderedDict(weight=embedding)
    return model


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _layer(layer: Weights, twin: Twin, layout: Layout, rank: int) -> Weights:
    """Return one layer or exit block, under Megatron's names."""
    attention = twin.spec.layers[0].attention
    groups, dim = attention.kv_heads, attention.head_dim
    parts: Weights = {
        "input_norm.weight": layer["input_layernorm.weight"].to(layout.dtype),
        "post_attention_norm.weight": layer["post_attention_layernorm.weight"].to(layout.dtype),
    }
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" not in layer:
            continue
        q, k, v = (layer[f"self_attn.{p}_proj.{kind}"] for p in "qkv")
        rest = q.shape[1:]
        # loader_llama2_hf.py, set_attn_state
        packed = torch.cat(
            [q.reshape(groups, -1, *rest), k.reshape(groups, dim, *rest), v.reshape(groups, dim, *rest)], dim=1
        ).reshape(-1, *rest)
        parts[f"self_attention.query_key_value.{kind}"] = _chunk(packed, layout, rank, 0)
    parts["self_attention.dense.weight"] = _chunk(layer["self_attn.o_proj.weight"], layout, rank, 1)
    if "self_attn.o_proj.bias" in layer:
        parts["self_attention.dense.bias"] = layer["self_attn.o_proj.bias"].to(layout.dtype)
    return parts | {f"mlp.{name}": value for name, value in _mlp(_under(layer, "mlp."), layout, rank).items()}


def _mlp(mlp: Weights, layout: Layout, rank: int) -> Weights:
    parts: Weights = {}
    for kind in ("weight", "bias"):
        if f"gate_proj.{kind}" in mlp:
            gate, up = (_chunk(mlp[f"{part}_proj.{kind}"], layout, rank, 0) for part in ("gate", "up"))
            parts[f"dense_h_to_4h.{kind}"] = torch.cat([gate, up])
    parts["dense_4h_to_h.weight"] = _chunk(mlp["down_proj.weight"], layout, rank, 1)
    if "down_proj.bias" in mlp:
        parts["dense_4h_to_h.bias"] = mlp["down_proj.bias"].to(layout.dtype)
    return parts


def _vocabulary(matrix: Tensor, layout: Layout, rank: int) -> Tensor:
    multiple = layout.divisible_by * layout.ranks
    padding = -len(matrix) % multiple
    return _chunk(torch.cat([matrix, torch.full((padding, matrix.shape[1]), 7.0)]), layout, rank, 0)


def _chunk(tensor: Tensor, layout: Layout, rank: int, dim: int) -> Tensor:
    return tensor.chunk(layout.ranks, dim)[rank].to(layout.dtype).clone()
