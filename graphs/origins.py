"""What the matrices of a bundle were in a checkpoint that had them in blocks, and how near the bundle's are to them.

``export --keep-blocks`` writes it into bundle.json. A matrix is

- *kept bit for bit*: every weight is the one that the checkpoint's block stands for;
- *nearly kept*: the codes are the checkpoint's, but not all numbers beside them fit;
- *rounded*: the weights were dequantized and rounded anew.

Standard library only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from shortstack.graphs.precision import BlockFormat

Fate = Literal["exact", "near", "rounded"]
ErrorOf = Literal["outputs", "weights"]
RELATIVE_TO: dict[ErrorOf | None, str] = {
    "weights": "the float weights",
    "outputs": "the float outputs on the calibration text",
    None: "the float outputs on the calibration text, or the float weights",
}
"""What an error is relative to: the root mean square of the difference over that of these; None is not said."""

_FATES: tuple[Fate, ...] = ("exact", "near", "rounded")
_LONGEST_KIND = 200  # characters


@dataclass(frozen=True, slots=True)
class Origin:
    """What one matrix was.

    Attributes:
        kind: The type of its blocks in the checkpoint, such as ``Q6_K``; of a stack ``Q4_K+Q6_K``.
        is_kept: Its blocks were kept, exactly or nearly.
        error: Root mean square of the difference from the checkpoint's, over that of the checkpoint's.
        error_of: Whether the error is of the weights or, where a matrix was rounded for a calibration text, of its
            outputs on that text.

    Raises:
        ValueError: A kind or an error that nothing has.
    """

    kind: str
    is_kept: bool
    error: float
    error_of: ErrorOf = "weights"

    def __post_init__(self) -> None:
        if not 0 < len(self.kind) <= _LONGEST_KIND or not self.kind.isprintable():
            raise ValueError(f"an origin is of the kind {self.kind[:_LONGEST_KIND]!r}")
        if self.error_of not in ("weights", "outputs") or (self.is_kept and self.error_of == "outputs"):
            raise ValueError(f"an origin has an error of {self.error_of!r}")
        if not math.isfinite(self.error) or self.error < 0:
            raise ValueError(f"an origin has the error {self.error!r}")

    @property
    def fate(self) -> Fate:
        """What became of its blocks."""
        if not self.is_kept:
            return "rounded"
        return "near" if self.error else "exact"


@dataclass(frozen=True, slots=True)
class OriginGroup:
    """Matrices of one origin that are stored in one way.

    Attributes:
        kind: What they were.
        fate: What became of their blocks.
        stored_as: Their format in the bundle.
        matrices: Their names.
        error: The largest of their errors.
        error_of: What these are errors of.
    """

    kind: str
    fate: Fate
    stored_as: str
    matrices: tuple[str, ...]
    error: float
    error_of: ErrorOf

    @property
    def words(self) -> str:
        """The group as people read it.

        ``27 matrices nearly (Q4_K as int4 with offsets, blocks of 32): up to 0.68% off the float weights``.
        """
        count = "1 matrix" if len(self.matrices) == 1 else f"{len(self.matrices)} matrices"
        what = {"exact": "bit for bit", "near": "nearly", "rounded": "rounded"}[self.fate]
        off = f": up to {100 * self.error:.2g}% off {RELATIVE_TO[self.error_of]}" if self.error else ""
        return f"{count} {what} ({self.kind} as {self.stored_as}){off}"


def grouped(origins: Mapping[str, Origin], formats: Mapping[str, BlockFormat]) -> list[OriginGroup]:
    """Return the matrices by what they were and are: those that are kept bit for bit first, those rounded last.

    Args:
        origins: By name of the matrix.
        formats: The format of each of them.
    """
    found: dict[tuple[str, Fate, str, ErrorOf], list[str]] = {}
    for name, origin in origins.items():
        found.setdefault((origin.kind, origin.fate, str(formats[name]), origin.error_of), []).append(name)
    groups = [
        OriginGroup(kind, fate, stored_as, tuple(matrices), max(origins[name].error for name in matrices), error_of)
        for (kind, fate, stored_as, error_of), matrices in found.items()
    ]
    return sorted(groups, key=lambda group: _FATES.index(group.fate))


def origins_to_json(origins: Mapping[str, Origin]) -> dict[str, Any]:
    """Return origins by the name of the matrix as JSON-ready data."""
    return {name: asdict(origin) for name, origin in sorted(origins.items())}


def origins_from_json(data: Mapping[str, Any], formats: Mapping[str, BlockFormat]) -> dict[str, Origin]:
    """Rebuild what :func:`origins_to_json` wrote.

    Args:
        data: The JSON object.
        formats: The format of each matrix in blocks.

    Raises:
        ValueError: A field is of another type or value, or a matrix is not in blocks.
        KeyError: A field is missing.
    """
    found = {}
    for name, entry in data.items():
        if name not in formats:
            raise ValueError(f"origins.{name} is not a matrix in blocks")
        kind, is_kept, error = entry["kind"], entry["is_kept"], entry["error"]
        is_number = (
            type(error) in (int, float) and 0 <= error <= sys.float_info.max
        )  # Python's JSON has NaN and 10**400
        if type(kind) is not str or type(is_kept) is not bool or not is_number:
            raise ValueError(f"origins.{name} is {entry!r}")
        found[name] = Origin(kind, is_kept, float(error), entry.get("error_of", "weights"))
    return found
