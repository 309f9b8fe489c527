"""Quantized tiny bundles: presets by a few switches, and what the tests read out of a bundle by themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.contract import GraphContract, Port
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.matrix import project
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.precision import BlockFormat, KVType
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.preset import Format, Preset
from shortstack.quant.spec import QuantizeSpec
from shortstack.threads import make_thread_pool

INT4, INT8 = BlockFormat(4), BlockFormat(8)
INT4_OFFSETS = BlockFormat(4, has_offsets=True)
_RESHAPED = re.compile(r"(.*\.codes)\.\d+x\d+")  # the same bytes, named by the shape that an embedding reads them in
FEW_TOKENS = 1024  # of calibration: a tiny model has seen enough
PROMPT = list(range(20, 44))


def preset(weights: Format, kv_cache: KVType = "float", **changes: Any) -> Preset:
    """Rounds to nearest, to one format everywhere but for what is changed; offsets in layers alone."""
    plain = None if weights is None else replace(weights, has_offsets=False)
    fields: dict[str, Any] = {"weights": weights, "head": plain, "embedding": plain, "kv_cache": kv_cache}
    return Preset(**{"name": "test", "summary": "", "method": "rtn", **fields, **changes})


@dataclass(frozen=True)
class QuantizedBundles:
    """Quantized bundles, each made once, without a report."""

    folder: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def __call__(self, bundle: Path, mix: Preset, **options: Any) -> Path:
        """The quantized bundle; not to be changed. Options are those of QuantizeSpec."""
        key = repr((bundle, mix, sorted(options.items())))
        if key not in self._made:
            out = self.folder / f"quantized-{len(self._made):03d}"
            fields: dict[str, Any] = {"calibration_tokens": FEW_TOKENS, **options}
            quantize_bundle(QuantizeSpec(bundle, out, mix, **fields))
            self._made[key] = out
        return self._made[key]


@dataclass(frozen=True)
class Stored:
    """Where weights.data holds one tensor."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, folder: Path) -> npt.NDArray[Any]:
        count = int(np.prod(self.shape))
        return np.fromfile(folder / names.WEIGHTS_FILE, self.dtype, count, offset=self.offset).reshape(self.shape)

    def write(self, folder: Path, array: npt.NDArray[Any]) -> None:
        assert array.size == int(np.prod(self.shape))
        with (folder / names.WEIGHTS_FILE).open("r+b") as file:
            file.seek(self.offset)
            file.write(np.ascontiguousarray(array, self.dtype).tobytes())


def stored_tensors(folder: Path) -> Mapping[str, Stored]:
    """Every tensor that the graphs of a bundle refer to in weights.data, read with onnx alone."""
    found: dict[str, Stored] = {}
    for segment in open_bundle(folder).manifest.plan.segments:
        graph = onnx.load(folder / names.segment_file(segment.start, segment.end), load_external_data=False).graph
        for tensor in graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
                name = _RESHAPED.sub(r"\1", tensor.name)
                found.setdefault(name, Stored(int(where["offset"]), tuple(tensor.dims), dtype))
    return found


def open_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session in the threads that all sessions of a process share."""
    make_thread_pool()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def product_graph(folder: Path, tensors: Mapping[str, BlockTensor]) -> tuple[ir.Model, Path]:
    """A graph of the products of one input ``x`` with each matrix, each output named as its matrix; and the weights."""
    with WeightStore(folder) as store:
        for name, tensor in tensors.items():
            store.add_blocks(name, tensor, "float32")
    source = Port("x", "float32", ("batch", "seq", "width"))
    results = [Port(name, "float32", ("batch", "seq", "rows")) for name in tensors]
    g = GraphBuilder("test", store)
    x = g.input(source)
    outputs = {name: project(g, x, name, f"/{name}") for name in tensors}
    model = g.finish(GraphContract((source,), tuple(results)), outputs, "test 0")
    ir.external_data.load_to_model(model)
    return model, folder / names.WEIGHTS_FILE


def unpacked(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.float64]:
    """Packed rows as the kernels' documentation describes them: the first code of a byte in its lowest bits."""
    lowest_first = np.unpackbits(packed.reshape(len(packed), -1), axis=1, bitorder="little")
    codes = lowest_first.reshape(len(packed), -1, bits) @ (1 << np.arange(bits))
    return codes[:, :count].astype(np.float64)


def read_matrix(folder: Path, name: str, width: int) -> npt.NDArray[np.float64]:
    """A matrix [out, in] of a bundle, its blocks put together again by the words of graphs/precision.py."""
    block_format, tensors = open_bundle(folder).manifest.precision.weights[name], stored_tensors(folder)
    size, bits = block_format.block_size, block_format.bits
    scales = tensors[f"{name}.scales"].read(folder).astype(np.float64)
    rows, blocks = scales.shape
    codes = unpacked(tensors[f"{name}.codes"].read(folder).reshape(rows, -1), bits, blocks * size)
    zeros = np.full((rows, blocks), 1 << (bits - 1), np.float64)
    if f"{name}.zero_points" in tensors:
        zeros = unpacked(tensors[f"{name}.zero_points"].read(folder), bits, blocks)
    whole = np.repeat(scales, size, axis=1) * (codes - np.repeat(zeros, size, axis=1))
    found, behind = whole[:, :width], width + block_format.side_columns
    if block_format.has_offsets:  # a further column per block, the last ones
        found = found + np.repeat(whole[:, behind : behind + width // size], size, axis=1)
    if block_format.side_columns:  # the left factor of a side product, right behind the weights
        found = found + whole[:, width:behind] @ read_matrix(folder, names.side_factor(name), width)
    return np.asarray(found)
