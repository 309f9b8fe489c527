"""Calibration runs layer by layer what the bundle runs as a whole; and the mixes that a search finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from helpers.quantized import INT4, INT8, open_session, preset
from helpers.tiny_models import BASE, LAYER_MATRICES, SWITCHES, TinyBundles, TinyModel
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.ir.block_tensor import nearest
from shortstack.graphs.texts import CALIBRATION_TEXT
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.bundle_floats import BundleFloats
from shortstack.quant.layers import HeadGraph, LayerGraph, Taps
from shortstack.quant.search import units
from shortstack.quant.source import Source
from shortstack.quant.spec import QuantizeSpec
from shortstack.quant.texts import open_tokenizer, read_rows
from shortstack.runtime import load

TINY = {tiny.name: tiny for tiny in SWITCHES}
MODELS = [TINY[name] for name in ("base", "all-biases-tied", "head-dim-20-biased", "rope-llama3", "odd-sizes")]
MODEL = pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
# Two runs of the same kernels in float32, fused differently; the residual stream is of the size of 1 to 30.
CHAIN = 1e-5
TOKENS = 2048
_WATCHED = "watched."


def rows_of(bundle: Path, tokens: int = 512) -> npt.NDArray[np.int64]:
    return read_rows(CALIBRATION_TEXT, "--calibration", open_tokenizer(open_bundle(bundle)), tokens, 64)


@MODEL
def test_layers_one_by_one_give_the_hidden_states_of_the_bundle(tiny_bundles: TinyBundles, tiny: TinyModel) -> None:
    folder = tiny_bundles.bundle(tiny, 1, 2, 3)
    source, rows = Source(BundleFloats(open_bundle(folder))), rows_of(folder)
    activations = [load(folder).activations(row.tolist()) for row in rows]
    hidden = source.floats(names.EMBED_TOKENS)[rows]
    for layer in range(tiny.layers):
        hidden = LayerGraph(source.spec, layer, source.layer(layer)).run(hidden)
        if layer + 1 < tiny.layers:
            expected = np.stack([ran.hidden[layer + 1] for ran in activations])
            np.testing.assert_allclose(hidden, expected, rtol=CHAIN, atol=CHAIN * np.abs(expected).max())
    head = names.EMBED_TOKENS if tiny.is_tied else names.LM_HEAD
    graph = HeadGraph(source.spec, head, {name: source.floats(name) for name in (head, names.FINAL_NORM)})
    expected = np.concatenate([ran.heads[tiny.layers] for ran in activations])
    logits = graph.logits(hidden.reshape(-1, tiny.hidden))
    np.testing.assert_allclose(logits, expected, rtol=CHAIN, atol=CHAIN * np.abs(expected).max())


@MODEL
def test_keys_and_values_are_those_of_the_bundle(tiny_bundles: TinyBundles, tiny: TinyModel) -> None:
    folder = tiny_bundles.bundle(tiny, 1)
    source, rows = Source(BundleFloats(open_bundle(folder))), rows_of(folder)[:2]
    hidden = source.floats(names.EMBED_TOKENS)[rows]
    seen: list[Taps] = []
    LayerGraph(source.spec, 0, source.layer(0)).run(hidden, seen.append)
    (taps,) = seen
    half, stored = tiny.head_dim // 2, source.spec.layers[0].attention.cache_head_dim // 2
    columns = [*range(half), *range(stored, stored + half)]
    for index, row in enumerate(rows):
        ran = load(folder).activations(row.tolist())
        for part, expected in (("key", ran.keys[0]), ("value", ran.values[0])):
            np.testing.assert_allclose(taps.cache[part][index][..., columns], expected, rtol=1e-5, atol=1e-5)
    padding = sorted(set(range(2 * stored)) - set(columns))
    assert not any(taps.cache[part][..., padding].any() for part in names.KV_PARTS)


def inputs_of_projections(folder: Path, tokens: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float32]]:
    """What each MatMul of the lowest graph multiplies, by the name of its weight; the graph's own nodes, watched."""
    manifest = open_bundle(folder).manifest
    segment = manifest.plan.segments[0]
    model = onnx.load(folder / names.segment_file(segment.start, segment.end))
    watched = {}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            watched[node.input[1]] = f"{_WATCHED}{node.input[1]}"
            model.graph.node.append(onnx.helper.make_node("Identity", [node.input[0]], [watched[node.input[1]]]))
    for name in watched.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = open_session(model)
    spec, seq = manifest.spec, len(tokens)
    empty = np.zeros((1, spec.layers[0].attention.kv_heads, seq, spec.layers[0].attention.cache_head_dim), np.float32)
    feeds = {
        names.INPUT_IDS: tokens[None],
        names.SEQLENS_K: np.array([seq - 1], np.int32),
        names.TOTAL_SEQUENCE_LENGTH: np.array(seq, np.int32),
        names.NUM_ROWS: np.array(0, np.int64),
        **{names.past(layer, part): empty for layer in range(segment.end) for part in names.KV_PARTS},
    }
    found = session.run(list(watched.values()), feeds)
    return {weight: x[0] for weight, x in zip(watched, found, strict=True)}


@MODEL
def test_taps_show_what_each_projection_multiplies(tiny_bundles: TinyBundles, tiny: TinyModel) -> None:
    folder = tiny_bundles.bundle(tiny, 2)
    source, rows = Source(BundleFloats(open_bundle(folder))), rows_of(folder)[:3]
    expected = [inputs_of_projections(folder, row) for row in rows]
    hidden = source.floats(names.EMBED_TOKENS)[rows]
    for layer in (0, 1):
        seen: list[Taps] = []
        floats = source.layer(layer)
        hidden = LayerGraph(source.spec, layer, floats, with_taps=True).run(hidden, seen.append)
        (taps,) = seen
        assert taps.inputs.keys() == {names.layer_weight(layer, part) for part in LAYER_MATRICES}
        for name, found in taps.inputs.items():
            whole = np.concatenate([of_row[name] for of_row in expected])
            assert found.shape == (rows.size, floats[name].shape[0])
            np.testing.assert_allclose(found, whole, rtol=CHAIN, atol=CHAIN * np.abs(whole).max())
        gate, up = (taps.inputs[names.layer_weight(layer, f"mlp.{part}_proj.weight")] for part in ("gate", "up"))
        assert gate is up, "the statistics of one input are summed up twice"


def test_a_layer_of_blocks_shows_its_inputs_too(tiny_bundles: TinyBundles) -> None:
    folder = tiny_bundles.bundle(BASE, 1)
    source, rows = Source(BundleFloats(open_bundle(folder))), rows_of(folder)[:2]
    floats = source.layer(0)
    matrices = {n: w for n, w in floats.items() if n.endswith("proj.weight")}
    blocks = {name: nearest(np.ascontiguousarray(weight.T), INT8) for name, weight in matrices.items()}
    hidden = source.floats(names.EMBED_TOKENS)[rows]
    seen: list[Taps] = []
    out = LayerGraph(source.spec, 0, floats | blocks, with_taps=True).run(hidden, seen.append)  # type: ignore[operator]
    expected = LayerGraph(source.spec, 0, floats).run(hidden)
    assert seen[0].inputs.keys() == matrices.keys()
    assert 0 < np.abs(out - expected).max() < 0.1 * np.abs(expected).max()


# --max-kl


def bits_of(folder: Path, name: str) -> int:
    block_format = open_bundle(folder).manifest.precision.weights.get(name)
    return 16 if block_format is None else block_format.bits


@pytest.mark.parametrize("tiny", [TINY["base"], TINY["tied"]], ids=lambda tiny: tiny.name)
def test_a_searched_mix_stays_under_its_limit_and_a_larger_limit_is_cheaper(
    tiny_bundles: TinyBundles, tmp_path: Path, tiny: TinyModel
) -> None:
    source = tiny_bundles.bundle(tiny, 1)
    rows = read_rows(CALIBRATION_TEXT, "--calibration", open_tokenizer(open_bundle(source)), TOKENS)
    measured = rows[-(len(rows) // 4) :]  # what the search does not round for
    activations = [load(source).activations(row.tolist()).heads[tiny.layers] for row in measured]
    sizes, everything = [], units(Source(BundleFloats(open_bundle(source))))
    for number, max_kl in enumerate((1e-6, 0.02, 0.3, 100.0)):
        out = tmp_path / str(number)
        mix = preset(INT4)
        quantize_bundle(QuantizeSpec(source, out, mix, calibration_tokens=TOKENS, max_kl=max_kl))
        model = load(out)
        total = 0.0
        for row, expected in zip(measured, activations, strict=True):
            found = model.activations(row.tolist()).heads[tiny.layers]
            logp, logq = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (expected, found))
            total += float((np.exp(logp) * (logp - logq)).sum())
        assert total / measured.size <= max_kl
        sizes.append((out / names.WEIGHTS_FILE).stat().st_size)
        for unit in everything:
            assert len({bits_of(out, name) for name in unit.matrices}) == 1, "a unit goes together"
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert not open_bundle(tmp_path / "0").manifest.precision.weights
    assert set(open_bundle(tmp_path / "3").manifest.precision.weights.values()) == {INT4}
