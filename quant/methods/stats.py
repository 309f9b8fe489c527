"""The inputs of a projection, summed up over calibration text."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


_DAMPING = 0.01  # of the mean diagonal, as in the paper on GPTQ
_SMALL = 256  # rows and columns of a triangular matrix that is inverted as a whole
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, eq=False)
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

    def inverse_factor(self) -> Floats:
        """Return the upper factor U of the damped gram matrix's inverse, H^-1 = U^T U, float32 [width, width].

        Made once, whichever thread asks first. H = R R^T with R upper is a Cholesky factorisation from the other end,
        and U = R^-1.
        """
        with _one_at_a_time:
            return self._inverse_factor

    @functools.cached_property
    def _inverse_factor(self) -> Floats:
        hessian = self.gram[::-1, ::-1].astype(np.float64)
        # An input that never fires has the damping alone: it neither compensates nor is compensated.
        hessian[np.diag_indices_from(hessian)] += _DAMPING * (float(np.diag(hessian).mean()) or 1.0)
        factor = np.linalg.cholesky(hessian)[::-1, ::-1]
        del hessian
        _invert_upper(factor)
        return np.ascontiguousarray(np.triu(factor), np.float32)

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
        product = x.T @ x
        if self._sum is None:
            self._sum = product.astype(np.float64)
        else:
            self._sum += product
        self._count += len(x)

    def finish(self) -> InputStats:
        """Return the statistics of all inputs; nothing can be added after that."""
        assert self._sum is not None, "no inputs were added"
        self._sum /= max(self._count, 1)
        found, self._sum = InputStats(self._sum.astype(np.float32), self._count), None
        return found


def output_error(weight: Floats, dequantized: Floats, stats: InputStats | None) -> float:
    """Return the relative error of a matrix's outputs on the text that ``stats`` come from.

    sqrt(tr(E G E^T) / tr(W G W^T)) with E the rounding error of W [out, in] and G the gram matrix; where there are no
    inputs, that of the weights, sqrt(tr(E E^T) / tr(W W^T)).
    """
    found, whole = (energy(m, stats) for m in (weight - dequantized, weight))
    return float(np.sqrt(found / max(whole, 1e-30)))


def energy(matrix: Floats, stats: InputStats | None) -> float:
    """Return tr(M G M^T) of a matrix [out, in], or tr(M M^T) where there are no inputs, in float64."""
    product = matrix if stats is None else matrix @ stats.gram
    return max(float(np.einsum("nk,nk->", product, matrix, dtype=np.float64)), 0.0)


def _invert_upper(matrix: npt.NDArray[np.floating[Any]]) -> None:
    """Replace an upper triangular matrix by its inverse; what is below the diagonal is left as it is, near 0.

    With A, B, D the upper left, upper right and lower right quarter: the inverse has A^-1, -A^-1 B D^-1 and D^-1.
    """
    width = len(matrix)
    if width <= _SMALL:
        matrix[:] = np.linalg.inv(matrix)
        return
    middle = width // 2
    _invert_upper(matrix[:middle, :middle])
    _invert_upper(matrix[middle:, middle:])
    right = matrix[:middle, middle:]
    right[:] = -(matrix[:middle, :middle] @ right @ matrix[middle:, middle:])
