"""The id map of a trimmed head: which token each row of the head's weight predicts."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import BundleError
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.read_file import read_file

_MAX_HEADER_BYTES = 16_384  # numpy itself reads no more than 10,000


def read_draft_vocab(bundle: Bundle, exit_spec: ExitSpec) -> npt.NDArray[np.int64] | None:
    """Return the token id of each row of an exit's head, ascending int64 [draft_vocab]; None for a full head.

    Raises:
        BundleError: The file does not hold such an array.
    """
    if exit_spec.draft_vocab is None:
        return None
    return _read(bundle, names.draft_vocab_file(exit_spec.exit_layer), exit_spec.draft_vocab)


def read_drafter_vocab(bundle: Bundle) -> npt.NDArray[np.int64] | None:
    """Return the same for the head of the bundle's drafter."""
    drafter = bundle.manifest.plan.drafter
    if drafter is None or drafter.draft_vocab is None:
        return None
    return _read(bundle, names.drafter_vocab_file(), drafter.draft_vocab)


def _read(bundle: Bundle, file: str, size: int) -> npt.NDArray[np.int64]:
    path = bundle.folder / file
    remedy = "copy the bundle again as a whole, or re-export it"
    content = read_file(path, BundleError, remedy, limit=size * np.dtype(np.int64).itemsize + _MAX_HEADER_BYTES)
    try:
        ids = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy raise errors of several modules
        reason = " ".join(str(error).split())
        raise BundleError(f"{path} is not a numpy array: {reason or type(error).__name__}", remedy=remedy) from None
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.shape != (size,):
        raise BundleError(f"{path}", found="another array", expected=f"int64 [{size}]", remedy=remedy)
    vocab_size = bundle.manifest.spec.vocab_size
    if not (ids[0] >= 0 and ids[-1] < vocab_size and (np.diff(ids) > 0).all()):
        raise BundleError(
            f"{path}", found="ids out of order", expected=f"ascending in 0..{vocab_size - 1}", remedy=remedy
        )
    return ids
