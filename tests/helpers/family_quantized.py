"""What calibrated methods of rounding do to the tiny model of a family, and how far the result is from its source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from helpers.families import CONTEXT, MadeFamily
from helpers.quantized import FEW_TOKENS, INT4, INT8, preset
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.names import WEIGHTS_FILE
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.texts import CALIBRATION_TEXT
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import QuantizeSpec
from shortstack.quant.texts import open_tokenizer, read_rows, row_length
from shortstack.runtime import load

METHODS = ("awq", "awq-gptq")
LIMITS = (0.001, 0.05)
WORSE = 1.5
"""How much further than rounding to nearest a scaled layer may be in int8. Measured on all families: at most 1.12. A
scale that is not undone gave 2.5, on a model whose values are normalised."""

Floats = npt.NDArray[np.float64]


def rounds(made: MadeFamily, folder: Path, method: str) -> None:
    """Scaled layers compute the same: in int8 hardly further off than to nearest. In int4 drafts leave no trace."""
    rows, ours = _rows(made), {}
    for name in ("rtn", method):
        _quantized(made, folder / name, INT8, name)
        ours[name] = divergence(made.bundle, folder / name, rows)
    assert 0 < ours[method] <= WORSE * ours["rtn"], ours
    _quantized(made, folder / "int4", INT4, method)
    model, prompt = load(folder / "int4"), made.text(9, seed=2)
    settings: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True}
    plain = model.generate(prompt, **settings)
    drafted = model.generate(prompt, strategy="self-speculative", **settings)
    assert drafted.stats.drafted
    assert drafted.tokens == plain.tokens


def searches(made: MadeFamily, folder: Path) -> None:
    """A searched mix stays under its limit as the finished bundle computes, and a larger limit is cheaper."""
    rows, sizes = _rows(made), []
    for number, limit in enumerate(LIMITS):
        out = folder / str(number)
        _quantized(made, out, INT4, "rtn", max_kl=limit)
        found = divergence(made.bundle, out, rows)
        assert found <= limit, (found, limit)
        sizes.append((out / WEIGHTS_FILE).stat().st_size)
    assert sizes[1] < sizes[0] < (made.bundle / WEIGHTS_FILE).stat().st_size


CHECKS: dict[str, Callable[[MadeFamily, Path], None]] = {
    **{method: lambda made, folder, method=method: rounds(made, folder, method) for method in METHODS},  # type: ignore[misc]
    "--max-kl": searches,
}


def divergence(source: Path, result: Path, rows: npt.NDArray[np.int64]) -> float:
    """Return the mean KL divergence of the final head of two bundles on a text, in nats per token."""
    models, total = (load(source), load(result)), 0.0
    depth = models[0].bundle.manifest.spec.num_hidden_layers
    for row in rows:
        logp, logq = (_log_softmax(model.activations(row.tolist()).heads[depth]) for model in models)
        total += float((np.exp(logp) * (logp - logq)).sum())
    return total / rows.size


def _log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    wide = logits.astype(np.float64)
    return wide - np.asarray(np.logaddexp.reduce(wide, axis=1, keepdims=True))


def _rows(made: MadeFamily) -> npt.NDArray[np.int64]:
    """Return the part of the calibration text that the search measures on, and does not round for."""
    rows = read_rows(
        CALIBRATION_TEXT, "--calibration", open_tokenizer(open_bundle(made.bundle)), FEW_TOKENS, row_length(CONTEXT)
    )
    return rows[-(len(rows) // 4) :]


def _quantized(made: MadeFamily, out: Path, block_format: BlockFormat, method: str, **options: Any) -> None:
    mix = preset(block_format, method=method)
    quantize_bundle(QuantizeSpec(made.bundle, out, mix, calibration_tokens=FEW_TOKENS, **options))
