"""Folders of GPTQ, AWQ, compressed-tensors, fp8 and bitsandbytes: the weights that they are, and their bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from helpers import tolerances
from helpers.families import FamilyRow
from helpers.quantized_folders import (
    INT8_INPUTS,
    QuantizedFolder,
    Scheme,
    awq,
    bitsandbytes,
    compressed,
    fp8,
    gptq,
    write_plain,
    write_quantized,
)
from helpers.tiny_models import TinyModel, write_tokenizer
from shortstack.__main__ import run
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
from shortstack.runtime import DraftPolicy, load
from shortstack.runtime.commands.row_check import check_rows

LLAMA = TinyModel("wide", layers=3, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32, upper_scale=0.15)
TIED = TinyModel(
    "wide-tied", layers=3, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32, is_tied=True,
    upper_scale=0.15,
)  # fmt: skip
PADDED = TinyModel("wide-padded", layers=3, hidden=96, intermediate=128, heads=4, kv_heads=4, head_dim=24)
_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 256}
QWEN2 = FamilyRow("qwen2", "Qwen2", _SIZES)
PHI3 = FamilyRow("phi3", "Phi-3", _SIZES)
COHERE2 = FamilyRow("cohere2", "Command R7B", {**_SIZES, "logit_scale": 1.5})
"""Its checkpoints pair neighbouring columns of a head for rotation, so that rows of q and k move."""

EXITS = (1, 2)
KEPT: dict[str, Scheme] = {
    "GPTQ": gptq(),
    "GPTQ, asymmetric": gptq(4, 32, symmetric=False),
    "GPTQ v2, asymmetric": gptq(4, 128, symmetric=False, version=2),
    "GPTQ, one scale a row": gptq(4, -1, symmetric=False),
    "GPTQ, 8 bits": gptq(8, 128),
    "GPTQ, 3 bits": gptq(3, 64, symmetric=False),
    "GPTQ, 3 bits, symmetric": gptq(3, 64),
    "GPTQ, 2 bits": gptq(2, 32, version=2),
    "GPTQ, act-order": gptq(4, 32, act_order=True),
    "GPTQ, act-order, asymmetric": gptq(4, 64, symmetric=False, act_order=True),
    "GPTQ, mixed": gptq(4, 64, own_bits={"down_proj": 8}),
    "AWQ": awq(64),
    "AWQ, groups of 128": awq(128),
    "compressed-tensors": compressed(),
    "compressed-tensors, asymmetric": compressed(4, 128, symmetric=False),
    "compressed-tensors, act-order": compressed(4, 32, act_order=True),
    "compressed-tensors, 8 bits, channel": compressed(8, -1),
    "compressed-tensors, 8 bits, asymmetric": compressed(8, 64, symmetric=False),
    "compressed-tensors, W8A8": compressed(8, -1, layout="int-quantized", inputs=INT8_INPUTS),
}
FLOATS: dict[str, Scheme] = {
    "fp8": fp8(),
    "fp8, one scale": fp8("matrix"),
    "fp8, rows": fp8("rows"),
    "compressed-tensors, fp8": fp8("compressed-tensors"),
    "nf4": bitsandbytes(),
    "nf4, plain magnitudes": bitsandbytes(nested=False),
    "fp4": bitsandbytes("fp4"),
    "int8": bitsandbytes("int8"),
}
SCHEMES = KEPT | FLOATS
SPECULATED = (
    "GPTQ, asymmetric", "GPTQ, 8 bits", "GPTQ, act-order", "GPTQ, act-order, asymmetric", "GPTQ, mixed", "AWQ",
    "compressed-tensors, asymmetric", "compressed-tensors, W8A8",
)  # fmt: skip
QKV, O_PROJ = (names.layer_weight(0, f"attn.{name}_proj.weight") for name in ("qkv", "o"))
UP = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Folders:
    """Quantized folders and their bundles, each made once for this file."""

    folder: Path
    _made: dict[str, QuantizedFolder] = field(default_factory=dict)
    _bundles: dict[str, Path] = field(default_factory=dict)

    def __call__(self, model: TinyModel | FamilyRow, scheme: Scheme, name: str) -> QuantizedFolder:
        key = f"{model.name} {name}"
        if key not in self._made:
            place = self.folder / str(len(self._made))
            source = place / "floats"
            if isinstance(model, TinyModel):
                model.write(source)
            else:
                model.model().save_pretrained(source)
                write_tokenizer(source, 300)
            self._made[key] = write_quantized(source, place / "model", scheme)
        return self._made[key]

    def bundle(self, folder: QuantizedFolder, *, keep: bool, draft_vocab: int | None = None) -> Path:
        key = f"{folder.path} {keep} {draft_vocab}"
        if key not in self._bundles:
            out = self.folder / f"bundle-{len(self._bundles)}"
            export_bundle(ExportSpec(str(folder.path), out, EXITS, draft_vocab, keep_blocks=keep))
            self._bundles[key] = out
        return self._bundles[key]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("quantized-folders"))


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def matrices(folder: QuantizedFolder) -> tuple[ModelTensors, dict[str, str]]:
    checkpoint = open_checkpoint(str(folder.path))
    arch, spec = resolve(checkpoint)
    blocks = choose_blocks(checkpoint, matrix_sources(arch, spec))
    return ModelTensors(checkpoint, arch, spec, blocks), dict(blocks.kept)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *((LLAMA, name) for name in SCHEMES),
        *((QWEN2, name) for name in (*SPECULATED, "fp8", "nf4", "int8")),
        *((TIED, name) for name in ("GPTQ", "AWQ", "fp8")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_weights_are_those_that_the_tool_stores_bit_for_bit(
    folders: Folders, model: TinyModel | FamilyRow, name: str
) -> None:
    folder = folders(model, SCHEMES[name], name)
    checkpoint = open_checkpoint(str(folder.path))
    assert checkpoint.names() == folder.floats.keys()
    for tensor, expected in folder.floats.items():
        assert checkpoint.shape(tensor) == expected.shape
        same_bits(checkpoint.tensor(tensor), expected)
        if (stored := checkpoint.blocks(tensor)) is not None and stored.format is not None:
            block = stored.read()
            assert block.format == stored.format
            same_bits(block.dequantize(), expected)


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


@pytest.mark.parametrize("name", SCHEMES)
def test_a_bundle_of_floats_computes_what_the_folder_of_its_weights_computes(
    folders: Folders, tmp_path: Path, name: str
) -> None:
    folder = folders(LLAMA, SCHEMES[name], name)
    plain = write_plain(folder.path.parent / "floats", tmp_path / "plain", folder)
    expected = load(export_bundle(ExportSpec(str(plain), tmp_path / "expected", EXITS)).folder)
    found = load(folders.bundle(folder, keep=False))
    assert found.bundle.manifest.precision.is_float
    text = np.random.randint(3, LLAMA.vocab, 40).tolist()
    ours, theirs = found.activations(text), expected.activations(text)
    for depth, logits in theirs.heads.items():
        np.testing.assert_array_equal(ours.heads[depth], logits)


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
    drafted = accepted = 0
    for seed, exit_layer in enumerate(EXITS * 2):
        prompt = np.random.default_rng(seed).integers(3, 300, 5 + 4 * seed).tolist()
        expected = loaded.generate(prompt, max_new_tokens=24, ignore_eos=True).tokens
        result = loaded.generate(
            prompt,
            max_new_tokens=24,
            ignore_eos=True,
            strategy="self-speculative",
            exit_layer=exit_layer,
            draft=DraftPolicy(2 + seed, has_bonus=bool(seed % 2)),
        )
        assert result.tokens == expected
        drafted += result.stats.drafted
        accepted += result.stats.accepted
    assert 0 < accepted < drafted


@pytest.mark.parametrize("name", SPECULATED)
def test_rows_of_one_run_equal_rows_run_one_by_one(folders: Folders, name: str) -> None:
    loaded = load(folders.bundle(folders(LLAMA, KEPT[name], name), keep=True))
    text = np.random.randint(3, LLAMA.vocab, 30).tolist()
    assert [check.rows for check in check_rows(loaded, text) if not check.is_exact] == []


@pytest.mark.parametrize("name", ["GPTQ, act-order", "AWQ", "compressed-tensors, W8A8", "fp8", "nf4"])
def test_parity_compares_with_the_pytorch_model_of_the_dequantized_weights(
    folders: Folders, capsys: pytest.CaptureFixture[str], one_torch_thread: Callable[[], None], name: str
) -> None:
    one_torch_thread()
    folder = folders(QWEN2, SCHEMES[name], name)
    bundle = folders.bundle(folder, keep=name in KEPT)
    assert run(["parity", str(folder.path), str(bundle), "--prompts", "2", "--greedy-tokens", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(weight["relative"] == 0 for weight in report["weights"])
    assert bool(report["weights"]) == (name in KEPT)


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


def test_a_stack_of_several_widths_becomes_int8(folders: Folders) -> None:
    folder = folders(LLAMA, gptq(4, 64, own_bits={"v_proj": 8}), "v in 8 bits")
    formats = open_bundle(folders.bundle(folder, keep=True)).manifest.precision.weights
    assert formats[QKV] == BlockFormat(8)
    assert formats[O_PROJ] == BlockFormat(4, is_symmetric=True)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_of_8_and_4_bits_are_dequantized_in_one_line(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = folders(LLAMA, FLOATS[name], name)
    assert run(["export", str(folder.path), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err.splitlines()
    count = 7 * LLAMA.layers
    assert told[0].startswith(f"warning: dequantizing {count} matrices to floats, since no blocks hold such weights (")
    assert "--keep-blocks" not in "".join(told)


def test_a_plain_export_says_that_blocks_can_be_kept(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders(LLAMA, KEPT["AWQ"], "AWQ")
    assert run(["export", str(folder.path), str(tmp_path / "out"), "--json"]) == 0
    assert capsys.readouterr().err == (
        f"warning: dequantizing {5 * LLAMA.layers} matrices to floats (AWQ int4, groups of 64); "
        "--keep-blocks keeps the blocks bit for bit\n"
    )


@pytest.mark.parametrize("options", [[], ["--keep-blocks"]])
def test_that_activations_are_not_quantized_is_said(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    folder = folders(LLAMA, KEPT["compressed-tensors, W8A8"], "compressed-tensors, W8A8")
    assert run(["export", str(folder.path), str(tmp_path / "out"), *options]) == 0
    assert "compressed-tensors quantizes the inputs of matrices, too" in capsys.readouterr().err


def test_the_zero_points_of_gptqmodel_borrow_from_their_neighbours(folders: Folders, tmp_path: Path) -> None:
    folder = folders(LLAMA, gptq(4, 64, symmetric=False, version=2, meta={"quantizer": ["gptqmodel:1.4.0"]}), "v2")
    path = tmp_path / "model"
    shutil.copytree(folder.path, path)
    stored = load_file(path / "model.safetensors")
    words = stored[f"{UP}.qzeros"].view(np.uint32)
    words[:, 0] &= np.uint32(0xFFFF_FF0F)  # the second zero point of each group is 0
    zeros = np.stack([words >> np.uint32(4 * i) & np.uint32(15) for i in range(8)], axis=-1).reshape(len(words), -1)
    stored[f"{UP}.qzeros"] = (words - np.uint32(0x1111_1111)).view(np.int32)
    for name, value in stored.items():
        if name.endswith(".qzeros") and name != f"{UP}.qzeros":
            stored[name] = (value.view(np.uint32) - np.uint32(0x1111_1111)).view(np.int32)
    save_file(stored, path / "model.safetensors")
    edit_config(path, checkpoint_format="gptq")
    found = open_checkpoint(str(path)).blocks(f"{UP}.weight")
    assert found is not None
    block = found.read()
    assert block.zero_points is not None
    np.testing.assert_array_equal(block.zero_points[:, ::2], zeros.T)  # groups of 64 are two blocks
    assert (zeros[:, 1] == 0).all()


def test_biases_of_zeros_that_old_tools_stored_are_left_out(folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(folders(LLAMA, KEPT["GPTQ"], "GPTQ").path, path)
    stored = load_file(path / "model.safetensors")
    stored[f"{UP}.bias"] = np.zeros(256, np.float16)
    save_file(stored, path / "model.safetensors")
    assert export_bundle(ExportSpec(str(path), tmp_path / "out", (1,), keep_blocks=True)).manifest.precision.weights


def test_a_folder_without_g_idx_is_read(folders: Folders, tmp_path: Path) -> None:
    folder, path = folders(LLAMA, KEPT["GPTQ"], "GPTQ"), tmp_path / "model"
    shutil.copytree(folder.path, path)
    stored = load_file(path / "model.safetensors")
    save_file({n: v for n, v in stored.items() if not n.endswith("g_idx")}, path / "model.safetensors")
    same_bits(open_checkpoint(str(path)).tensor(f"{UP}.weight"), folder.floats[f"{UP}.weight"])
