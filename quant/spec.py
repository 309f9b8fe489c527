"""What one quantization is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import DType
from shortstack.graphs.texts import CALIBRATION_TEXT, HELDOUT_TEXT
from shortstack.quant.preset import Preset


@dataclass(frozen=True, slots=True)
class QuantizeSpec:
    """One quantization.

    Attributes:
        bundle: The bundle to shrink.
        out: The bundle to write.
        preset: What becomes of its parts.
        dtype: Type of activations and of what is not in blocks; None keeps the bundle's.
        calibration: Text that calibrated methods look at.
        calibration_tokens: How much of it.
        heldout: Text that the result is judged on.
        heldout_tokens: How much of it.
        prompts: How many greedy continuations are compared.
        continuation_tokens: Length of each.
        max_kl: Search the cheapest mix whose mean KL divergence from the source stays under this, in nats per token;
            None takes the preset as it is.
        with_report: Whether to compare the result with its source.
        overwrite: Replace an existing bundle.

    Raises:
        RequestError: A number out of range.
    """

    bundle: Path
    out: Path
    preset: Preset
    dtype: DType | None = None
    calibration: Path = CALIBRATION_TEXT
    calibration_tokens: int = 8_192
    heldout: Path = HELDOUT_TEXT
    heldout_tokens: int = 8_192
    prompts: int = 8
    continuation_tokens: int = 64
    max_kl: float | None = None
    with_report: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.max_kl is not None and not 0 < self.max_kl < float("inf"):
            raise RequestError("--max-kl", found=self.max_kl, expected="nats per token, above 0; try 0.01")
        for option, tokens in (
            ("--calibration-tokens", self.calibration_tokens),
            ("--heldout-tokens", self.heldout_tokens),
        ):
            if tokens < 32:
                raise RequestError(option, found=tokens, expected="at least 32, better some thousands")
