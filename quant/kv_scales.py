"""The scales of an int8 cache: per channel, so that code 127 lies a little beyond the largest key or value seen.

For most models they are found layer by layer, while weights are rounded (:mod:`shortstack.quant.rounding`). Where
layers use keys and values of layers above them, or do not see their own position, no layer can run alone: then the
whole float model runs over the calibration text as it would over a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.kv_map import producers
from shortstack.runtime.model import Model

Floats = npt.NDArray[np.float32]
# int8 codes of a cache reach 127 at this multiple of what calibration saw: later text may go a little beyond.
KV_HEADROOM = 1.05


def kv_scale(peak: Floats) -> Floats:
    """Return scales [kv_heads * head_dim] for largest magnitudes [kv_heads, head_dim]."""
    scale: Floats = np.maximum(peak.reshape(-1) * np.float32(KV_HEADROOM / 127), np.float32(1e-8))
    return scale.astype(np.float32)


def measure_kv_scales(
    bundle: Bundle, rows: npt.NDArray[np.int64], advance: Callable[[float], None]
) -> Mapping[str, Floats]:
    """Return the scales of all producers, by name, from what the float model's own cache holds after each text.

    Args:
        bundle: The float bundle.
        rows: Calibration text, int64 [texts, seq].
        advance: Called with 1 after each text.
    """
    model, spec = Model(bundle), bundle.manifest.spec
    peaks: dict[str, Floats] = {}
    for row in rows:
        model.exclusive_stack().prefill(row.tolist(), 0, with_logits=False)
        for layer in producers(spec.kv_map, 0, spec.num_hidden_layers):
            for part, cache in zip(names.KV_PARTS, model.cache.read(layer, 0, len(row)), strict=True):
                peak = np.abs(cache[0].astype(np.float32)).max(axis=1)  # [kv_heads, head_dim]
                name = names.kv_scale(layer, part)
                peaks[name] = np.maximum(peaks[name], peak) if name in peaks else peak
        advance(1)
    return {name: kv_scale(peak) for name, peak in peaks.items()}
