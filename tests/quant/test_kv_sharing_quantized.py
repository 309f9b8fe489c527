"""Bundles with an int8 cache whose layers use keys and values of layers above them, or do not see their own position:
what the kernel makes of such reads, where the scales come from, and that drafts are still judged exactly.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from helpers import tolerances
from helpers.kv_bundles import KVBundles
from helpers.kv_cases import early, exits_of
from helpers.quantized import INT4, INT8, QuantizedBundles, open_session, preset, stored_tensors
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.kv_map import placement, producers
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.texts import CALIBRATION_TEXT
from shortstack.quant import quality_measure
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.quality_report import make_report
from shortstack.quant.spec import QuantizeSpec, ReportSpec
from shortstack.quant.texts import open_tokenizer, read_rows
from shortstack.runtime import DraftPolicy, ExitPolicy, Model, load, parse_criterion
from shortstack.runtime.engine import stack as stacks
from shortstack.runtime.engine.passes import run_passes

LAYERS = 6
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 512}
TOP, MIDDLE = placement("sandwich", "top", LAYERS, 3), placement("pizza", "middle", LAYERS, 3)
BOTTOM = placement("pizza", "bottom", LAYERS, 3)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "sandwich-top": (TOP, {}),
    "pizza-middle": (MIDDLE, {}),
    "masked bottom": (BOTTOM, {"masks_diagonal": True}),
    "windows, padded heads": (TOP, {"windows": (0, 5, 0, 5, 0, 5), "masks_diagonal": True, "head_dim": 20}),
}
WEIGHTS = (None, INT8, INT4)
cases = pytest.mark.parametrize("case", CASES)


def source_of(kv_bundles: KVBundles, case: str) -> Path:
    """The float bundle."""
    kv_map, changes = CASES[case]
    return kv_bundles.bundle(kv_map, *exits_of(kv_map), **(WIDE | changes))


def text_of(bundle: Path, count: int) -> list[int]:
    rows = read_rows(CALIBRATION_TEXT, "--calibration", open_tokenizer(open_bundle(bundle)), 1024)
    ids: list[int] = rows[-1, :count].tolist()
    return ids


def drift(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


# The kernel

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 4, 2, 16, 32
KV_WIDTH = KV_HEADS * HEAD_DIM


def look_up_session(window: int) -> ort.InferenceSession:
    """One attention node as graphs/ir/attention.py writes it for a layer that sees the positions before its own."""
    shapes: dict[str, tuple[int, list[int | str]]] = {
        "query": (TensorProto.FLOAT, [1, "rows", HEADS * HEAD_DIM]),
        "empty": (TensorProto.FLOAT, [1, 0, KV_WIDTH]),
        "key": (TensorProto.INT8, [1, KV_HEADS, CAPACITY, HEAD_DIM]),
        "value": (TensorProto.INT8, [1, KV_HEADS, CAPACITY, HEAD_DIM]),
        "past_end": (TensorProto.INT32, [1]),
        "total": (TensorProto.INT32, []),
        "cos": (TensorProto.FLOAT, [CAPACITY, HEAD_DIM // 2]),
        "sin": (TensorProto.FLOAT, [CAPACITY, HEAD_DIM // 2]),
        "positions": (TensorProto.INT64, [1, "rows"]),
        "key_scale": (TensorProto.FLOAT, [KV_WIDTH]),
        "value_scale": (TensorProto.FLOAT, [KV_WIDTH]),
    }
    order = ["query", "empty", "empty", *list(shapes)[2:9], "", "", "key_scale", "value_scale"]
    node = helper.make_node(
        "GroupQueryAttention",
        order,
        ["mixed", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=1.0 / math.sqrt(HEAD_DIM),
        do_rotary=1,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
        local_window_size=window - 1 if window else -1,
    )
    inputs = [helper.make_tensor_value_info(name, *kind) for name, kind in shapes.items()]
    output = helper.make_tensor_value_info("mixed", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "look_up", inputs, [output])
    return open_session(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


@pytest.mark.parametrize("window", [0, 1, 4])
def test_the_kernel_looks_up_in_codes_and_each_row_is_what_it_is_alone(window: int) -> None:
    session, rng = look_up_session(window), np.random.default_rng(window)
    codes = rng.integers(-127, 128, (2, 1, KV_HEADS, CAPACITY, HEAD_DIM)).astype(np.int8)
    scales = rng.uniform(0.01, 0.03, (2, KV_WIDTH)).astype(np.float32)
    turn = np.outer(np.arange(CAPACITY), 100.0 ** -np.linspace(0, 1, HEAD_DIM // 2))
    cos, sin = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
    key, value = codes[:, 0] * scales.reshape(2, KV_HEADS, 1, HEAD_DIM).astype(np.float64)

    def mixed(query: npt.NDArray[np.float32], past: int) -> npt.NDArray[np.float32]:
        rows = query.shape[1]
        total = max(past + rows - 1, 1)
        feeds = {
            "query": query,
            "empty": np.zeros((1, 0, KV_WIDTH), np.float32),
            "key": codes[0],
            "value": codes[1],
            "past_end": np.array([total - 1], np.int32),
            "total": np.array(total, np.int32),
            "cos": cos,
            "sin": sin,
            "positions": np.arange(past, past + rows)[None],
            "key_scale": scales[0],
            "value_scale": scales[1],
        }
        found: npt.NDArray[np.float32] = session.run(["mixed"], feeds)[0][0]
        return found

    for past, rows in product((1, 2, 15), range(1, 10)):
        query = rng.normal(size=(1, rows, HEADS * HEAD_DIM)).astype(np.float32)
        together = mixed(query, past)
        for row, position in enumerate(range(past, past + rows)):
            assert (together[row] == mixed(query[:, row : row + 1], position)[0]).all(), "bit for bit"
            first = max(0, position - window + 1) if window else 0
            for head in range(HEADS):
                low, high = np.split(query[0, row].reshape(HEADS, HEAD_DIM)[head], 2)
                c, s = cos[position], sin[position]
                rotated = np.concatenate([low * c - high * s, low * s + high * c])
                group, place = head // (HEADS // KV_HEADS), slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                weights = np.exp(key[group, first:position] @ rotated / math.sqrt(HEAD_DIM))
                expected = weights @ value[group, first:position] / max(weights.sum(), 1e-30)
                assert np.abs(together[row, place] - expected).max() <= 1e-5
    with pytest.raises(Exception, match="too small for sequence_length"):  # of floats it refuses that as well
        mixed(np.zeros((1, 2, HEADS * HEAD_DIM), np.float32), 0)


# Scales


@cases
def test_scales_lie_a_little_above_the_models_own_keys_and_values(
    kv_bundles: KVBundles, quantized: QuantizedBundles, case: str
) -> None:
    source = source_of(kv_bundles, case)
    small = quantized(source, preset(INT8, "int8"))
    spec, stored = load(source).bundle.manifest.spec, stored_tensors(small)
    owners = producers(spec.kv_map, 0, LAYERS)
    wanted = {names.kv_scale(layer, part) for layer in owners for part in names.KV_PARTS}
    assert {name for name in stored if name.endswith("_scale")} == wanted
    ran = load(source).activations(text_of(source, 256))
    for layer, (part, seen) in product(owners, zip(names.KV_PARTS, (ran.keys, ran.values), strict=True)):
        scale = stored[names.kv_scale(layer, part)].read(small).reshape(spec.layers[0].attention.kv_heads, 2, -1)
        half = spec.layers[0].attention.head_dim // 2
        assert (scale[..., half:] <= 1e-8).all(), "columns that pad a head hold zeros"
        reach = scale[..., :half].reshape(spec.layers[0].attention.kv_heads, -1) * 127
        peak = np.abs(seen[layer]).max(axis=1)
        assert (peak <= reach).all()
        assert np.median(reach / peak) < 2.0, "codes are not wasted"


@pytest.mark.parametrize("method", ["gptq", "k-quant", "awq"])
def test_methods_that_weigh_by_text_are_refused(
    kv_bundles: KVBundles, quantized: QuantizedBundles, method: str
) -> None:
    with pytest.raises(UnsupportedError, match="--method rtn") as caught:
        quantized(source_of(kv_bundles, "sandwich-top"), preset(INT8, "int8", method=method))
    assert "--kv-cache" not in str(caught.value)


# What such bundles compute


@cases
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_logits_stay_near_those_with_a_cache_of_floats(
    kv_bundles: KVBundles, quantized: QuantizedBundles, case: str, weights: BlockFormat | None
) -> None:
    source = source_of(kv_bundles, case)
    floats = source if weights is None else quantized(source, preset(weights))
    text = text_of(source, 64)
    found, expected = (load(b).activations(text).heads for b in (quantized(source, preset(weights, "int8")), floats))
    for depth in expected:
        assert drift(found[depth], expected[depth]) <= tolerances.INT8_CACHE
    assert (found[LAYERS] != expected[LAYERS]).any()


def test_activations_may_be_float16_as_well(kv_bundles: KVBundles, quantized: QuantizedBundles) -> None:
    source = source_of(kv_bundles, "sandwich-top")
    small = load(quantized(source, preset(INT8, "int8"), dtype="float16"))
    text = text_of(source, 64)
    found, expected = (model.activations(text).heads[LAYERS] for model in (small, load(source)))
    assert drift(found, expected) <= tolerances.QUANTIZED_INT8


@cases
@pytest.mark.parametrize("weights", [INT8, INT4], ids=str)
def test_drafts_are_judged_as_plain_decoding_would(
    kv_bundles: KVBundles, quantized: QuantizedBundles, case: str, weights: BlockFormat
) -> None:
    check_decoding(load(quantized(source_of(kv_bundles, case), preset(weights, "int8"))))


@pytest.mark.parametrize("weights", [INT8, INT4], ids=str)
def test_windows_and_blocks_over_a_cache_of_floats(
    kv_bundles: KVBundles, quantized: QuantizedBundles, weights: BlockFormat
) -> None:
    kv_map = placement("sandwich", "middle", LAYERS, 3)
    source = kv_bundles.bundle(kv_map, *exits_of(kv_map), **WIDE, windows=(0, 5, 5, 5, 0, 3))
    model, text = load(quantized(source, preset(weights))), text_of(source, 64)
    found, expected = (m.activations(text).heads[LAYERS] for m in (model, load(source)))
    assert drift(found, expected) <= (tolerances.QUANTIZED_INT8 if weights.bits == 8 else 1.0)
    check_decoding(model)


def check_decoding(model: Model) -> None:
    """Speculation and exact early exits emit what plain decoding does; drafts of both fates are met."""
    accepted = rejected = 0
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(3, 131, 7).tolist()
        plain = model.generate(prompt, max_new_tokens=20, ignore_eos=True)
        for policy in (DraftPolicy(2), DraftPolicy(4, has_bonus=True)):
            options: dict[str, Any] = {"strategy": "self-speculative", "draft": policy}
            drafted = model.generate(prompt, max_new_tokens=20, ignore_eos=True, **options)
            assert drafted.tokens == plain.tokens
            accepted += drafted.stats.accepted
            rejected += drafted.stats.rejected
        exact = ExitPolicy(parse_criterion("top_prob >= 0.1"), verify="exact")
        assert early(model, prompt, exact, 20) == plain.tokens
    assert accepted > 0
    assert rejected > 0


@pytest.mark.parametrize("case", ["sandwich-top", "pizza-middle", "windows, padded heads"])
@pytest.mark.parametrize("weights", [None, INT8], ids=str)
def test_passes_over_a_prompt_end_where_no_code_changes(
    kv_bundles: KVBundles,
    quantized: QuantizedBundles,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    weights: BlockFormat | None,
) -> None:
    folder = quantized(source_of(kv_bundles, case), preset(weights, "int8"))
    text = text_of(folder, 64)
    passes: list[int] = []

    def watch(one_pass: Any, cache: Any, groups: Any, positions: Any) -> int:
        passes.append(run_passes(one_pass, cache, groups, positions))
        owners = [owner for group in groups for owner in group.all]
        before = [part for owner in owners for part in cache.read(owner, 0, len(text))]
        one_pass()
        after = [part for owner in owners for part in cache.read(owner, 0, len(text))]
        assert all((old == new).all() for old, new in zip(before, after, strict=True))
        return passes[-1]

    monkeypatch.setattr(stacks, "run_passes", watch)
    logits = []
    for prefill_passes in ("converged", "sequential"):
        stack = load(folder, prefill_passes=prefill_passes).exclusive_stack()
        stack.prefill(text, 0, True)
        logits.append(stack.final.logits.astype(np.float32)[0])
    assert len(passes) == 1, "sequential runs none"
    assert 1 < passes[0] <= len(text) - 1, "the first position runs alone"
    assert drift(*logits) <= tolerances.INT8_CACHE


def test_a_report_counts_one_cache_per_producer_and_finds_drafts_exact(
    kv_bundles: KVBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_measure, "_peak_rss_bytes", lambda bundle: 1)  # takes a process each
    source, small = source_of(kv_bundles, "sandwich-top"), tmp_path / "small"
    quantize_bundle(QuantizeSpec(source, small, preset(INT8, "int8"), calibration_tokens=256))
    quality = make_report(ReportSpec(source, small, heldout_tokens=64, prompts=2, continuation_tokens=6))
    assert quality.formats["int8 KV cache"] == 3
    assert quality.is_exact
