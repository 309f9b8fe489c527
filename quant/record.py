"""How a bundle was quantized, as its quantization.json says: what a report, made at any later time, cannot measure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import BundleError


@dataclass(frozen=True, slots=True)
class QuantizationRecord:
    """One quantization that is done.

    Attributes:
        preset: Its name.
        method: How weights were rounded.
        source_weights_sha256: Of the weights.data of the bundle before.
        calibration: File and tokens; None without calibration.
        max_kl: What ``--max-kl`` asked for; None without it.
        errors: Relative error of each rounded matrix, by name: of its outputs on the calibration text, or of its
            weights where there was none.
    """

    preset: str
    method: str
    source_weights_sha256: str
    calibration: str | None
    max_kl: float | None
    errors: Mapping[str, float]

    def content(self) -> bytes:
        """Return the content of quantization.json."""
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


def read_record(bundle: Bundle) -> QuantizationRecord | None:
    """Return how a bundle was quantized; None if it does not say, as bundles of older versions do not.

    Raises:
        BundleError: quantization.json cannot be read.
    """
    if names.QUANTIZATION_FILE not in bundle.manifest.files:
        return None
    path = bundle.folder / names.QUANTIZATION_FILE
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return QuantizationRecord(**data)
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{path} cannot be read: {error}", remedy="quantize the bundle again") from None
