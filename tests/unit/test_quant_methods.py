"""Rounding methods against arithmetic written down a second time, against each other, and against onnxruntime."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from helpers.quantized import unpacked
from shortstack.graphs.errors import RequestError
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.precision import BLOCK_SIZES, CODE_TYPES, BlockFormat
from shortstack.graphs.spec import ModelSpec
from shortstack.graphs.spec_json import llama_spec
from shortstack.quant.method import METHODS
from shortstack.quant.methods import awq
from shortstack.quant.methods.stats import Floats, InputStats, InputStatsBuilder, output_error

ROWS = 6
ROUNDINGS = {method.name: method.round for method in METHODS.values() if not method.scales_layers}
# Products in float32 instead of exact ones: twice its precision at the size of the weights.
FLOAT32_RTOL = 2.4e-7
FORMATS = [BlockFormat(*shape) for shape in itertools.product(CODE_TYPES, BLOCK_SIZES, (False, True))]
WIDTHS = (256, 80, 33)  # whole blocks of every size; an even and an odd rest


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def weights(rng: np.random.Generator, rows: int, width: int) -> Floats:
    return rng.standard_normal((rows, width)).astype(np.float32)


def correlated_stats(rng: np.random.Generator, width: int, positions: int = 512) -> InputStats:
    """Inputs that share a few directions, some channels ten times as strong as others."""
    few = rng.standard_normal((positions, max(2, width // 8)))
    x = few @ rng.standard_normal((few.shape[1], width)) + 0.3 * rng.standard_normal((positions, width))
    builder = InputStatsBuilder()
    for part in np.array_split((x * np.exp(rng.uniform(-1.15, 1.15, width))).astype(np.float32), 3):
        builder.add(part)
    return builder.finish()


def step_per_weight(tensor: BlockTensor) -> Floats:
    return np.repeat(np.abs(tensor.scales), tensor.format.block_size, axis=1)[:, : tensor.shape[1]]


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_packed_bytes_hold_what_dequantize_returns(
    method: str, width: int, block_format: BlockFormat, rng: np.random.Generator
) -> None:
    weight, stats = weights(rng, ROWS, width), correlated_stats(rng, width)
    tensor = ROUNDINGS[method](weight, block_format, stats)
    blocks = block_format.blocks(width)
    codes = unpacked(tensor.packed_codes(), block_format.bits, width)
    packed_zeros = tensor.packed_zero_points()
    if block_format.is_symmetric:
        assert packed_zeros is None
        zeros = np.full((ROWS, blocks), 1 << (block_format.bits - 1), np.float64)
    else:
        assert packed_zeros is not None
        zeros = unpacked(packed_zeros, block_format.bits, blocks)
    block_of = np.arange(width) // block_format.block_size
    expected = tensor.scales.astype(np.float64)[:, block_of] * (codes - zeros[:, block_of])
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=FLOAT32_RTOL)
    stored = tensor.packed_codes().nbytes + tensor.scales.nbytes + (0 if packed_zeros is None else packed_zeros.nbytes)
    assert stored == block_format.stored_bytes(ROWS, width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_rtn_is_off_by_half_a_step_at_most_or_by_one_where_the_top_code_is_missing(
    width: int, block_format: BlockFormat, rng: np.random.Generator
) -> None:
    weight = weights(rng, ROWS, width)
    tensor = ROUNDINGS["rtn"](weight, block_format, None)
    error, step = np.abs(weight - tensor.dequantize()), step_per_weight(tensor)
    # Symmetric codes reach 2^(bits-1) steps to one side and one less to the other. A rounded zero point moves the
    # range by half a step, so that the outermost weight may be another half away.
    is_cut = np.isin(tensor.codes, (0, (1 << block_format.bits) - 1))
    assert (error <= np.where(is_cut, 1.0, 0.5) * step * (1 + 1e-5)).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_rtn_stores_the_bytes_that_onnxruntime_would(
    width: int, block_format: BlockFormat, rng: np.random.Generator
) -> None:
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    weight = weights(rng, ROWS, width)
    theirs = quantizer.DefaultWeightOnlyQuantizer(
        quantizer.DefaultWeightOnlyQuantConfig(
            block_size=block_format.block_size, is_symmetric=block_format.is_symmetric, bits=block_format.bits
        )
    )
    codes, scales, zeros = theirs.qbits_block_quant(np.ascontiguousarray(weight.T))
    ours = ROUNDINGS["rtn"](weight, block_format, None)
    np.testing.assert_array_equal(ours.scales, scales.reshape(ours.scales.shape))
    np.testing.assert_array_equal(
        unpacked(ours.packed_codes(), block_format.bits, width), unpacked(codes, block_format.bits, width)
    )
    if not block_format.is_symmetric:
        blocks = block_format.blocks(width)
        packed = ours.packed_zero_points()
        assert packed is not None
        np.testing.assert_array_equal(
            unpacked(packed, block_format.bits, blocks),
            unpacked(zeros.reshape(ROWS, -1), block_format.bits, blocks),
        )


@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_k_quant_leaves_less_weighted_error_than_rtn(
    block_format: BlockFormat, with_stats: bool, rng: np.random.Generator
) -> None:
    weight, stats = weights(rng, 64, 256), correlated_stats(rng, 256)
    size = np.sqrt(np.mean(weight.reshape(64, -1, block_format.block_size) ** 2, axis=2))
    rms = np.repeat(size, block_format.block_size, axis=1)
    importance = np.sqrt(rms**2 + weight**2) * np.diag(stats.gram) if with_stats else rms + np.abs(weight)
    loss = {
        name: np.sum(importance * (weight - ROUNDINGS[name](weight, block_format, stats_or_none).dequantize()) ** 2)
        for name in ("rtn", "k-quant")
        for stats_or_none in [stats if with_stats else None]
    }
    assert loss["k-quant"] <= loss["rtn"]


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_hqq_is_never_worse_than_rtn_by_its_own_norm(block_format: BlockFormat, rng: np.random.Generator) -> None:
    weight = weights(rng, 64, 256)
    weight[rng.random(weight.shape) < 0.01] *= 6  # outliers are what it is made for
    loss = {
        name: np.sum(np.abs(weight - ROUNDINGS[name](weight, block_format, None).dequantize()) ** 0.7)
        for name in ("rtn", "hqq")
    }
    # Both find their codes in float32; ties may fall either way.
    assert loss["hqq"] <= loss["rtn"] * (1 + 1e-5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_gptq_leaves_less_output_error_than_rtn(
    width: int, block_format: BlockFormat, rng: np.random.Generator
) -> None:
    weight, stats = weights(rng, 64, width), correlated_stats(rng, width)
    error = {
        name: output_error(weight, ROUNDINGS[name](weight, block_format, stats).dequantize(), stats)
        for name in ("rtn", "gptq")
    }
    assert error["gptq"] < 0.8 * error["rtn"]


def test_gptq_refuses_to_round_without_inputs() -> None:
    with pytest.raises(RequestError, match="calibration text"):
        ROUNDINGS["gptq"](np.ones((2, 32), np.float32), BlockFormat(4), None)


@pytest.mark.parametrize("inputs", ["none seen", "some never fire", "all alike"])
@pytest.mark.parametrize("block_format", [BlockFormat(4), BlockFormat(8, 16, True)], ids=str)
def test_gptq_copes_with_sparse_inputs(inputs: str, block_format: BlockFormat, rng: np.random.Generator) -> None:
    weight = weights(rng, ROWS, 64)
    gram = {
        "none seen": np.zeros((64, 64)),
        "some never fire": np.diag((np.arange(64) % 3 > 0).astype(float)),
        "all alike": np.ones((64, 64)),
    }[inputs]
    tensor = ROUNDINGS["gptq"](weight, block_format, InputStats(gram.astype(np.float32), 8))
    is_dead = np.diag(gram) == 0
    error = np.abs(weight - tensor.dequantize())[:, is_dead]
    # A grid is not chosen for what never fires, but it is not far off either: other text may have it.
    assert (error <= 0.5 * np.abs(weight).max()).all()  # at most 0.38 in 300 draws; a quarter was luck of the seed
    assert np.isfinite(tensor.dequantize()).all()


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_zero_and_constant_blocks_stay_what_they_are(
    method: str, block_format: BlockFormat, rng: np.random.Generator
) -> None:
    size = block_format.block_size
    constants = np.array([[0.0, 0.5], [-0.25, 0.0], [0.0, 0.0]], np.float32)
    weight = np.repeat(constants, size, axis=1)
    stats = InputStats(np.eye(2 * size, dtype=np.float32), 1)
    tensor = ROUNDINGS[method](weight, block_format, stats)
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)
    assert not tensor.dequantize()[weight == 0].any()


@pytest.mark.parametrize("method", ROUNDINGS)
def test_a_row_is_rounded_the_same_alone_and_among_others(method: str, rng: np.random.Generator) -> None:
    weight, stats = weights(rng, 8, 96), correlated_stats(rng, 96)
    alone = ROUNDINGS[method](weight[5:6].copy(), BlockFormat(4), stats).dequantize()
    together = ROUNDINGS[method](weight, BlockFormat(4), stats).dequantize()
    np.testing.assert_allclose(alone, together[5:6], rtol=1e-4)


def test_statistics_do_not_depend_on_how_inputs_arrive(rng: np.random.Generator) -> None:
    x = rng.standard_normal((50, 16)).astype(np.float32)
    builder = InputStatsBuilder()
    for part in (x[:7], x[7:8], x[8:]):
        builder.add(part)
    stats = builder.finish()
    assert stats.count == 50
    np.testing.assert_allclose(stats.gram, x.T.astype(np.float64) @ x / 50, rtol=1e-5, atol=1e-6)
    scale = np.linspace(0.5, 2, 16).astype(np.float32)
    y = x / scale
    np.testing.assert_allclose(stats.divided(scale).gram, y.T.astype(np.float64) @ y / 50, rtol=1e-5, atol=1e-6)


def test_output_error_is_that_of_the_products(rng: np.random.Generator) -> None:
    weight, other = weights(rng, 4, 16), weights(rng, 4, 16)
    x = rng.standard_normal((50, 16)).astype(np.float32)
    builder = InputStatsBuilder()
    builder.add(x)
    expected = np.linalg.norm(x @ (weight - other).T) / np.linalg.norm(x @ weight.T)
    assert output_error(weight, other, builder.finish()) == pytest.approx(expected, rel=1e-5)
    assert output_error(weight, other, None) == pytest.approx(
        np.linalg.norm(weight - other) / np.linalg.norm(weight), rel=1e-5
    )


HIDDEN, INNER, HEADS, KV_HEADS, WIDTH = 64, 96, 4, 2, 16


def layer_spec(**changes: object) -> ModelSpec:
    fields: dict[str, object] = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": 12,  # padded to 16 in the graphs
        "vocab_size": 10,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return llama_spec(**{**fields, **changes})  # type: ignore[arg-type]


def layer_weights(rng: np.random.Generator) -> dict[str, Floats]:
    """A layer with biases, its head_dim padded with zeros as the exporter does it."""
    out_in = {
        "attn.qkv_proj": ((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN),
        "attn.o_proj": (HIDDEN, HEADS * WIDTH),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    found = {f"{name}.weight": weights(rng, *shape) for name, shape in out_in.items()}
    found |= {f"{name}.bias": weights(rng, 1, shape[0])[0] for name, shape in out_in.items()}
    padded = np.arange((HEADS + 2 * KV_HEADS) * WIDTH) % WIDTH >= 12
    found["attn.qkv_proj.weight"][padded] = 0
    found["attn.qkv_proj.bias"][padded] = 0
    found["attn.o_proj.weight"][:, padded[: HEADS * WIDTH]] = 0
    return found | {
        name: np.exp(rng.uniform(-2, 2, HIDDEN)).astype(np.float32)
        for name in ("input_norm.weight", "post_attention_norm.weight")
    }


def run_layer(w: dict[str, npt.NDArray[np.float64]], x: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
    """Return inputs of all projections and the output, each position attending to itself alone: a head is its value."""

    def product(name: str, at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return at @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    inputs = {"attn.qkv_proj.weight": x * w["input_norm.weight"]}
    qkv = product("attn.qkv_proj", inputs["attn.qkv_proj.weight"]).reshape(len(x), -1, WIDTH)  # [seq, heads, head_dim]
    inputs["qk"] = qkv[:, : HEADS + KV_HEADS]
    values = np.repeat(qkv[:, HEADS + KV_HEADS :], HEADS // KV_HEADS, axis=1).reshape(len(x), -1)
    inputs["attn.o_proj.weight"] = values
    y = product("attn.o_proj", values)
    inner = y * w["post_attention_norm.weight"]
    inputs["mlp.gate_proj.weight"] = inputs["mlp.up_proj.weight"] = inner
    inner = np.tanh(product("mlp.gate_proj", inner)) * product("mlp.up_proj", inner)
    inputs["mlp.down_proj.weight"] = inner
    return inputs | {"out": product("mlp.down_proj", inner)}


def in_float64(w: dict[str, Floats]) -> dict[str, npt.NDArray[np.float64]]:
    return {name: tensor.astype(np.float64) for name, tensor in w.items()}


def seen_by(w: dict[str, Floats], x: npt.NDArray[np.float64]) -> dict[str, InputStats]:
    found = {}
    for name, seen in run_layer(in_float64(w), x).items():
        if name.endswith("weight"):
            builder = InputStatsBuilder()
            builder.add(seen.astype(np.float32))
            found[name] = builder.finish()
    return found


@pytest.mark.parametrize(
    "block_format", [BlockFormat(4), BlockFormat(4, 16, True), BlockFormat(4, has_offsets=True)], ids=str
)
def test_awq_scales_a_layer_without_changing_what_it_computes(
    block_format: BlockFormat, rng: np.random.Generator
) -> None:
    w, x = layer_weights(rng), rng.standard_normal((200, HIDDEN)) * np.exp(rng.uniform(-1, 1, HIDDEN))
    before, stats = run_layer(in_float64(w), x), seen_by(w, x)
    scaled = awq.scale_layer(w, stats, lambda name: block_format, layer_spec(), 0)
    after = run_layer(in_float64(dict(scaled.weights)), x)
    np.testing.assert_allclose(after["out"], before["out"], rtol=1e-4, atol=1e-4 * np.abs(before["out"]).max())
    # Queries and keys go through rotary embedding and softmax: they must not change at all.
    np.testing.assert_allclose(after["qk"], before["qk"], rtol=1e-4, atol=1e-4)
    assert {"attn.qkv_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"} <= scaled.scales.keys()
    for name, again in seen_by(dict(scaled.weights), x).items():
        scale = np.abs(again.gram).max()
        np.testing.assert_allclose(scaled.stats[name].gram, again.gram, rtol=1e-3, atol=1e-4 * scale)


def test_awq_leaves_less_output_error_where_some_channels_are_strong(rng: np.random.Generator) -> None:
    w, x = layer_weights(rng), rng.standard_normal((200, HIDDEN))
    stats, block_format = seen_by(w, x), BlockFormat(4)
    scaled = awq.scale_layer(w, stats, lambda name: block_format, layer_spec(), 0)
    for name in scaled.scales:
        plain = output_error(w[name], ROUNDINGS["rtn"](w[name], block_format, None).dequantize(), stats[name])
        again = ROUNDINGS["rtn"](scaled.weights[name], block_format, None).dequantize()
        assert output_error(scaled.weights[name], again, scaled.stats[name]) < plain


def test_awq_leaves_values_alone_where_layers_share_them(rng: np.random.Generator) -> None:
    w = layer_weights(rng)
    stats = seen_by(w, rng.standard_normal((50, HIDDEN)))
    scaled = awq.scale_layer(w, stats, lambda name: BlockFormat(4), layer_spec(kv_map=(0, 0)), 0)
    np.testing.assert_array_equal(scaled.weights["attn.o_proj.weight"], w["attn.o_proj.weight"])
    assert "attn.o_proj.weight" not in scaled.scales


def test_awq_leaves_a_layer_of_floats_alone(rng: np.random.Generator) -> None:
    w = layer_weights(rng)
    scaled = awq.scale_layer(w, seen_by(w, rng.standard_normal((50, HIDDEN))), lambda name: None, layer_spec(), 0)
    assert scaled.weights == w
    assert not scaled.scales
