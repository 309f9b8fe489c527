"""Folders in the form that onnxruntime-genai's model builder writes: of tiny Llamas by hand, of any by the builder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from shortstack.graphs.ir.block_tensor import nearest
from shortstack.graphs.precision import BlockFormat

GRAPH, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"


@dataclass
class GraphWriter:
    """Writes the graph of a tiny Llama checkpoint, its weights in a file beside it.

    Attributes:
        blocks: How the projections and the head are rounded; None for floats.
    """

    checkpoint: Path
    blocks: BlockFormat | None = None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)

    def write(self, folder: Path) -> Path:
        """Write graph, weights, config and tokenizer into a new folder."""
        config = json.loads((self.checkpoint / "config.json").read_text())
        weights = load_file(self.checkpoint / "model.safetensors")
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.checkpoint / name, folder / name)
        self._build(config, {name: np.asarray(value, np.float32) for name, value in weights.items()})
        (folder / DATA).write_bytes(self.data)
        onnx.save(self._model(config), folder / GRAPH)
        (folder / CONFIG).write_text(json.dumps(self._config(config)))
        return folder

    def _build(self, config: dict[str, Any], weights: dict[str, npt.NDArray[np.float32]]) -> None:
        eps, heads, kv_heads = (config[name] for name in ("rms_norm_eps", "num_attention_heads", "num_key_value_heads"))
        one = self.tensor("one", np.array([1]))
        ones = self.op("ReduceSum", ["attention_mask", one], keepdims=0)
        past_end = self.op("Cast", [self.op("Sub", [ones, one])], to=TensorProto.INT32)
        shape = self.op("Shape", ["attention_mask"])
        total = self.op("Gather", [shape, self.tensor("index", np.array(1))], axis=0)
        total = self.op("Cast", [total], to=TensorProto.INT32)
        angles = np.arange(config["max_position_embeddings"])[:, None] * 10000.0 ** (
            -np.arange(config["head_dim"] // 2) * 2 / config["head_dim"]
        )
        tables = [self.tensor(f"{wave.__name__}_cache", wave(angles).astype(np.float32)) for wave in (np.cos, np.sin)]
        x = self.op("Gather", [self.tensor("embed", weights["model.embed_tokens.weight"]), "input_ids"])
        norm = weights["model.layers.0.input_layernorm.weight"]
        normed = self.op(
            "SimplifiedLayerNormalization", [x, self.tensor("norm.first", norm)], axis=-1, epsilon=eps, stash_type=1
        )
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            qkv = np.concatenate([weights[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv"])
            caches = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
            presents = [f"present.{layer}.{part}" for part in ("key", "value")]
            mixed = self.op(
                "GroupQueryAttention",
                [self.product(normed, qkv, f"{at}.qkv"), "", "", *caches, past_end, total, *tables],
                domain="com.microsoft",
                more=presents,
                num_heads=heads,
                kv_num_heads=kv_heads,
                do_rotary=1,
            )
            branch = self.product(mixed, weights[f"{at}.self_attn.o_proj.weight"], f"{at}.o")
            normed, x = self.skip(x, branch, weights[f"{at}.post_attention_layernorm.weight"], eps)
            gate, up = (self.product(normed, weights[f"{at}.mlp.{n}_proj.weight"], f"{at}.{n}") for n in ("gate", "up"))
            active = self.op("Mul", [gate, self.op("Sigmoid", [gate])])
            branch = self.product(self.op("Mul", [active, up]), weights[f"{at}.mlp.down_proj.weight"], f"{at}.down")
            last = layer + 1 == config["num_hidden_layers"]
            weight = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
            normed, x = self.skip(x, branch, weights[weight], eps)
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        self.product(normed, head, "head", out="logits")

    def tensor(self, name: str, array: npt.NDArray[Any]) -> str:
        """Store a tensor in the file of weights, and small integers in the graph; return its name."""
        if array.dtype == np.int64:
            self.tensors.append(onnx.numpy_helper.from_array(array, name))
            return name
        proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        proto.data_location = TensorProto.EXTERNAL
        content = np.ascontiguousarray(array).tobytes()
        for key, value in (("location", DATA), ("offset", len(self.data)), ("length", len(content))):
            proto.external_data.add(key=key, value=str(value))
        self.data += content
        self.tensors.append(proto)
        return name

    def op(
        self,
        kind: str,
        inputs: list[str],
        *,
        domain: str = "",
        more: Sequence[str] = (),
        out: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node; return its first output."""
        name = f"/{kind}_{len(self.nodes)}"
        out = out or f"{name}/out"
        self.nodes.append(helper.make_node(kind, inputs, [out, *more], name, domain=domain, **attributes))
        return out

    def skip(self, x: str, branch: str, weight: npt.NDArray[np.float32], eps: float) -> tuple[str, str]:
        """Append the sum of stream and branch, and its norm."""
        name = self.tensor(f"norm.{len(self.nodes)}", weight)
        kind, total = "SkipSimplifiedLayerNormalization", f"sum_{len(self.nodes)}"
        normed = self.op(kind, [x, branch, name], domain="com.microsoft", more=["", "", total], epsilon=eps)
        return normed, total

    def product(self, x: str, weight: npt.NDArray[np.float32], name: str, out: str = "") -> str:
        """Append a product with a matrix [out, in]."""
        if self.blocks is None:
            return self.op("MatMul", [x, self.tensor(name, weight.T)], out=out)
        parts = nearest(weight, self.blocks).packed_parts()
        stored = [self.tensor(f"{name}.{part}", array) for part, array in parts.items()]
        return self.op(
            "MatMulNBits", [x, *stored], domain="com.microsoft", out=out, K=weight.shape[1], N=weight.shape[0],
            bits=self.blocks.bits, block_size=self.blocks.block_size, accuracy_level=4,
        )  # fmt: skip

    def _model(self, config: dict[str, Any]) -> onnx.ModelProto:
        heads, vocab = config["num_key_value_heads"], config["vocab_size"]

        def port(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, shape)

        caches = [(n, part) for n in range(config["num_hidden_layers"]) for part in ("key", "value")]
        cache = ["batch", heads, "capacity", config["head_dim"]]
        inputs = [port(name, TensorProto.INT64, ["batch", name]) for name in ("input_ids", "attention_mask")]
        inputs += [port(f"past_key_values.{n}.{part}", TensorProto.FLOAT, cache) for n, part in caches]
        outputs = [port("logits", TensorProto.FLOAT, ["batch", "input_ids", vocab])]
        outputs += [port(f"present.{n}.{part}", TensorProto.FLOAT, cache) for n, part in caches]
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, self.tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _config(self, config: dict[str, Any]) -> dict[str, Any]:
        decoder = {"filename": GRAPH, "inputs": {"input_ids": "input_ids"}, "outputs": {"logits": "logits"}}
        fields = {"type": "llama", "context_length": config["max_position_embeddings"], "eos_token_id": 0}
        return {"model": {**fields, "decoder": decoder}}


def built(checkpoint: Path, out: Path, precision: str, **options: str) -> Path:
    """Return the folder that onnxruntime-genai's own builder makes of a checkpoint."""
    extra = [f"{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", out, "-p", precision]
    command += ["-e", "cpu", "-c", out.parent / "cache", *(["--extra_options", *extra] if extra else [])]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        cwd=out.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out
