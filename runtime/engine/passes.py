"""Passes over an iterated group: layers of which some use keys and values of layers above them.

Over several positions at once such layers have no order in which each could run once. They run over all positions
again and again instead, starting from keys and values of zero: after n passes the first n positions are final, and
with a trained model all of them nearly are after six or so (Layer-Condensed KV Cache, https://arxiv.org/abs/2405.10637,
section 3; the numbers are in its repository: seven passes and two more). Position by position one pass is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from shortstack.graphs.errors import RequestError
from shortstack.runtime.engine.cache import KVCache

PrefillPasses = int | Literal["converged", "sequential"]
"""How often a prompt runs through an iterated group: so many times; until keys and values change no more than rounding
does; or position by position, once each."""

# Of the largest key or value: rounding in float32 keeps the last changes of a group that has converged at about 1e-6.
CONVERGED = 4e-6


def parse_passes(text: str) -> PrefillPasses:
    """Return what an option says; errors as in :func:`check_passes`."""
    return check_passes(int(text) if text.isdecimal() else text)  # type: ignore[arg-type]


def check_passes(passes: PrefillPasses) -> PrefillPasses:
    """Return it.

    Raises:
        RequestError: It is no number of passes and no way to choose one.
    """
    if passes in ("converged", "sequential") or (type(passes) is int and passes >= 1):
        return passes
    raise RequestError(
        "passes over a prompt", found=repr(passes), expected="1 or more, or 'converged', or 'sequential'"
    )


def run_passes(
    run: Callable[[], None],
    cache: KVCache,
    owners: Sequence[int],
    positions: tuple[int, int],
    passes: PrefillPasses,
) -> int:
    """Run a graph over several positions as often as its iterated groups need.

    Args:
        run: One pass.
        cache: Where keys and values are.
        owners: The producers in the groups.
        positions: First position of the run, and one past its last.
        passes: How often. ``sequential`` counts as ``converged`` here: the caller runs single positions.

    Returns:
        How often it ran.
    """
    start, end = positions
    for owner in owners:
        cache.clear(owner, start, end)
    most = passes if isinstance(passes, int) else end - start  # as many as positions are exact
    before = [part for owner in owners for part in cache.read(owner, start, end)]
    for count in range(1, most + 1):
        run()
        if isinstance(passes, int):
            continue
        after = [part for owner in owners for part in cache.read(owner, start, end)]
        if all(_is_close(old, new) for old, new in zip(before, after, strict=True)):
            return count
        before = after
    return most


def _is_close(old: np.ndarray, new: np.ndarray) -> bool:
    if new.dtype == np.int8:
        return bool((old == new).all())
    difference = np.abs(new.astype(np.float32) - old.astype(np.float32)).max()
    return bool(difference <= CONVERGED * np.abs(new).max())
