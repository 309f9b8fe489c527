"""AWQ: scale a layer's channels before it is rounded, so that the weights of strong inputs are rounded finer.

A projection's input channel may be divided by s where what makes it is divided by s, and the projection's columns are
multiplied by s: the layer computes the same. s = rms(x)^alpha, alpha found by trying which leaves the least error of
the outputs (Lin et al. 2023, arXiv 2306.00978; there mean |x|). What takes the division, where the layer has it::

    input_norm                   for qkv_proj
    v rows of qkv_proj           for o_proj, one scale for all query heads that read a value head; not where values
                                 are normalised, are the keys, or are another layer's
    post_attention_norm          for the projections that the MLP begins with
    up_proj rows                 for down_proj of a gated MLP: an activation is not linear, the product with up is

Rows divided by a scale get the same codes, since each row's blocks have scales of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.kv_map import identity_kv_map
from shortstack.graphs.layer_weights import matrix_parts
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import ModelSpec
from shortstack.quant.methods.offsets import rounded_to_nearest
from shortstack.quant.methods.stats import Floats, InputStats

_ALPHAS = tuple(np.linspace(0.0, 1.0, 11).tolist())
_LIMIT = 1e3  # between the largest and smallest scale of a projection: beyond, float32 norms lose what they carry

INPUT_NORM = "input_norm"
POST_ATTENTION_NORM = "post_attention_norm"
QKV, QKV_BIAS = "attn.qkv_proj.weight", "attn.qkv_proj.bias"
O_PROJ = "attn.o_proj.weight"
UP, UP_BIAS = "mlp.up_proj.weight", "mlp.up_proj.bias"
DOWN = "mlp.down_proj.weight"


@dataclass(frozen=True, slots=True)
class ScaledLayer:
    """A layer that computes the same from other weights.

    Attributes:
        weights: Its weights, by the names that were given.
        stats: What its projections now multiply, by name.
        scales: What the input channels of each projection were divided by, float32 [in]; absent where nothing was done.
    """

    weights: Mapping[str, Floats]
    stats: Mapping[str, InputStats]
    scales: Mapping[str, Floats]


def scale_layer(
    weights: Mapping[str, Floats],
    stats: Mapping[str, InputStats],
    block_format_of: Callable[[str], BlockFormat | None],
    spec: ModelSpec,
    layer: int,
) -> ScaledLayer:
    """Return a layer whose outputs suffer less from rounding.

    Args:
        weights: Norms [hidden], projections [out, in] and biases [out] of one layer, by their names within a layer.
        stats: Inputs of each projection, by its name. One that is missing is left as it is.
        block_format_of: Format of a projection; None where it stays in floats.
        spec: The model.
        layer: Which layer.
    """
    scaled, scaled_stats, scales = dict(weights), dict(stats), dict[str, Floats]()

    def divide(projections: Sequence[str], shared: Callable[[Floats], Floats]) -> Floats | None:
        """Scale the columns of projections of one input; return what its channels are to be divided by."""
        found = _search([n for n in projections if n in stats], scaled, scaled_stats, block_format_of, shared)
        if found is None:
            return None
        for name in projections:
            scaled[name] = (scaled[name] * found).astype(np.float32)
            scaled_stats[name] = scaled_stats[name].divided(found)
            scales[name] = found
        return found

    own, reads = spec.layers[layer], matrix_parts(spec.weights(layer))
    mlp_reads_input_norm = own.is_parallel and own.before_mlp is None
    for norm, source in ((INPUT_NORM, "stream"), (POST_ATTENTION_NORM, "mlp")):
        projections = [part for part, read in reads.items() if read == source]
        if f"{norm}.weight" not in weights or (norm == INPUT_NORM and mlp_reads_input_norm):
            continue
        if (found := divide(projections, lambda s: s)) is not None:
            for name in (f"{norm}.weight", f"{norm}.bias"):
                if name in scaled:
                    scaled[name] = (scaled[name] / found).astype(np.float32)
    # A layer that reads the values of another one cannot scale them, nor may others read scaled ones. Where values are
    # normalised, a scale of their channels would change all of them, and where they are the keys, the keys, too.
    is_linear = own.attention.v_norm is None and not own.attention.k_equals_v
    if is_linear and spec.kv_map == identity_kv_map(spec.num_hidden_layers):
        kv_heads, width = own.attention.kv_heads, own.attention.cache_head_dim
        group = own.attention.heads // kv_heads
        found = divide((O_PROJ,), lambda s: _one_per_value(s, kv_heads, group, width))
        if found is not None:
            of_values = found.reshape(kv_heads, group, width)[:, 0].reshape(-1)  # [kv_heads * head_dim]
            _divide_rows(scaled, (QKV, QKV_BIAS), of_values)
    if own.mlp.is_gated and (found := divide((DOWN,), lambda s: s)) is not None:
        _divide_rows(scaled, (UP, UP_BIAS), found)
    return ScaledLayer(scaled, scaled_stats, scales)


def scale_stored(
    floats: Mapping[str, Floats],
    stats: Mapping[str, InputStats],
    block_format_of: Callable[[str], BlockFormat | None],
    spec: ModelSpec,
    layer: int,
) -> tuple[dict[str, Floats], dict[str, InputStats]]:
    """Do the same with tensors as a bundle stores them, by full name: matrices [in, out]; returns them so.

    Args:
        floats: The tensors of a layer; those of other names, such as rotary tables, stay as they are.
        stats: Inputs of each projection.
        block_format_of: Format of a projection; None where it stays in floats.
        spec: The model.
        layer: Which layer.
    """
    prefix = names.layer_weight(layer, "")
    others = {name: tensor for name, tensor in floats.items() if not name.startswith(prefix)}
    own = {name.removeprefix(prefix): tensor for name, tensor in floats.items() if name.startswith(prefix)}
    matrices = matrix_parts(spec.weights(layer))
    scaled = scale_layer(
        {part: tensor.T if part in matrices else tensor for part, tensor in own.items()},
        {name.removeprefix(prefix): seen for name, seen in stats.items()},
        lambda part: block_format_of(prefix + part),
        spec,
        layer,
    )
    stored = {p: np.ascontiguousarray(w.T) if p in matrices else w for p, w in scaled.weights.items()}
    return (
        {prefix + part: tensor for part, tensor in stored.items()} | others,
        {prefix + part: seen for part, seen in scaled.stats.items()},
    )


def _search(
    projections: Sequence[str],
    weights: Mapping[str, Floats],
    stats: Mapping[str, InputStats],
    block_format_of: Callable[[str], BlockFormat | None],
    shared: Callable[[Floats], Floats],
) -> Floats | None:
    """Return the scale [in] that leaves the least output error in all projections together; None if 1 does."""
    formats = {name: f for name in projections if (f := block_format_of(name)) is not None}
    if not formats:
        return None
    first = stats[next(iter(formats))]
    best, best_error = None, np.inf
    for alpha in _ALPHAS:
        scale = _scale(shared(first.mean_square), alpha)
        error = 0.0
        for name, block_format in formats.items():
            times = weights[name] * scale
            left = (rounded_to_nearest(times, block_format.fitted(len(scale))).dequantize() - times) / scale
            error += float(np.einsum("nk,nk->", left @ stats[name].gram, left, dtype=np.float64))
        if error < best_error:
            best, best_error = (scale if alpha else None), error
    return best


def _scale(mean_square: Floats, alpha: float) -> Floats:
    """Return rms^alpha, its largest and smallest value at equal distance from 1, float32 [in]."""
    rms = np.sqrt(np.maximum(mean_square.astype(np.float64), 0))
    # A channel that never fires is not worth a finer grid, and is not divided by zero.
    rms = np.maximum(rms, (rms.max() or 1.0) / _LIMIT)
    scale = rms**alpha
    return np.asarray(scale / np.sqrt(scale.max() * scale.min()), np.float32)


def _one_per_value(mean_square: Floats, kv_heads: int, group: int, width: int) -> Floats:
    """Return mean squares [heads * head_dim] averaged over the query heads that read the same value head."""
    of_values = mean_square.reshape(kv_heads, group, width).mean(axis=1, keepdims=True)
    return np.asarray(np.broadcast_to(of_values, (kv_heads, group, width)).reshape(-1), np.float32)


def _divide_rows(weights: dict[str, Floats], matrix_and_bias: tuple[str, str], scale: Floats) -> None:
    """Divide the last rows of a matrix [out, in] and of its bias [out]: value heads come last, and up has no others."""
    for name in matrix_and_bias:
        if name in weights:
            rows = weights[name].copy()
            at = len(rows) - len(scale)
            rows[at:] /= scale if rows.ndim == 1 else scale[:, None]
            weights[name] = rows
