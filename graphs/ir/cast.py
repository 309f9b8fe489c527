"""Casting weights to the dtype that they are stored in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.spec import DType


def cast(name: str, array: npt.NDArray[np.float32], dtype: DType) -> npt.NDArray[np.floating]:
    """Return the array in another dtype.

    Raises:
        UnsupportedError: A finite value becomes infinite.
    """
    if dtype == "float32":
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if not np.isfinite(out).all():
        raise UnsupportedError(
            f"tensor {name} does not fit float16",
            found=f"a value of {np.abs(array).max():.3g}",
            expected="at most 65504",
            remedy="keep it in fp32 (--dtype fp32)",
        )
    return out
