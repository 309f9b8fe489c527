"""The inputs of a projection, summed up over calibration text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class InputStats:
    """The inputs of a projection.

    Attributes:
        gram: Mean over positions of x x^T, float32 [width, width].
        count: Positions.
    """

    gram: Floats
    count: int

    @property
    def mean_square(self) -> Floats:
        """Mean square of each input, float32 [width]."""
        return np.ascontiguousarray(np.diag(self.gram), np.float32)

    def divided(self, scale: Floats) -> InputStats:
        """Return the statistics of inputs that are each divided by a scale [width]."""
        inverse = 1 / scale.astype(np.float64)
        return InputStats((self.gram * inverse * inverse[:, None]).astype(np.float32), self.count)


class InputStatsBuilder:
    """Adds up inputs as they come."""

    def __init__(self) -> None:
        self._sum: npt.NDArray[np.float64] | None = None
        self._count = 0

    def add(self, x: Floats) -> None:
        """Add inputs [positions, width]."""
        product = (x.T @ x).astype(np.float64)
        self._sum = product if self._sum is None else self._sum + product
        self._count += len(x)

    def finish(self) -> InputStats:
        """Return the statistics of all inputs so far."""
        assert self._sum is not None, "no inputs were added"
        return InputStats((self._sum / max(self._count, 1)).astype(np.float32), self._count)


def output_error(weight: Floats, dequantized: Floats, stats: InputStats | None) -> float:
    """Return the relative error of a matrix's outputs on the text that ``stats`` come from.

    sqrt(tr(E G E^T) / tr(W G W^T)) with E the rounding error of W [out, in] and G the gram matrix; where there are no
    inputs, that of the weights, sqrt(tr(E E^T) / tr(W W^T)).
    """
    found, whole = (_energy(m, stats) for m in (weight - dequantized, weight))
    return float(np.sqrt(found / max(whole, 1e-30)))


def _energy(matrix: Floats, stats: InputStats | None) -> float:
    product = matrix if stats is None else matrix @ stats.gram
    return max(float(np.einsum("nk,nk->", product, matrix, dtype=np.float64)), 0.0)
