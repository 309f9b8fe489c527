"""``export --keep-blocks`` on folders of GPTQ, AWQ and compressed-tensors: bit for bit, in any order of inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from helpers import tolerances
from helpers.adapters import lora
from helpers.family_rows import FamilyRow
from helpers.quantized_cases import (
    COHERE2,
    EXITS,
    KEPT,
    LLAMA,
    PADDED,
    PHI3,
    QWEN2,
    SPECULATED,
    TIED,
    Folders,
)
from helpers.quantized_folders import (
    INT8_INPUTS,
    Packed,
    QuantizedFolder,
    Scheme,
    compressed,
    gptq,
)
from helpers.speculation import check_drafts
from helpers.tiny_models import TinyModel
from shortstack.__main__ import run
from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.arch import resolve
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.kept_blocks import KeptBlocks, choose_blocks
from shortstack.export.sources import matrix_sources
from shortstack.export.spec import ExportSpec
from shortstack.export.tensors import ModelTensors, pad_heads
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.ir.read_matrix import StoredMatrices
from shortstack.graphs.precision import BlockFormat
from shortstack.runtime import load
from shortstack.runtime.commands.row_check import check_rows

QKV, O_PROJ = (names.layer_weight(0, f"attn.{name}_proj.weight") for name in ("qkv", "o"))
UP = "model.layers.0.mlp.up_proj"


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def matrices(folder: QuantizedFolder) -> tuple[ModelTensors, dict[str, str]]:
    checkpoint = open_checkpoint(str(folder.path))
    arch, spec = resolve(checkpoint)
    blocks = choose_blocks(checkpoint, matrix_sources(arch, spec))
    return ModelTensors(checkpoint, arch, spec, blocks), dict(blocks.kept)


@pytest.mark.parametrize("name", KEPT)
def test_kept_blocks_hold_the_codes_of_the_folder_in_blocks_of_32(folders: Folders, name: str) -> None:
    folder = folders(LLAMA, KEPT[name], name)
    bundle = open_bundle(folders.bundle(folder, keep=True))
    read, kept = matrices(folder)
    assert len(kept) == 5 * LLAMA.layers
    stored = StoredMatrices(bundle)
    for matrix in kept:
        block_format = bundle.manifest.precision.weights[matrix]
        assert block_format.block_size == 32
        assert block_format.is_reordered == ("act-order" in name)
        ours = read.matrix(matrix)
        assert isinstance(ours, BlockTensor)
        same_bits(np.asarray(stored.matrix(matrix, ours.shape), np.float32), ours.dequantize())
    stacked = [folder.floats[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    same_bits(stored.matrix(QKV, (256, 128)), np.concatenate(stacked))
    same_bits(stored.matrix(O_PROJ, (128, 128)), folder.floats["model.layers.0.self_attn.o_proj.weight"])


@pytest.mark.parametrize("name", ["GPTQ, asymmetric", "GPTQ, act-order, asymmetric", "GPTQ, 8 bits", "AWQ"])
@pytest.mark.parametrize("model", [LLAMA, QWEN2], ids=lambda model: model.name)
def test_kept_blocks_compute_what_the_floats_compute_but_for_rounded_inputs(
    folders: Folders, model: TinyModel | FamilyRow, name: str
) -> None:
    folder = folders(model, KEPT[name], name)
    kept, floats = (load(folders.bundle(folder, keep=keep)) for keep in (True, False))
    texts = [np.random.randint(3, 300, 40).tolist() for _ in range(3)]
    ours, theirs = ([found.activations(text).heads for text in texts] for found in (kept, floats))
    for depth in theirs[0]:
        expected = np.concatenate([heads[depth] for heads in theirs])
        difference = np.concatenate([heads[depth] for heads in ours]) - expected
        assert 0 < np.sqrt(np.square(difference).mean()) < tolerances.QUANTIZED_SAME_WEIGHTS * expected.std()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *((LLAMA, name) for name in SPECULATED),
        *((QWEN2, name) for name in SPECULATED[:4]),
        (TIED, "GPTQ, act-order, asymmetric"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_self_speculation_emits_the_plain_tokens_of_a_bundle_with_kept_blocks(
    folders: Folders, model: TinyModel | FamilyRow, name: str
) -> None:
    loaded = load(folders.bundle(folders(model, KEPT[name], name), keep=True, draft_vocab=64))
    check_drafts(loaded, EXITS, 300, 24, 4)


@pytest.mark.parametrize("name", SPECULATED)
def test_rows_of_one_run_equal_rows_run_one_by_one(folders: Folders, name: str) -> None:
    loaded = load(folders.bundle(folders(LLAMA, KEPT[name], name), keep=True))
    text = np.random.randint(3, LLAMA.vocab, 30).tolist()
    assert [check.rows for check in check_rows(loaded, text) if not check.is_exact] == []


def test_an_order_is_stored_once_for_each_input_and_applied_before_the_product(folders: Folders) -> None:
    bundle = open_bundle(folders.bundle(folders(LLAMA, KEPT["GPTQ, act-order"], "GPTQ, act-order"), keep=True))
    gathers: list[str] = []
    for segment in bundle.manifest.plan.segments:
        graph = onnx.load(str(bundle.graph_path(segment)), load_external_data=False).graph
        orders = {tensor.name for tensor in graph.initializer if tensor.name.endswith(".order")}
        gathers += [node.input[1] for node in graph.node if node.op_type == "Gather" and node.input[1] in orders]
        for node in graph.node:
            assert node.op_type != "MatMulNBits" or len(node.input) <= 4  # no g_idx
    inputs = ("attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert sorted(gathers) == sorted(
        f"{names.layer_weights(layer)}.{name}.order" for layer in range(LLAMA.layers) for name in inputs
    )


def test_matrices_of_one_input_with_orders_of_their_own_become_int8_and_are_named(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders(LLAMA, gptq(4, 32, act_order=True, orders={"k_proj": 1, "up_proj": 2}), "own orders")
    assert run(["export", str(folder.path), str(tmp_path / "out"), "--keep-blocks", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kind = "GPTQ int4, groups of 32, act-order"
    assert printed["kept"] == {kind: 3 * LLAMA.layers}
    assert printed["requantized"] == {
        f"{kind} with other orders for one input": [
            names.layer_weight(layer, part)
            for layer in range(LLAMA.layers)
            for part in ("attn.qkv_proj.weight", "mlp.up_proj.weight")
        ]
    }
    stored = StoredMatrices(open_bundle(tmp_path / "out"))
    expected = folder.floats[f"{UP}.weight"]
    found = stored.matrix(names.layer_weight(0, "mlp.up_proj.weight"), expected.shape)
    assert 0 < np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    assert load(tmp_path / "out").generate([5, 6, 7], max_new_tokens=4, ignore_eos=True).tokens


@pytest.mark.parametrize("name", ["GPTQ, asymmetric", "AWQ", "compressed-tensors, asymmetric"])
def test_rows_of_a_fused_matrix_and_rows_that_move_keep_their_blocks(folders: Folders, name: str) -> None:
    for model in (PHI3, COHERE2):
        folder = folders(model, KEPT[name], name)
        read, kept = matrices(folder)
        assert len(kept) == 5 * 3
        checkpoint = open_checkpoint(str(folder.path))
        plain = ModelTensors(checkpoint, *resolve(checkpoint), KeptBlocks())
        for matrix in kept:
            ours, floats = read.matrix(matrix), plain.matrix(matrix)
            assert isinstance(ours, BlockTensor)
            assert isinstance(floats, np.ndarray)
            same_bits(ours.dequantize(), floats)
            same_bits(StoredMatrices(open_bundle(folders.bundle(folder, keep=True))).matrix(matrix, ours.shape), floats)


@pytest.mark.parametrize("name", ["GPTQ, asymmetric", "GPTQ, act-order"])
def test_padded_heads_are_zeros_whatever_the_zero_points_are(folders: Folders, name: str) -> None:
    folder = folders(PADDED, KEPT[name], name)
    read, kept = matrices(folder)
    attention = read.spec.layers[0].attention
    assert attention.cache_head_dim > attention.head_dim
    assert QKV in kept
    assert O_PROJ not in kept
    padded = [
        pad_heads(folder.floats[f"model.layers.0.self_attn.{part}_proj.weight"], PADDED.heads, attention)
        for part in "qkv"
    ]
    ours = read.matrix(QKV)
    assert isinstance(ours, BlockTensor)
    np.testing.assert_array_equal(ours.dequantize(), np.concatenate(padded))
    bundle = load(folders.bundle(folder, keep=True))
    assert bundle.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens


@pytest.mark.parametrize("act_order", [False, True])
def test_a_quantized_head_is_kept_and_trimmed_for_exits_with_its_order(folders: Folders, act_order: bool) -> None:
    model = TinyModel("even", layers=2, hidden=128, intermediate=128, heads=4, kv_heads=2, head_dim=32, vocab=320)
    scheme = gptq(4, 32, symmetric=False, act_order=act_order, lm_head=True)
    scheme = Scheme(scheme.pack, scheme.config, suffixes=("_proj.weight", "lm_head.weight"))
    folder = folders(model, scheme, f"head {act_order}")
    out = folder.path.parent / "out"
    bundle = export_bundle(ExportSpec(str(folder.path), out, (1,), 64, keep_blocks=True))
    stored, head = StoredMatrices(bundle), folder.floats["lm_head.weight"]
    same_bits(stored.matrix(names.LM_HEAD, head.shape), head)
    ids = np.load(out / names.draft_vocab_file(1))
    same_bits(stored.matrix(names.exit_weight(1, "head.weight"), (64, 128)), head[ids])
    model_ = load(out)
    plain = model_.generate([5, 6, 7], max_new_tokens=16, ignore_eos=True).tokens
    assert (
        model_.generate([5, 6, 7], max_new_tokens=16, ignore_eos=True, strategy="self-speculative", exit_layer=1).tokens
        == plain
    )


def test_matrices_that_are_left_as_floats_need_no_list_of_names(folders: Folders) -> None:
    scheme = gptq(4, 64)
    scheme = Scheme(scheme.pack, {**scheme.config, "dynamic": {r"-:.*layers\.1\..*": {}}}, leaves=("layers.1.",))
    folder = folders(LLAMA, scheme, "a layer of floats")
    bundle = open_bundle(folders.bundle(folder, keep=True))
    formats = bundle.manifest.precision.weights
    assert {name.split(".")[2] for name in formats} == {"0", "2"}
    same_bits(
        StoredMatrices(bundle).matrix(names.layer_weight(1, "mlp.up_proj.weight"), (256, 128)),
        folder.floats["model.layers.1.mlp.up_proj.weight"],
    )


def test_a_stack_of_several_widths_is_kept_in_the_widest(folders: Folders) -> None:
    folder = folders(LLAMA, gptq(4, 64, own_bits={"v_proj": 8}), "v in 8 bits")
    bundle = open_bundle(folders.bundle(folder, keep=True))
    formats = bundle.manifest.precision.weights
    assert formats[QKV] == BlockFormat(8, is_symmetric=True)
    assert formats[O_PROJ] == BlockFormat(4, is_symmetric=True)
    stacked = [folder.floats[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    same_bits(StoredMatrices(bundle).matrix(QKV, (256, 128)), np.concatenate(stacked))


def test_an_adapter_is_added_to_the_dequantized_weights_and_its_matrices_become_int8(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders(LLAMA, KEPT["GPTQ, asymmetric"], "GPTQ, asymmetric")
    adapter = lora(tmp_path / "adapter", folder.path.parent / "floats", target_modules=["o_proj"])
    out = tmp_path / "out"
    options = ["--keep-blocks", "--adapter", str(adapter), "--json"]
    assert run(["export", str(folder.path), str(out), *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["kept"] == {"GPTQ int4, groups of 32": 4 * LLAMA.layers}
    assert list(printed["requantized"]) == ["GPTQ int4, groups of 32 with adapter"]
    tensor = "model.layers.0.self_attn.o_proj.weight"
    merged = AdaptedCheckpoint(open_checkpoint(str(folder.path)), adapter).tensor(tensor)
    assert np.abs(merged - folder.floats[tensor]).max() > 0.05
    found = StoredMatrices(open_bundle(out)).matrix(O_PROJ, merged.shape)
    assert 0 < np.abs(found - merged).max() < 0.01 * np.abs(merged).max()


@pytest.mark.parametrize("name", ["GPTQ, act-order, asymmetric", "compressed-tensors, asymmetric"])
def test_half_precision_holds_the_scales_exactly(folders: Folders, tmp_path: Path, name: str) -> None:
    folder = folders(LLAMA, KEPT[name], name)
    bundle = export_bundle(ExportSpec(str(folder.path), tmp_path / "out", (1,), dtype="float16", keep_blocks=True))
    expected = folder.floats[f"{UP}.weight"]
    same_bits(StoredMatrices(bundle).matrix(names.layer_weight(0, "mlp.up_proj.weight"), expected.shape), expected)
    assert load(bundle.folder).generate([5, 6, 7], max_new_tokens=4, ignore_eos=True).tokens


def test_a_quantized_embedding_is_looked_up_in_its_blocks_and_is_the_head(folders: Folders) -> None:
    scheme = compressed(4, 32, symmetric=False)
    scheme = Scheme(scheme.pack, scheme.config, suffixes=("_proj.weight", "embed_tokens.weight"))
    folder = folders(TIED, scheme, "embedding")
    kept, floats = (load(folders.bundle(folder, keep=keep)) for keep in (True, False))
    embedding = folder.floats[names.EMBED_TOKENS]
    same_bits(StoredMatrices(kept.bundle).matrix(names.EMBED_TOKENS, embedding.shape), embedding)
    text = np.random.randint(3, TIED.vocab, 40).tolist()
    ours, theirs = kept.activations(text).heads[3], floats.activations(text).heads[3]
    assert 0 < np.sqrt(np.square(ours - theirs).mean()) < tolerances.QUANTIZED_SAME_WEIGHTS * theirs.std()


def test_compressed_tensors_may_describe_several_kinds_of_matrices(folders: Folders) -> None:
    parts = {"down_proj": compressed(8, -1), "o_proj": compressed(4, 64, symmetric=False)}
    usual, groups = compressed(4, 64), {}

    def pack(weight: np.ndarray, layer: str) -> Packed:
        return parts.get(layer.rpartition(".")[2], usual).pack(weight, layer)

    for number, scheme in enumerate((usual, *parts.values(), usual)):
        groups[f"group_{number}"] = scheme.config["config_groups"]["group_0"]
    groups["group_3"] = {**groups["group_3"], "targets": ["re:.*gate_proj"], "input_activations": INT8_INPUTS}
    folder = folders(LLAMA, Scheme(pack, {**usual.config, "config_groups": groups}), "several groups")
    bundle = open_bundle(folders.bundle(folder, keep=True))
    formats = bundle.manifest.precision.weights
    down = names.layer_weight(0, "mlp.down_proj.weight")
    assert formats[QKV] == BlockFormat(4, is_symmetric=True)
    assert formats[O_PROJ] == BlockFormat(4)
    assert formats[down] == BlockFormat(8, is_symmetric=True)
    stored = StoredMatrices(bundle)
    same_bits(stored.matrix(down, (128, 256)), folder.floats["model.layers.0.mlp.down_proj.weight"])
    same_bits(stored.matrix(O_PROJ, (128, 128)), folder.floats["model.layers.0.self_attn.o_proj.weight"])
