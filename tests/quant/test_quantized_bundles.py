"""Quantized tiny bundles compute what floats of the same values compute, and hold what manifest and inspect say."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from helpers import tolerances
from helpers.quantized import (
    INT4,
    INT4_OFFSETS,
    INT8,
    PROMPT,
    QuantizedBundles,
    preset,
    read_matrix,
    stored_tensors,
)
from helpers.tiny_models import BASE, LAYER_MATRICES, SPECULATOR, SWITCHES, TinyBundles, TinyModel
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.ir.lint import lint_findings
from shortstack.graphs.manifest import packed_files
from shortstack.graphs.precision import BlockFormat, KVType, Precision
from shortstack.graphs.spec import DType
from shortstack.graphs.texts import CALIBRATION_TEXT
from shortstack.quant.texts import open_tokenizer, read_rows
from shortstack.runtime import DraftPolicy, load
from shortstack.runtime.inspection.report import build_report

TINY = {tiny.name: tiny for tiny in SWITCHES}
MODELS = [
    *(TINY[name] for name in ("base", "tied", "all-biases-tied", "head-dim-20-biased", "multi-query")),
    *(TINY[name] for name in ("rope-llama3", "odd-sizes", "odd-sizes-tied")),
]
EXITS = (1, 3, 4)


def text_of(bundle: Path) -> list[int]:
    rows = read_rows(CALIBRATION_TEXT, "--calibration", open_tokenizer(open_bundle(bundle)), 512)
    ids: list[int] = rows[1, :100].tolist()
    return ids


def logits_of(bundle: Path, text: list[int]) -> dict[int, npt.NDArray[np.float32]]:
    """Logits [seq, rows] by depth."""
    return load(bundle).activations(text).heads


def relative(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


def is_rows(name: str) -> bool:
    """Whether a float matrix is stored as [out, in]."""
    return name in (names.EMBED_TOKENS, names.LM_HEAD) or name.startswith("exits.")


def with_weights_of(source: Path, quantized: Path, out: Path) -> Path:
    """The float bundle with the weights that a quantized bundle's blocks stand for."""
    shutil.copytree(source, out)
    tensors = stored_tensors(out)
    for name in open_bundle(quantized).manifest.precision.weights:
        shape = tensors[name].shape
        matrix = read_matrix(quantized, name, shape[1] if is_rows(name) else shape[0])
        tensors[name].write(out, matrix if is_rows(name) else matrix.T)
    return out


# What it computes


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_blocks_compute_what_floats_of_the_same_values_compute(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tmp_path: Path, tiny: TinyModel, kv_cache: KVType
) -> None:
    source = tiny_bundles.bundle(tiny, 1)
    text = text_of(source)
    for weights in (INT4, replace(INT4, is_symmetric=True), INT4_OFFSETS, INT8):
        small = quantized(source, preset(weights, kv_cache))
        expected = logits_of(with_weights_of(source, small, tmp_path / str(weights)), text)
        for depth, logits in logits_of(small, text).items():
            error = relative(logits, expected[depth])
            assert error < tolerances.QUANTIZED_SAME_WEIGHTS, (weights, depth, error)


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_block_sizes_compute_what_floats_of_the_same_values_compute(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tmp_path: Path, bits: int, block_size: int
) -> None:
    source = tiny_bundles.bundle(BASE, 1)
    text = text_of(source)
    small = quantized(source, preset(BlockFormat(bits, block_size)))
    expected = logits_of(with_weights_of(source, small, tmp_path / "floats"), text)
    for depth, logits in logits_of(small, text).items():
        assert relative(logits, expected[depth]) < tolerances.QUANTIZED_SAME_WEIGHTS


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_int8_is_close_to_the_source(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tiny: TinyModel, kv_cache: KVType
) -> None:
    source = tiny_bundles.bundle(tiny, 1)
    text = text_of(source)
    expected = logits_of(source, text)
    for depth, logits in logits_of(quantized(source, preset(INT8, kv_cache)), text).items():
        assert relative(logits, expected[depth]) < tolerances.QUANTIZED_INT8


def test_trimmed_heads_see_the_rows_of_their_ids(tiny_bundles: TinyBundles, quantized: QuantizedBundles) -> None:
    source = tiny_bundles.bundle(BASE, 1, 3, draft_vocab=64)
    text = text_of(source)
    small = quantized(source, preset(INT8))
    ids = np.load(small / names.draft_vocab_file(1))
    whole = logits_of(quantized(tiny_bundles.bundle(BASE, 1, 3), preset(INT8)), text)
    for depth, logits in logits_of(small, text).items():
        np.testing.assert_array_equal(logits, whole[depth] if depth == BASE.layers else whole[depth][:, ids])


@pytest.mark.parametrize("weights", [INT4, INT8, None], ids=str)
@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_a_float16_bundle_is_close_to_a_float32_one_and_decodes(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, weights: BlockFormat | None, kv_cache: KVType
) -> None:
    source = tiny_bundles.bundle(BASE, 1, 3)
    mix = preset(weights, kv_cache)
    half, single = quantized(source, mix, dtype="float16"), quantized(source, mix)
    model, text = load(half), text_of(source)
    assert model.bundle.manifest.dtype == "float16"
    assert model.bundle.manifest.cache_type == ("int8" if kv_cache == "int8" else "float16")
    expected = logits_of(single, text)
    for depth, logits in logits_of(half, text).items():
        assert relative(logits, expected[depth]) < tolerances.QUANTIZED_SAME_WEIGHTS
    for options in ({}, {"strategy": "self-speculative", "exit_layer": 3, "draft": DraftPolicy(3)}):
        result = model.generate(PROMPT, max_new_tokens=24, ignore_eos=True, **options)  # type: ignore[arg-type]
        assert len(result.tokens) == 24
        assert result.stats.is_balanced


# What it stores


@pytest.mark.parametrize("tiny", [BASE, TINY["tied"], TINY["all-biases-tied"]], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_the_manifest_lists_the_format_of_each_matrix(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tiny: TinyModel, kv_cache: KVType
) -> None:
    mix = preset(
        INT4_OFFSETS,
        kv_cache,
        head=INT8,
        parts={names.QKV_PROJ: INT8, "mlp.down_proj.weight": None},
        layers={0: INT8, -1: None},
    )
    manifest = open_bundle(quantized(tiny_bundles.bundle(tiny, 1), mix), verify_hashes=True).manifest
    expected: dict[str, BlockFormat] = {names.EMBED_TOKENS: INT8}
    if not tiny.is_tied:
        expected = {names.EMBED_TOKENS: INT4, names.LM_HEAD: INT8}
    expected |= {names.layer_weight(0, part): INT8 for part in LAYER_MATRICES}
    for layer in (1, 2):
        expected |= {names.layer_weight(layer, part): INT4_OFFSETS for part in LAYER_MATRICES[1:4]}
        expected[names.layer_weight(layer, names.QKV_PROJ)] = INT8
    assert manifest.precision == Precision(expected, kv_cache)


def test_a_source_keeps_its_other_files_and_says_where_it_came_from(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles
) -> None:
    source = open_bundle(tiny_bundles.bundle(BASE, 1, 3, draft_vocab=64))
    small = open_bundle(quantized(source.folder, preset(INT4, "int8")), verify_hashes=True)
    before, after = source.manifest, small.manifest
    graphs = {names.segment_file(s.start, s.end) for s in before.plan.segments} | packed_files(before.plan)
    assert after.files.keys() - before.files.keys() == {names.QUANTIZATION_FILE}
    assert before.files.keys() <= after.files.keys()
    same = {name for name, entry in after.files.items() if before.files.get(name) == entry}
    assert same == before.files.keys() - graphs - {names.WEIGHTS_FILE}
    changed = ("precision", "files", "tools")
    assert replace(after, **{f: getattr(before, f) for f in changed}) == before  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [INT4, INT8], ids=str)
def test_a_tied_embedding_is_stored_once(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, weights: BlockFormat
) -> None:
    sizes = {}
    for tiny in (BASE, TINY["tied"]):
        folder = quantized(tiny_bundles.bundle(tiny, 1), preset(weights))
        sizes[tiny.is_tied] = (folder / names.WEIGHTS_FILE).stat().st_size
        offsets = {name: t.offset for name, t in stored_tensors(folder).items() if name.endswith("weight.codes")}
        assert len(set(offsets.values())) == len(offsets), "two names for one tensor"
    assert sizes[False] - sizes[True] == pytest.approx(weights.stored_bytes(BASE.vocab, BASE.hidden), abs=3 * 64)


def offsets_of_heads(folder: Path) -> list[int]:
    tensors = stored_tensors(folder)
    return [tensors[f"{names.exit_weight(e, 'head.weight')}.codes"].offset for e in EXITS]


def test_equal_heads_of_exits_are_stored_once(tiny_bundles: TinyBundles, quantized: QuantizedBundles) -> None:
    full, trimmed = (tiny_bundles.bundle(SPECULATOR, *EXITS, **o) for o in ({}, {"draft_vocab": 64}))  # type: ignore[arg-type]
    assert len(set(offsets_of_heads(quantized(full, preset(INT8, draft_head=INT4))))) == 1
    assert len(set(offsets_of_heads(quantized(trimmed, preset(INT8))))) == 1
    # Rounded for what each exit multiplies, they differ.
    assert len(set(offsets_of_heads(quantized(trimmed, preset(INT4, method="k-quant"))))) == len(EXITS)


def test_full_heads_follow_the_final_one_unless_another_format_is_asked_for(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles
) -> None:
    source = tiny_bundles.bundle(SPECULATOR, *EXITS)
    for mix, owns in (
        (preset(INT8), False),
        (preset(INT8, draft_head=INT8), False),
        (preset(INT8, draft_head=INT4), True),
        (preset(None, draft_head=INT4), True),
    ):
        weights = open_bundle(quantized(source, mix)).manifest.precision.weights
        assert {names.exit_weight(e, "head.weight") in weights for e in EXITS} == {owns}


@pytest.mark.parametrize("tiny", [BASE, TINY["all-biases-tied"]], ids=lambda tiny: tiny.name)
def test_every_graph_keeps_rows_apart(tiny_bundles: TinyBundles, quantized: QuantizedBundles, tiny: TinyModel) -> None:
    for weights in (INT4, INT4_OFFSETS, INT8):
        folder = quantized(tiny_bundles.bundle(tiny, 1, 3, draft_vocab=64), preset(weights, draft_head=INT4))
        products = 0
        for segment in open_bundle(folder).manifest.plan.segments:
            model = ir.load(folder / names.segment_file(segment.start, segment.end))
            assert lint_findings(model) == []
            products += sum(node.op_type == "MatMulNBits" for node in model.graph.all_nodes())
            assert not any(node.op_type in ("MatMul", "Gemm") for node in model.graph.all_nodes())
        assert products == 5 * tiny.layers + 3


def nbytes(folder: Path, prefix: str) -> int:
    found = {t.offset: t for name, t in stored_tensors(folder).items() if name.startswith(prefix)}
    return sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in found.values())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tiny", [BASE, TINY["tied"], TINY["head-dim-20-biased"]], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize(
    ("weights", "draft_vocab", "method", "kv_cache"),
    [
        (None, None, "rtn", "int8"),
        (INT4_OFFSETS, None, "rtn", "float"),
        (INT8, 64, "rtn", "int8"),
        (INT4, 64, "k-quant", "int8"),
    ],
    ids=["float", "offsets", "int8, trimmed", "int4, trimmed"],
)
def test_inspect_predicts_every_byte(
    tiny_bundles: TinyBundles,
    quantized: QuantizedBundles,
    tiny: TinyModel,
    dtype: DType,
    weights: BlockFormat | None,
    draft_vocab: int | None,
    method: str,
    kv_cache: KVType,
) -> None:
    mix = preset(weights, kv_cache, method=method, draft_head=INT4 if draft_vocab is None else "as head")
    folder = quantized(tiny_bundles.bundle(tiny, 1, 3, draft_vocab=draft_vocab), mix, dtype=dtype)
    report = build_report(open_bundle(folder))
    for layer in report.layers:
        assert layer.weight_bytes == nbytes(folder, names.layer_weight(layer.layer, ""))
    assert report.weights.embedding == nbytes(folder, names.EMBED_TOKENS)
    assert report.weights.lm_head == (0 if tiny.is_tied else nbytes(folder, names.LM_HEAD))
    assert report.weights.draft_heads == nbytes(folder, "exits.")
    assert report.weights.other == nbytes(folder, names.FINAL_NORM) + nbytes(folder, "rope.")
    assert report.weights.as_predicted
    head, norm = report.exits[0], tiny.hidden * np.dtype(dtype).itemsize
    own = names.exit_weight(1, "head.weight")
    assert head.weight_bytes == norm + nbytes(folder, own if head.owns_weights else report_head(tiny))


def report_head(tiny: TinyModel) -> str:
    return names.EMBED_TOKENS if tiny.is_tied else names.LM_HEAD


def test_inspect_tells_how_many_first_rows_there_are(tiny_bundles: TinyBundles, quantized: QuantizedBundles) -> None:
    for tiny in (BASE, TINY["tied"]):
        mix = preset(INT4, first_rows=200, first_rows_format=INT8)
        folder = quantized(tiny_bundles.bundle(tiny, 1), mix)
        report = build_report(open_bundle(folder))
        assert report.weights.as_predicted
        expected = nbytes(folder, report_head(tiny)) + 4 * tiny.hidden
        assert report.exits[0].weight_bytes == pytest.approx(expected, rel=0.03)  # alignment stands for some rows
