"""From what a graph says of its model to a spec, and to the family whose config says the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shortstack.export.arch import ARCHITECTURES, Architecture
from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.genai_rope import read_tables
from shortstack.export.checkpoint.lifted_model import LiftedLayer, LiftedModel
from shortstack.export.checkpoint.onnx_graph import OnnxGraph, Tensor
from shortstack.graphs.errors import CheckpointError, ShortstackError, UnsupportedError
from shortstack.graphs.layer_spec import Attention, Ends, Layer, Mlp, Norm, Rope, RopeScaling
from shortstack.graphs.spec import ModelSpec
from shortstack.graphs.spec_json import spec_to_json

Floats = npt.NDArray[np.float32]
CANDIDATES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "ernie4_5", "smollm3",
    "ministral", "seed_oss",
)  # fmt: skip
"""Families that are tried where ``model.type`` is of none of ours, in this order."""

_ROUNDED_ROOT = 0.005  # onnxruntime-genai's builder rounds Gemma's factor of embeddings to two decimals
_EQUAL = 1e-5


def lifted_spec(model: LiftedModel, graph: OnnxGraph, model_type: str, context: int) -> tuple[ModelSpec, Floats | None]:
    """Return the spec of a lifted model, and the divisors of its rotary frequencies if it has any.

    Raises:
        CheckpointError: Shapes do not fit each other.
        UnsupportedError: Something of it that a spec cannot say.
    """
    hidden = model.embedding.width
    ropes: dict[tuple[str, str], Rope] = {}
    divisors: list[Floats] = []
    for lifted in model.layers:
        if lifted.rope is not None and lifted.rope not in ropes:
            cos, sin = (graph.tensors[name] for name in lifted.rope)
            head_dim = lifted.q.matrix.shape[0] // _heads(lifted)
            theta, factors = read_tables(cos, sin, head_dim)
            context = min(context, cos.shape[0])
            kind = RopeScaling() if factors is None else RopeScaling("factors")
            if factors is not None:
                divisors.append(factors.astype(np.float32))
            ropes[lifted.rope] = Rope(theta, head_dim, head_dim, kind)
    if len(divisors) > 1:
        raise UnsupportedError(f"{graph.path}: two rotary embeddings with scaled frequencies", expected="one at most")
    numbers = {tables: number for number, tables in enumerate(ropes)}
    norm = _norm(model.final_norm.weight, model.final_norm.eps, hidden)
    ends = Ends(norm, model.embed_scale, 0, model.logit_scale, model.logit_softcap)
    layers = tuple(
        _layer(lifted, hidden, None if lifted.rope is None else numbers[lifted.rope]) for lifted in model.layers
    )
    _check(f"{graph.path}: the LM head", model.head.shape, (model.embedding.rows, hidden))
    spec = ModelSpec(
        model_type=model_type,
        hidden_size=hidden,
        vocab_size=model.embedding.rows,
        max_position_embeddings=context,
        tie_word_embeddings=model.head.data is model.embedding.data,
        layers=layers,
        ends=ends,
        ropes=tuple(ropes.values()),
    )
    return spec, divisors[0] if divisors else None


def family_of(
    spec: ModelSpec, interleaved: frozenset[bool], where: str
) -> tuple[Architecture, dict[str, Any], ModelSpec]:
    """Return the family whose config says what a spec does, that config, and the spec as the family reads it.

    Args:
        spec: The lifted spec; the family of its ``model_type`` is tried first.
        interleaved: Whether neighbouring columns are rotated together, of all rotary embeddings.
        where: The graph, for messages.

    Raises:
        UnsupportedError: No family has such a model; the message says where the first one differs.
    """
    first = ""
    for name in dict.fromkeys((spec.model_type, *CANDIDATES)):
        if name not in ARCHITECTURES:
            continue
        arch = ARCHITECTURES[name]
        pairs = {"neighbours" if each else "halves" for each in interleaved}
        differs = f"pairs of columns: {' and '.join(pairs)}, not {arch.rope_pairs}"
        if pairs <= {arch.rope_pairs}:
            config, read, differs = _read_back(arch, spec)
            if read is not None:
                return arch, config, read
        first = first or f"{name} differs in {differs}"
    raise UnsupportedError(
        f"{where}: no family of this version has such a model",
        found=first,
        remedy="export the checkpoint that the graph was built from",
    )


def _read_back(arch: Architecture, spec: ModelSpec) -> tuple[dict[str, Any], ModelSpec | None, str]:
    """Write a spec as a family's config and read it again; return the config, the spec or None, and what differs."""
    own = _renamed(spec, arch.model_type)
    try:
        config = arch.write_config(own)
        read = arch.read_spec(Config(config, "the graph"))
    except (ShortstackError, KeyError, ValueError, StopIteration, TypeError) as error:
        return {}, None, str(error) or "its layers"
    theirs, ours = spec_to_json(read), spec_to_json(own)
    found = next(_differences(ours, theirs, ""), None)
    return config, read if found is None else None, found or ""


def _renamed(spec: ModelSpec, model_type: str) -> ModelSpec:
    return replace(spec, model_type=model_type)


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in dict.fromkeys((*ours, *theirs)):
            yield from _differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*pair, f"{path}[{index}]")
    elif not _same(ours, theirs, path):
        yield f"{path}: {json.dumps(ours, default=str)}, not {json.dumps(theirs, default=str)}"


def _same(ours: Any, theirs: Any, path: str) -> bool:
    if ours == theirs:
        return True
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return False
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        far = _ROUNDED_ROOT if path.endswith("embed_scale") else 0.0
        return math.isclose(ours, theirs, rel_tol=_EQUAL, abs_tol=far)
    return False


def _layer(lifted: LiftedLayer, hidden: int, rope: int | None) -> Layer:
    node, heads, kv_heads = lifted.attention, _heads(lifted), int(lifted.attention.attributes["kv_num_heads"])
    head_dim = lifted.q.matrix.shape[0] // heads
    where = f"{node}"
    _check(f"{where}: queries", lifted.q.matrix.shape, (heads * head_dim, hidden))
    for product, name in ((lifted.k, "keys"), (lifted.v, "values")):
        _check(f"{where}: {name}", product.matrix.shape, (kv_heads * head_dim, hidden))
    _check(f"{where}: its output projection", lifted.o.matrix.shape, (hidden, heads * head_dim))
    biases = {product.bias is not None for product in (lifted.q, lifted.k, lifted.v)}
    mlp_biases = {product.bias is not None for product in lifted.mlp.values()}
    if len(biases) > 1 or len(mlp_biases) > 1:
        raise UnsupportedError(where, found="biases of some projections", expected="of all, or of none")
    scale = float(node.attributes.get("scale", 0.0))
    window = int(node.attributes.get("local_window_size", -1))
    width = lifted.mlp["up_proj"].matrix.shape[0]
    for name, product in lifted.mlp.items():
        _check(f"{where}: {name}", product.matrix.shape, (hidden, width) if name == "down_proj" else (width, hidden))
    norms = {name: _norm(norm.weight, norm.eps, hidden) for name, norm in lifted.norms.items()}
    qk_norm = None
    if lifted.qk_norms is not None:
        first, second = (_norm(norm.weight, norm.eps, head_dim) for norm in lifted.qk_norms)
        if first != second:
            raise UnsupportedError(where, found=f"norms with {first.eps} and {second.eps}", expected="one epsilon")
        qk_norm = first
    return Layer(
        attention=Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=_scale(scale, head_dim),
            rope=rope,
            window=max(window, 0),
            softcap=max(float(node.attributes.get("softcap", 0.0)), 0.0),
            qkv_bias=biases == {True},
            out_bias=lifted.o.bias is not None,
            qk_norm=qk_norm,
        ),
        mlp=Mlp(width, lifted.activation, "gate_proj" in lifted.mlp, mlp_biases == {True}),
        before_attention=norms.get("before_attention"),
        after_attention=norms.get("after_attention"),
        before_mlp=norms.get("before_mlp"),
        after_mlp=norms.get("after_mlp"),
        residual_scale=lifted.scale,
    )


def _heads(lifted: LiftedLayer) -> int:
    return int(lifted.attention.attributes["num_heads"])


def _scale(found: float, head_dim: int) -> float | None:
    """Return the scale of scores; None for the usual one, and the root of a whole number where it is one."""
    if found <= 0 or math.isclose(found, head_dim**-0.5, rel_tol=1e-6):
        return None
    base = found**-2
    return float(round(base) ** -0.5) if round(base) and math.isclose(base, round(base), rel_tol=1e-6) else found


def _norm(weight: Tensor, eps: float, size: int) -> Norm:
    _check(weight.where, weight.shape, (size,))
    return Norm("rms", eps)


def _check(where: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(where, found=list(found), expected=list(expected), remedy="build the folder again")
