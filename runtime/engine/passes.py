"""Passes over an iterated group: layers of which some use keys and values of layers above them.

Over several positions at once, such layers cannot each run once: there is no order for it. Instead they run over all
positions again and again, starting from keys and values of zero. After n passes the first n positions are final. With a
trained model all positions are nearly final after six passes or so (Layer-Condensed KV Cache,
https://arxiv.org/abs/2405.10637, section 3; its repository has the numbers: seven passes and two more). Position by
position, one pass is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from shortstack.graphs.arguments import expect, is_whole
from shortstack.runtime.engine.cache import KVCache

PrefillPasses = int | Literal["converged", "sequential"]
"""How often a prompt runs through an iterated group: a fixed number of times; ``converged``: until keys and values
change by no more than rounding; ``sequential``: once per position, position by position."""

# As a share of the largest key or value. In float32, rounding alone keeps changing a converged group by about 1e-6.
CONVERGED = 4e-6


def parse_passes(text: str) -> PrefillPasses:
    """Parse the value of a command-line option; see :func:`check_passes` for the errors."""
    return check_passes(int(text) if text.isdecimal() else text)  # type: ignore[arg-type]


def check_passes(passes: PrefillPasses) -> PrefillPasses:
    """Return ``passes`` if it is valid.

    Raises:
        RequestError: It is neither a number of passes nor the name of a way to choose one.
    """
    is_name = isinstance(passes, str) and passes in ("converged", "sequential")
    expected = "a number, 1 or more, or 'converged' or 'sequential'"
    expect(is_name or is_whole(passes, 1), "passes over a prompt", passes, expected)
    return passes


def run_passes(
    run: Callable[[], None],
    cache: KVCache,
    owners: Sequence[int],
    positions: tuple[int, int],
    passes: PrefillPasses,
) -> int:
    """Run a graph over several positions as often as its iterated groups need.

    Args:
        run: Runs one pass.
        cache: Holds the keys and values.
        owners: The producers in the groups.
        positions: The first position of the run, and one past its last.
        passes: How often to run. ``sequential`` counts as ``converged`` here, since it is the caller that runs
            single positions.

    Returns:
        The number of passes that ran.
    """
    start, end = positions
    for owner in owners:
        cache.clear(owner, start, end)
    most = passes if isinstance(passes, int) else end - start  # one pass per position is exact
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
