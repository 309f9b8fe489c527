"""``export --keep-blocks``: a file's blocks reach the bundle, bit for bit or nearly, and the command says which."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from helpers import block_kinds, tolerances
from helpers.bad_input import Refused, left_behind
from helpers.gguf_files import HEAD_DIM, SMALL, Kind, byte_level, of_checkpoint, weights, write
from helpers.speculation import check_drafts
from helpers.tiny_models import BASE, SPECULATOR, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.arch import resolve
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.gguf_blocks import BLOCK_TYPES
from shortstack.export.kept_blocks import KeptBlocks, choose_blocks
from shortstack.export.sources import matrix_sources
from shortstack.export.spec import ExportSpec
from shortstack.export.tensors import ModelTensors, pad_heads
from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle, describe_files, open_bundle, write_manifest
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.precision import BlockFormat
from shortstack.runtime import load

EXACT = ["MXFP4", "Q4_0", "Q5_0", "Q8_0"]  # whose blocks are narrow enough for the smallest files here
EXITS = (1, 3, 4)
TOKENS = 32
WIDE = replace(SMALL, name="gguf-wide", head_dim=16)  # heads that need no padding; hidden 32, heads * head_dim 64
PADDED = replace(SPECULATOR, name="speculator-padded", head_dim=24, is_tied=True, attention_bias=True)
QKV = names.layer_weight(0, "attn.qkv_proj.weight")
O_PROJ = names.layer_weight(0, "attn.o_proj.weight")

ROUNDED_ACTIVATIONS = 0.05
"""Mean difference of a logit between kept blocks and the same weights in float32, by the logits' standard deviation.

The kernel rounds activations to int8, 32 at a time. Measured on SPECULATOR: 0.022 to 0.024 at every depth, Q4_0 and
Q8_0 alike (0.33 for the worst of 43,000 logits). With float activations the logits equal the float bundle's bits."""


def quantized(value: np.ndarray, kind: str) -> np.ndarray:
    """Return a matrix as a file in blocks of a type holds it."""
    return block_kinds.dequantized(value, Kind[kind])


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


def opened(file: Path) -> tuple[ModelTensors, KeptBlocks]:
    checkpoint = open_checkpoint(str(file))
    arch, spec = resolve(checkpoint)
    blocks = choose_blocks(checkpoint, matrix_sources(arch, spec))
    return ModelTensors(checkpoint, arch, spec, blocks), blocks


def dequantized(tensors: ModelTensors, name: str) -> np.ndarray:
    matrix = tensors.matrix(name)
    assert isinstance(matrix, BlockTensor)
    return matrix.dequantize()


def wide_weights() -> dict[str, np.ndarray]:
    """Weights whose heads need no padding."""
    found = weights()
    for name, shape in {"attn_q": (64, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 64)}.items():
        found[f"blk.0.{name}.weight"] = np.random.standard_normal(shape).astype(np.float32)
    return found


def tiny_file(tiny_bundles: TinyBundles, tiny: TinyModel, file: Path, kind: str | None, **options: Any) -> Path:
    """A tiny model as a GGUF file with a tokenizer."""
    tensors = of_checkpoint(tiny_bundles.checkpoint(tiny), tiny.layers)
    quantization = None if kind is None else Kind[kind]
    return write(file, tensors, edit=byte_level, quantization=quantization, tiny=tiny, **options)


def graphs(bundle: Bundle) -> list[onnx.GraphProto]:
    paths = [bundle.graph_path(segment) for segment in bundle.manifest.plan.segments]
    return [onnx.load(str(path), load_external_data=False).graph for path in paths]


def places(bundle: Bundle, name: str) -> dict[str, tuple[int, int]]:
    """Return offset and length of a tensor in weights.data, by each name that a graph has for it, reshaped or not."""
    found = {}
    for graph in graphs(bundle):
        for tensor in graph.initializer:
            if tensor.name == name or tensor.name.startswith(f"{name}."):
                place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
                found[tensor.name] = (place["offset"], place["length"])
    return found


def stored_bytes(bundle: Bundle, name: str) -> bytes:
    """Return a tensor's bytes, which lie in one place under all its names."""
    ((offset, length),) = set(places(bundle, name).values())
    return (bundle.folder / names.WEIGHTS_FILE).read_bytes()[offset : offset + length]


@pytest.mark.parametrize("kind", EXACT)
def test_blocks_equal_what_gguf_dequantizes_with_q_and_k_in_rotate_half_order(tmp_path: Path, kind: str) -> None:
    tensors = wide_weights() | {"output.weight": weights()["token_embd.weight"]}
    read, blocks = opened(write(tmp_path / "m.gguf", tensors, quantization=Kind[kind], tiny=WIDE))
    assert set(blocks.kept.values()) == {kind}
    assert not blocks.requantized
    assert not blocks.floats
    for name, gguf_name in {
        names.EMBED_TOKENS: "token_embd",
        names.LM_HEAD: "output",
        O_PROJ: "blk.0.attn_output",
        names.layer_weight(0, "mlp.gate_proj.weight"): "blk.0.ffn_gate",
        names.layer_weight(0, "mlp.up_proj.weight"): "blk.0.ffn_up",
        names.layer_weight(0, "mlp.down_proj.weight"): "blk.0.ffn_down",
    }.items():
        same_bits(dequantized(read, name), quantized(tensors[f"{gguf_name}.weight"], kind))
    # Each row is quantized separately, so permuting, quantizing and permuting back equals quantizing.
    stacked = [quantized(tensors[f"blk.0.attn_{part}.weight"], kind) for part in "qkv"]
    same_bits(dequantized(read, QKV), np.concatenate(stacked))


@pytest.mark.parametrize("kind", EXACT)
def test_padded_heads_keep_the_blocks_of_q_k_v_but_not_of_o_proj(tmp_path: Path, kind: str) -> None:
    tensors = weights()
    read, blocks = opened(write(tmp_path / "m.gguf", tensors, quantization=Kind[kind]))
    attention = read.spec.layers[0].attention
    assert attention.cache_head_dim > HEAD_DIM
    assert blocks.requantized == {O_PROJ: f"{kind} with padded heads"}
    heads = {"q": SMALL.heads, "k": SMALL.kv_heads, "v": SMALL.kv_heads}
    padded = [pad_heads(quantized(tensors[f"blk.0.attn_{x}.weight"], kind), n, attention) for x, n in heads.items()]
    assert (dequantized(read, QKV) == np.concatenate(padded)).all()
    o_proj = read.matrix(O_PROJ)
    assert isinstance(o_proj, BlockTensor)
    assert o_proj.format == BlockFormat(8)
    exact = pad_heads(quantized(tensors["blk.0.attn_output.weight"], kind).T, SMALL.heads, attention).T
    # Half a quantization step of the widest block; int8 has 255 steps.
    assert np.abs(o_proj.dequantize() - exact).max() <= o_proj.scales.max() * 0.51


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_bytes_of_a_bundle_are_the_packed_blocks_and_a_tied_head_is_the_embedding(
    tiny_bundles: TinyBundles, tmp_path: Path, is_tied: bool
) -> None:
    tiny = replace(SPECULATOR, name=f"blocks-{is_tied}", is_tied=is_tied)
    file = tiny_file(tiny_bundles, tiny, tmp_path / "m.gguf", "Q4_0")
    bundle = export_bundle(ExportSpec(str(file), tmp_path / "out", (1,), keep_blocks=True))
    read, blocks = opened(file)
    assert bundle.manifest.precision.weights == dict.fromkeys(blocks.kept, BLOCK_TYPES["Q4_0"].format)
    for name in blocks.kept:
        matrix = read.matrix(name)
        assert isinstance(matrix, BlockTensor)
        assert stored_bytes(bundle, names.block_codes(name)) == matrix.packed_codes().tobytes()
        assert stored_bytes(bundle, names.block_scales(name)) == matrix.scales.tobytes()
    # A look-up needs the codes in two dimensions, a product in three.
    embedding = places(bundle, names.block_codes(names.EMBED_TOKENS))
    head = places(bundle, names.block_codes(names.LM_HEAD))
    assert len(embedding) == (2 if is_tied else 1)
    assert len(head) == (0 if is_tied else 1)
    operators = {node.op_type for graph in graphs(bundle) for node in graph.node}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= operators
    assert not operators & {"MatMul", "Gemm"}


def without_int8_activations(bundle: Bundle) -> Bundle:
    """Change a bundle to multiply its blocks with float activations, which is accurate and slow."""
    for segment in bundle.manifest.plan.segments:
        path = str(bundle.graph_path(segment))
        model = onnx.load(path, load_external_data=False)
        levels = [x for node in model.graph.node for x in node.attribute if x.name == "accuracy_level"]
        assert levels
        for level in levels:
            level.i = 1
        onnx.save(model, path)
    write_manifest(bundle.folder, replace(bundle.manifest, files=describe_files(bundle.folder)))
    return open_bundle(bundle.folder)


@pytest.mark.parametrize("kind", EXACT)
def test_logits_equal_the_dequantized_bundles_except_for_rounded_activations(
    tiny_bundles: TinyBundles, tmp_path: Path, kind: str
) -> None:
    file = tiny_file(tiny_bundles, SPECULATOR, tmp_path / "m.gguf", kind)
    kept = export_bundle(ExportSpec(str(file), tmp_path / "kept", EXITS, keep_blocks=True))
    floats = load(export_bundle(ExportSpec(str(file), tmp_path / "floats", EXITS)).folder)
    texts = [np.random.randint(3, SPECULATOR.vocab, 48).tolist() for _ in range(3)]
    theirs = [floats.activations(text).heads for text in texts]
    shipped = load(kept.folder)
    rounded = [shipped.activations(text).heads for text in texts]
    accurate = load(without_int8_activations(kept).folder)
    exact = [accurate.activations(text).heads for text in texts]
    for depth in theirs[0]:
        expected = np.concatenate([heads[depth] for heads in theirs])
        noise = np.abs(np.concatenate([heads[depth] for heads in exact]) - expected).max()
        assert noise < tolerances.TINY.max_abs
        error = np.abs(np.concatenate([heads[depth] for heads in rounded]) - expected).mean() / expected.std()
        print(f"{kind}, {depth} layers: {error:.4f}; with float activations at most {noise:.1e}")
        assert 0 < error < ROUNDED_ACTIVATIONS


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(
    ("tiny", "draft_vocab"), [(SPECULATOR, None), (SPECULATOR, 64), (PADDED, 64)], ids=["full", "trimmed", "padded"]
)
def test_self_speculation_emits_the_plain_tokens(
    tiny_bundles: TinyBundles, tmp_path: Path, kind: str, tiny: TinyModel, draft_vocab: int | None
) -> None:
    file = tiny_file(tiny_bundles, tiny, tmp_path / "m.gguf", kind)
    model = load(export_bundle(ExportSpec(str(file), tmp_path / "out", EXITS, draft_vocab, keep_blocks=True)).folder)
    check_drafts(model, EXITS, tiny.vocab, TOKENS, 6)


def test_exits_share_the_kept_rows_of_a_trimmed_head(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    file = tiny_file(tiny_bundles, SPECULATOR, tmp_path / "m.gguf", "Q8_0")
    bundle = export_bundle(ExportSpec(str(file), tmp_path / "out", EXITS, 64, keep_blocks=True))
    ids = np.load(bundle.folder / names.draft_vocab_file(EXITS[0]))
    read, _ = opened(file)
    head = read.matrix(names.LM_HEAD)
    assert isinstance(head, BlockTensor)
    own = [names.exit_weight(e, "head.weight") for e in EXITS]
    for part in (names.block_codes, names.block_scales):
        assert len({place for name in own for place in places(bundle, part(name)).values()}) == 1
    assert stored_bytes(bundle, names.block_codes(own[0])) == head.rows(ids).packed_codes().tobytes()
    formats = bundle.manifest.precision.weights
    assert {formats[name] for name in own} == {BLOCK_TYPES["Q8_0"].format}


def test_half_precision_holds_the_scales_exactly(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    file = tiny_file(tiny_bundles, SPECULATOR, tmp_path / "m.gguf", "Q4_0")
    bundle = export_bundle(ExportSpec(str(file), tmp_path / "out", (1,), dtype="float16", keep_blocks=True))
    read, blocks = opened(file)
    for name in blocks.kept:
        matrix = read.matrix(name)
        assert isinstance(matrix, BlockTensor)
        scales = np.frombuffer(stored_bytes(bundle, names.block_scales(name)), np.float16)
        same_bits(scales.astype(np.float32), matrix.scales.reshape(-1))
    assert load(bundle.folder).generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens


MIXED = {
    "output.weight": Kind.Q5_1,
    "token_embd.weight": Kind.F16,
    "blk.0.attn_v.weight": Kind.Q8_0,
    "blk.1.attn_k.weight": Kind.F16,
    "blk.2.ffn_down.weight": Kind.Q4_1,
    "blk.3.ffn_down.weight": Kind.Q8_0,
}


def test_what_became_of_each_type_is_said_on_stderr_and_in_json(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_file(tiny_bundles, SPECULATOR, tmp_path / "m.gguf", "Q4_0", kinds=MIXED)
    out = tmp_path / "out"
    capsys.readouterr()
    assert run(["export", str(file), str(out), "--keep-blocks", "--json"]) == 0
    printed, told = capsys.readouterr()
    result = json.loads(printed)
    layers = SPECULATOR.layers
    assert result["kept"] == {"Q4_0": 5 * layers - 4, "Q4_0+Q8_0": 1, "Q8_0": 1}
    near = {(entry["kind"], entry["stored_as"]): entry for entry in result["nearly_kept"]}
    assert near.keys() == {("Q4_1", "int4 with offsets, blocks of 32"), ("Q5_1", "int8, blocks of 32")}
    assert [entry["matrices"] for entry in near.values()] == [1, 1]
    assert all(0.001 < entry["error"] < 0.01 for entry in near.values())
    mixed = names.layer_weight(1, "attn.qkv_proj.weight")
    assert result["requantized"] == {"Q4_0+floats": [mixed]}
    assert result["floats"] == [names.EMBED_TOKENS]
    lines = told.splitlines()
    assert set(lines[:3]) == {
        f"kept {5 * layers - 4} matrices bit for bit (Q4_0 as int4 symmetric, blocks of 32)",
        "kept 1 matrix bit for bit (Q8_0 as int8 symmetric, blocks of 32)",
        "kept 1 matrix bit for bit (Q4_0+Q8_0 as int8 symmetric, blocks of 32)",
    }
    assert {re.sub(r"[\d.]+% off", "N% off", line) for line in lines[3:5]} == {
        "kept 1 matrix nearly (Q4_1 as int4 with offsets, blocks of 32): up to N% off the float weights",
        "kept 1 matrix nearly (Q5_1 as int8, blocks of 32): up to N% off the float weights",
    }
    assert re.fullmatch(
        rf"requantized 1 matrix rounded \(Q4_0\+floats as int8, blocks of 32\): "
        rf"up to 0\.\d+% off the float weights: {mixed}",
        lines[5],
    )
    assert lines[6:] == ["left 1 matrix as floats (model.embed_tokens.weight)"]
    model = load(out)
    formats = model.bundle.manifest.precision.weights
    assert formats[names.LM_HEAD] == formats[mixed] == BlockFormat(8)
    assert formats[QKV] == formats[names.layer_weight(3, "mlp.down_proj.weight")] == BLOCK_TYPES["Q8_0"].format
    assert names.EMBED_TOKENS not in formats
    assert model.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens


def test_without_the_option_blocks_are_dequantized_and_a_warning_names_the_option(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_file(tiny_bundles, SPECULATOR, tmp_path / "m.gguf", "Q4_0")
    assert run(["export", str(file), str(tmp_path / "out"), "--json"]) == 0
    printed, told = capsys.readouterr()
    assert json.loads(printed).keys() == {"bundle", "segments", "bytes", "max_length"}
    count = 5 * SPECULATOR.layers + 2
    expected = f"dequantizing {count} matrices to floats (Q4_0); --keep-blocks keeps the blocks"
    assert told == f"warning: {expected}\n"
    assert load(tmp_path / "out").bundle.manifest.precision.is_float


@pytest.mark.parametrize("kind", ["F16", None])
def test_a_file_without_blocks_is_refused_and_nothing_is_written(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused, kind: str | None
) -> None:
    file = tiny_file(tiny_bundles, BASE, tmp_path / "m.gguf", kind)
    error = refused(["export", file, tmp_path / "out", "--keep-blocks"], f"--keep-blocks: {file}", "found floats only")
    assert "expected a GGUF file with quantized matrices, such as Q4_K_M or Q8_0, or integers of GPTQ" in error
    assert "Leave out --keep-blocks, and shrink" in error
    assert left_behind(tmp_path) == ["m.gguf"]


def test_a_folder_of_floats_is_refused(tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused) -> None:
    folder = tiny_bundles.checkpoint(BASE)
    refused(
        ["export", folder, tmp_path / "out", "--keep-blocks"], "--keep-blocks", "floats only", "shortstack quantize"
    )
    assert left_behind(tmp_path) == []
