"""What one quantization, and the report on it, are asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import DType
from shortstack.graphs.texts import CALIBRATION_TEXT, HELDOUT_TEXT
from shortstack.quant.method import find_method
from shortstack.quant.preset import Preset
from shortstack.quant.side_product import Tuning

CALIBRATION_TOKENS = 8_192
HELDOUT_TOKENS = 2_048
_FEWEST_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model is quantized, whatever its floats come from.

    Attributes:
        preset: The format of each of its parts.
        calibration: Text that calibrated methods look at.
        calibration_tokens: How much of it.
        max_kl: Search the cheapest mix whose mean KL divergence from the floats stays under this, in nats per token;
            None takes the preset as it is.
        tuning: What to do about a fine-tuning that rounding would erase.

    Raises:
        RequestError: A number out of range.
    """

    preset: Preset
    calibration: Path = CALIBRATION_TEXT
    calibration_tokens: int = CALIBRATION_TOKENS
    max_kl: float | None = None
    tuning: Tuning = "keep"

    def __post_init__(self) -> None:
        if self.max_kl is not None and not 0 < self.max_kl < float("inf"):
            raise RequestError("--max-kl", found=self.max_kl, expected="nats per token, above 0; try 0.01")
        _check_tokens("--calibration-tokens", self.calibration_tokens)

    @property
    def reads_text(self) -> bool:
        """Whether the calibration text is read: for the weights, for a search, or for the scales of an int8 cache.

        Raises:
            RequestError: The method is unknown.
        """
        is_weighed = find_method(self.preset.method).uses_text or self.max_kl is not None
        return is_weighed or self.preset.kv_cache == "int8"


@dataclass(frozen=True, slots=True)
class QuantizeSpec:
    """One quantization of a bundle; the fields that :class:`Quantization` has too mean the same.

    Attributes:
        bundle: The bundle to shrink.
        out: The bundle to write.
        preset: The format of each of its parts.
        dtype: Type of activations and of what is not in blocks; None keeps the bundle's.
        calibration: Text that calibrated methods look at.
        calibration_tokens: How much of it.
        max_kl: The largest divergence of a searched mix.
        tuning: What to do about a fine-tuning.
        overwrite: Replace an existing bundle.
        genai: Also write what onnxruntime-genai needs to run the uncut model; a bundle that has it passes it on anyway.

    Raises:
        RequestError: A number out of range.
    """

    bundle: Path
    out: Path
    preset: Preset
    dtype: DType | None = None
    calibration: Path = CALIBRATION_TEXT
    calibration_tokens: int = CALIBRATION_TOKENS
    max_kl: float | None = None
    tuning: Tuning = "keep"
    overwrite: bool = False
    genai: bool = False

    def __post_init__(self) -> None:
        self.quantization()

    def quantization(self) -> Quantization:
        """Return how the bundle is quantized."""
        return Quantization(self.preset, self.calibration, self.calibration_tokens, self.max_kl, self.tuning)


@dataclass(frozen=True, slots=True)
class ReportSpec:
    """One report on a quantized bundle.

    Attributes:
        source: The bundle before.
        result: The bundle after.
        heldout: Text that they are compared on.
        heldout_tokens: How much of it.
        prompts: How many greedy continuations are compared.
        continuation_tokens: Length of each.

    Raises:
        RequestError: A number out of range.
    """

    source: Path
    result: Path
    heldout: Path = HELDOUT_TEXT
    heldout_tokens: int = HELDOUT_TOKENS
    prompts: int = 8
    continuation_tokens: int = 64

    def __post_init__(self) -> None:
        _check_tokens("--heldout-tokens", self.heldout_tokens)


def _check_tokens(option: str, tokens: int) -> None:
    if tokens < _FEWEST_TOKENS:
        raise RequestError(option, found=tokens, expected=f"at least {_FEWEST_TOKENS}, better some thousands")
