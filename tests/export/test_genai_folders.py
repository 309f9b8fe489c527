"""Folders that onnxruntime-genai runs: lifted into bundles with the same weights, or refused by the first odd node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from helpers.bad_input import Refused
from helpers.exit_nodes import CachedGraphs
from helpers.family_rows import FamilyRow
from helpers.genai import WholeGraph, genai_tokens, need_genai, segment_tokens
from helpers.genai_folders import CONFIG, DATA, GRAPH, GraphWriter, built
from helpers.tiny_models import TinyBundles, TinyModel, write_tokenizer
from helpers.tolerances import QUANTIZED_SAME_WEIGHTS
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.ir.block_tensor import nearest
from shortstack.graphs.ir.read_matrix import StoredMatrices
from shortstack.graphs.precision import BlockFormat

SMALL = TinyModel("genai", layers=3)
TIED = TinyModel("genai-tied", layers=2, is_tied=True, hidden=96)
PIECES = (9, 1, 4, 2)
LARGEST = 2e-5
"""Logits of a bundle against those of the graph that it was lifted from, in float32, in standard deviations. Measured:
at most 2.1e-6 over nine families."""


def apart(bundle: Path, graph: Path, head_dim: int) -> tuple[float, float]:
    """Return how far logits of a bundle are from a graph's, in standard deviations: at most, and root mean square."""
    graphs, whole = CachedGraphs(bundle, 1, 40), WholeGraph(graph, 39, head_dim)
    hidden = graphs.bundle.manifest.spec.hidden_size
    tokens, past = [int(t) for t in np.random.default_rng(1).integers(5, 290, sum(PIECES))], 0
    found: list[np.ndarray] = []
    for rows in PIECES:
        piece = tokens[past : past + rows]
        ours = graphs.run(np.array([piece], np.int64), past, rows, np.zeros((1, rows, hidden), np.float32))
        theirs = whole.run(piece, past)
        found.append((ours[-1][names.LOGITS][0] - theirs) / theirs.std())
        past += rows
    far = np.concatenate(found)
    return float(np.abs(far).max()), float(np.sqrt(np.square(far).mean()))


@pytest.fixture(scope="module")
def folder(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of floats; not to be changed."""
    return GraphWriter(tiny_bundles.checkpoint(SMALL)).write(tmp_path_factory.mktemp("genai") / "floats")


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


def test_a_folder_of_floats_becomes_the_bundle_of_the_checkpoint_that_it_was_built_from(
    folder: Path, tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    bundle = export_bundle(ExportSpec(str(folder), tmp_path / "bundle", (1,)))
    plain = open_bundle(tiny_bundles.bundle(SMALL, 1))
    assert bundle.manifest.spec == plain.manifest.spec
    assert bundle.manifest.weights_sha256 == plain.manifest.weights_sha256
    assert apart(bundle.folder, folder / GRAPH, SMALL.head_dim)[0] <= LARGEST


@pytest.mark.parametrize(
    "block_format",
    [
        BlockFormat(4, 32, is_symmetric=True),
        BlockFormat(4, 32),
        BlockFormat(4, 16),
        BlockFormat(4, 128),
        BlockFormat(8, 64, is_symmetric=True),
    ],
    ids=str,
)
def test_blocks_are_kept_bit_for_bit_and_long_ones_become_several_of_32(
    block_format: BlockFormat, tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    checkpoint = tiny_bundles.checkpoint(TIED)
    folder = GraphWriter(checkpoint, block_format).write(tmp_path / "folder")
    bundle = export_bundle(ExportSpec(str(folder), tmp_path / "bundle", (1,), keep_blocks=True))
    stored = bundle.manifest.precision.weights["model.layers.0.mlp.down_proj.weight"]
    size = min(block_format.block_size, 32)
    assert stored == BlockFormat(block_format.bits, size, is_symmetric=block_format.is_symmetric)
    name = "model.layers.0.mlp.down_proj.weight"
    own = nearest(open_checkpoint(str(checkpoint)).tensor(name), block_format)
    kept = open_checkpoint(str(folder)).blocks(name)
    assert kept is not None
    in_bundle = StoredMatrices(bundle).matrix(name, own.shape)
    np.testing.assert_array_equal(in_bundle, own.dequantize())
    np.testing.assert_array_equal(kept.read().codes, own.codes)
    np.testing.assert_array_equal(kept.read().dequantize(), own.dequantize())
    np.testing.assert_array_equal(open_checkpoint(str(folder)).tensor(name), own.dequantize())
    assert apart(bundle.folder, folder / GRAPH, TIED.head_dim)[1] <= QUANTIZED_SAME_WEIGHTS


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize(
    "row",
    [
        FamilyRow("llama", "", {"head_dim": 16}),
        pytest.param(FamilyRow("qwen3", "", {"head_dim": 32}), marks=pytest.mark.slow),
        pytest.param(FamilyRow("qwen2", ""), marks=pytest.mark.slow),
        pytest.param(FamilyRow("mistral", "", {"head_dim": 32, "sliding_window": None}), marks=pytest.mark.slow),
        pytest.param(FamilyRow("granite", "", {"logits_scaling": 0.5}), marks=pytest.mark.slow),
        pytest.param(
            FamilyRow("gemma2", "", {"head_dim": 32, "final_logit_softcapping": 3.0, "sliding_window": 6}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda row: row.model_type if isinstance(row, FamilyRow) else row,
)
def test_a_bundle_decodes_what_genai_decodes_with_its_builders_graph(
    row: FamilyRow, precision: str, tmp_path: Path
) -> None:
    need_genai()
    checkpoint = tmp_path / "checkpoint"
    row.model().save_pretrained(checkpoint)
    write_tokenizer(checkpoint, 300)
    folder = built(checkpoint, tmp_path / "built", precision)
    keep = precision != "fp32"
    bundle = export_bundle(ExportSpec(str(folder), tmp_path / "bundle", (1,), keep_blocks=keep))
    head_dim = bundle.manifest.spec.layers[0].attention.head_dim
    assert bundle.manifest.spec.model_type == row.model_type
    most, usual = apart(bundle.folder, folder / GRAPH, head_dim)
    assert usual <= QUANTIZED_SAME_WEIGHTS if keep else most <= LARGEST
    if not keep:
        prompt = list(range(20, 29))
        assert genai_tokens(folder, prompt) == segment_tokens(bundle.folder, prompt)


def test_the_export_can_carry_a_graph_for_genai_again(folder: Path, tmp_path: Path) -> None:
    assert run(["export", str(folder), str(tmp_path / "bundle"), "-e", "1", "--genai"]) == 0
    assert apart(tmp_path / "bundle", tmp_path / "bundle" / names.GENAI_GRAPH_FILE, 16)[0] == 0.0


Change = Callable[[onnx.ModelProto], object]


def add_node(model: onnx.ModelProto) -> None:
    product = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    model.graph.node.append(helper.make_node("Neg", [product.output[0]], ["unused"], "/odd/Neg"))


def exchange_op(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "Tanh"


def other_stream(model: onnx.ModelProto) -> None:
    skips = [node for node in model.graph.node if node.op_type == "SkipSimplifiedLayerNormalization"]
    skips[2].input[0] = skips[0].output[3]


def without_fused_attention(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "MultiHeadAttention"


def with_sink(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    node.input.extend(["", "", node.input[7]])


def no_heads(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    next(entry for entry in node.attribute if entry.name == "kv_num_heads").i = 0


def external(key: str, value: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "head")
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return change


def other_shape(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "head")
    tensor.dims[:] = [tensor.dims[1], tensor.dims[0]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add_node, ["node /odd/Neg, a Neg does not fit the pattern"]),
        (exchange_op, ["does not fit the pattern", "one activation"]),
        (other_stream, ["a SkipSimplifiedLayerNormalization does not fit", "the residual stream"]),
        (without_fused_attention, ["has no GroupQueryAttention node", "found MultiHeadAttention"]),
        (with_sink, ["a GroupQueryAttention does not fit", "attention without head_sink"]),
        (no_heads, ["a GroupQueryAttention does not fit", "whole number of heads"]),
        (external("location", "../other.data"), ["tensor head", "plain file name"]),
        (external("location", "absent.data"), ["absent.data, which is missing"]),
        (external("offset", "99999999"), ["tensor head", "within the"]),
        (external("offset", "-4"), ["tensor head", "-4"]),
        (external("length", "12"), ["tensor head", "12 bytes"]),
        (other_shape, ["the LM head", "expected [300, 64]"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_graph_that_does_not_fit_is_refused_by_name(
    change: Change, says: list[str], damaged: Path, tmp_path: Path, refused: Refused
) -> None:
    model = onnx.load(damaged / GRAPH, load_external_data=False)
    change(model)
    (damaged / GRAPH).write_bytes(model.SerializeToString())
    refused(["export", damaged, tmp_path / "bundle"], *says)
    assert not (tmp_path / "bundle").exists()


def test_data_that_is_a_link_out_of_the_folder_is_refused(damaged: Path, tmp_path: Path, refused: Refused) -> None:
    (damaged / DATA).rename(tmp_path / "elsewhere.data")
    (damaged / DATA).symlink_to(tmp_path / "elsewhere.data")
    refused(["export", damaged, tmp_path / "bundle"], "leads out of the folder")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "genai_config.json"),
        (b"{}", "genai_config.json: model is missing"),
        (b'{"model": {"type": "llama", "context_length": 64}}', "model.decoder is missing"),
        (b'{"model": {"type": "llama", "decoder": {"filename": "../model.onnx"}}}', "plain file name"),
        (b'{"model": {"type": "llama", "context_length": 64, "decoder": {"filename": "absent.onnx"}}}', "absent.onnx"),
        (
            b'{"model": {"type": "llama", "context_length": 64, "decoder": {"filename": "tokenizer.json"}}}',
            "not an ONNX graph",
        ),
    ],
)
def test_a_config_that_names_no_graph_is_refused(
    content: bytes, says: str, damaged: Path, tmp_path: Path, refused: Refused
) -> None:
    (damaged / CONFIG).write_bytes(content)
    refused(["export", damaged, tmp_path / "bundle"], says)


def test_scaled_rotary_frequencies_are_read_out_of_the_tables(tmp_path: Path, damaged: Path) -> None:
    model = onnx.load(damaged / GRAPH)
    frequencies = 10000.0 ** (-np.arange(8) / 8.0)
    frequencies[5:] /= 4.0
    angles = np.arange(SMALL.context)[:, None] * frequencies
    for tensor in model.graph.initializer:
        if tensor.name in ("cos_cache", "sin_cache"):
            wave = np.cos if tensor.name == "cos_cache" else np.sin
            tensor.CopyFrom(onnx.numpy_helper.from_array(wave(angles).astype(np.float32), tensor.name))
    onnx.save(model, damaged / GRAPH)
    bundle = export_bundle(ExportSpec(str(damaged), tmp_path / "bundle", (1,)))
    assert bundle.manifest.spec.ropes[0].scaling.kind == "factors"
    assert apart(bundle.folder, damaged / GRAPH, SMALL.head_dim)[0] <= LARGEST


def test_weights_that_are_not_finite_are_refused(damaged: Path, tmp_path: Path, refused: Refused) -> None:
    content = bytearray((damaged / DATA).read_bytes())
    content[-4:] = np.array([np.nan], np.float32).tobytes()
    (damaged / DATA).write_bytes(content)
    refused(["export", damaged, tmp_path / "bundle"], "tensor lm_head.weight", "NaN or infinity")


def test_the_base_model_is_lifted_into_the_same_config_whatever_type_the_folder_says(damaged: Path) -> None:
    config = json.loads((damaged / CONFIG).read_text())
    config["model"]["type"] = "decoder"
    (damaged / CONFIG).write_text(json.dumps(config))
    assert open_checkpoint(str(damaged)).config.read(str, "model_type") == "llama"


def test_parity_compares_the_bundle_with_the_weights_of_the_folder(folder: Path, tmp_path: Path) -> None:
    export_bundle(ExportSpec(str(folder), tmp_path / "bundle", (1,)))
    assert run(["parity", str(folder), str(tmp_path / "bundle")]) == 0
