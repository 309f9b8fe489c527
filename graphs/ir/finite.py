"""Checks that weights are finite: a model with NaN or infinity in it gives no token, and no reason."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shortstack.graphs.errors import ShortstackError


def check_finite(where: str, array: npt.NDArray[np.generic], error: type[ShortstackError], remedy: str) -> None:
    """Check that no value of a tensor is NaN or infinite.

    Args:
        where: The file or folder, and the tensor.
        array: Its values, of any type; integers pass.
        error: The class of the error.
        remedy: What to do then.

    Raises:
        ShortstackError: Of class ``error``; the message has the number of such values, and where the first one is.
    """
    if not np.issubdtype(array.dtype, np.floating):
        return
    wrong = ~np.isfinite(array)
    count = int(np.count_nonzero(wrong))
    if count == 0:
        return
    first = [int(index) for index in np.unravel_index(int(np.argmax(wrong)), array.shape)]
    raise error(
        where,
        found=f"NaN or infinity in {count} of {array.size} values, first at {first}",
        expected="finite numbers",
        remedy=remedy,
    )
