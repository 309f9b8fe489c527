"""How a bundle was quantized, as its quantization.json says: what a report, made at any later time, cannot measure."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import BundleError
from shortstack.graphs.origins import ErrorOf
from shortstack.graphs.read_file import read_json_object
from shortstack.quant.side_product import FATES, Fate

_AGAIN = "quantize the bundle again"


@dataclass(frozen=True, slots=True)
class Searched:
    """The mix that ``--max-kl`` found.

    Attributes:
        kl: Its mean KL divergence from the floats, nats per token, as the search measured it.
        tokens: Length of the text that it was measured on: the last part of the calibration text.
        matrices: Number of the matrices that were searched, by what they became: ``int4``, ``int8`` or ``float``.
    """

    kl: float
    tokens: int
    matrices: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class QuantizationRecord:
    """One quantization that is done.

    Attributes:
        preset: Its name.
        method: How weights were rounded.
        source_weights_sha256: Of the weights.data of the bundle before; None where there was none, but a checkpoint.
        calibration: File and tokens; None without calibration.
        max_kl: What ``--max-kl`` asked for; None without it.
        errors: Error of each rounded matrix, by name: root mean square of the difference over that of the floats.
        of_outputs: The matrices whose error is of their outputs on the calibration text; those of the others are of
            their weights. None in older bundles, which do not say.
        tuning: What became of a fine-tuning that rounding would have erased, by the name of the matrix: ``kept`` in a
            side product, or ``at risk`` and rounded off the grid. Empty where none was found, and in older bundles.
        search: What ``--max-kl`` found; None without it, and in older bundles.
    """

    preset: str
    method: str
    source_weights_sha256: str | None
    calibration: str | None
    max_kl: float | None
    errors: Mapping[str, float]
    tuning: Mapping[str, Fate] = field(default_factory=dict)
    search: Searched | None = None
    of_outputs: tuple[str, ...] | None = None

    def fates(self) -> dict[str, int]:
        """Return how many matrices have each fate of a fine-tuning; empty where none was found."""
        return dict(Counter(self.tuning.values()))

    def found(self) -> dict[str, Any]:
        """Return what ``--json`` says of a search and of fine-tunings."""
        return {"tuning": self.fates(), "search": None if self.search is None else asdict(self.search)}

    def error_of(self, name: str) -> ErrorOf | None:
        """Return what the error of a matrix is of; None if the bundle does not say."""
        if self.of_outputs is None:
            return None
        return "outputs" if name in self.of_outputs else "weights"

    def worst(self, count: int) -> tuple[tuple[str, float, ErrorOf | None], ...]:
        """Return the matrices with the largest errors and what these are of, the largest first."""
        found = sorted(self.errors.items(), key=lambda item: -item[1])[:count]
        return tuple((name, error, self.error_of(name)) for name, error in found)

    def content(self) -> bytes:
        """Return the content of quantization.json."""
        data = asdict(self)
        if not self.tuning:
            del data["tuning"]
        if self.search is None:
            del data["search"]
        if self.of_outputs is None:
            del data["of_outputs"]
        return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def read_record(bundle: Bundle) -> QuantizationRecord | None:
    """Return how a bundle was quantized; None if it does not say, as bundles of older versions do not.

    Raises:
        BundleError: quantization.json cannot be read, or a field of it is absent, unknown or not valid.
    """
    if names.QUANTIZATION_FILE not in bundle.manifest.files:
        return None
    path = bundle.folder / names.QUANTIZATION_FILE
    data = read_json_object(path, BundleError, _AGAIN)
    data = {"tuning": {}, "search": None, "of_outputs": None, **data}
    wrong = [f"no field {name}" for name in _FIELDS if name not in data]
    wrong += [f"an unknown field {_short(name)}" for name in data if name not in _FIELDS]
    if wrong:
        raise BundleError(str(path), found=", ".join(wrong), expected=f"the fields {', '.join(_FIELDS)}", remedy=_AGAIN)
    for name, (is_valid, expected) in _FIELDS.items():
        if not is_valid(data[name]):
            raise BundleError(f"{path}: field {name}", found=_short(data[name]), expected=expected, remedy=_AGAIN)
    for name, value in data["errors"].items():
        if not _is_text(name) or not _is_number(value):
            where, expected = f"{path}: field errors[{_short(name)}]", "the name of a matrix and a finite number >= 0"
            raise BundleError(where, found=_short(value), expected=expected, remedy=_AGAIN)
    for name, value in data["tuning"].items():
        if not _is_text(name) or value not in FATES:
            where = f"{path}: field tuning[{_short(name)}]"
            raise BundleError(where, found=_short(value), expected=" or ".join(FATES), remedy=_AGAIN)
    search = None if data["search"] is None else Searched(**data["search"])
    of_outputs = None if data["of_outputs"] is None else tuple(data["of_outputs"])
    return QuantizationRecord(**{**data, "search": search, "of_outputs": of_outputs})


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    """Whether a value is a number of at least 0 that a float can hold; Python's JSON has NaN, Infinity and 10**400."""
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max  # type: ignore[operator]


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_search(value: object) -> bool:
    """Whether a value is what :class:`Searched` is in JSON."""
    if not isinstance(value, dict) or value.keys() != {"kl", "tokens", "matrices"}:
        return False
    counts = value["matrices"]
    return (
        _is_number(value["kl"])
        and type(value["tokens"]) is int
        and isinstance(counts, dict)
        and all(type(count) is int for count in counts.values())
    )


def _short(value: object) -> str:
    """Return a value as a message shows it."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_SHOWN = 60  # characters of a value
_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "preset": (_is_text, "a text"),
    "method": (_is_text, "a text"),
    "source_weights_sha256": (lambda value: value is None or _is_text(value), "a text or null"),
    "calibration": (lambda value: value is None or _is_text(value), "a text or null"),
    "max_kl": (lambda value: value is None or _is_number(value), "a finite number >= 0 or null"),
    "errors": (lambda value: isinstance(value, dict), "an object of numbers"),
    "tuning": (lambda value: isinstance(value, dict), "an object of texts"),
    "of_outputs": (lambda value: value is None or _is_texts(value), "a list of texts or null"),
    "search": (lambda value: value is None or _is_search(value), "an object with kl, tokens and matrices, or null"),
}
