"""Passes over an iterated group: layers of which some use keys and values of layers above them.

Over several positions at once, such layers cannot each run once: there is no order for it. Instead they run over all
positions again and again, starting from keys and values of zero. After n passes the first n positions are final. With a
trained model all positions are nearly final after six passes or so (Layer-Condensed KV Cache,
https://arxiv.org/abs/2405.10637, section 3; its repository has the numbers: seven passes and two more). Position by
position, one pass is exact.

:func:`run_passes` runs until nothing changes. :func:`run_as_trained` runs a number of passes and gives what training
with that number computed, whether it had converged or not: LCKV's 7 + 2 are 9. There a prompt runs as a whole, from
zero at every position, and each group finishes its passes before the next one begins. Two things are in the way:

* The first position of a text has run alone already, since the kernel asks for it. Training gives layers that look up
  nothing of it in their first pass. So it is hidden during that pass. Where a group has one producer that layers below
  use, as in every placement of :mod:`shortstack.graphs.kv_map`, this is exact.
* A graph holds all groups of its segment and runs them together. So while a group runs its passes, those below it are
  put back to what they were before their last pass, and repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shortstack.graphs.arguments import expect, is_whole
from shortstack.runtime.engine.cache import KVCache

PrefillPasses = int | Literal["converged", "sequential"]
"""How often a prompt runs through an iterated group: a number of times, as in training; ``converged``: until keys and
values change by no more than rounding; ``sequential``: once per position, position by position."""

# As a share of the largest key or value. In float32, rounding alone keeps changing a converged group by about 1e-6.
CONVERGED = 4e-6


@dataclass(frozen=True, slots=True)
class GroupOwners:
    """The cache owners of one iterated group.

    Attributes:
        all: All of them, ascending.
        targets: Those whose keys and values a layer below uses.
    """

    all: tuple[int, ...]
    targets: tuple[int, ...]


def parse_passes(text: str) -> PrefillPasses:
    """Parse the value of a command-line option; see :func:`check_passes` for the errors."""
    return check_passes(int(text) if text.isdecimal() else text)  # type: ignore[arg-type]


def check_passes(passes: PrefillPasses) -> PrefillPasses:
    """Return ``passes`` if it is valid.

    Raises:
        RequestError: It is neither a number of passes nor the name of a way to choose one. One pass is not a choice:
            layers that look up would use nothing at all.
    """
    is_name = isinstance(passes, str) and passes in ("converged", "sequential")
    expected = "a number, 2 or more, or 'converged' or 'sequential'"
    expect(is_name or is_whole(passes, 2), "passes over a prompt", passes, expected)
    return passes if isinstance(passes, str) else int(passes)


def run_passes(
    run: Callable[[], None], cache: KVCache, groups: Sequence[GroupOwners], positions: tuple[int, int]
) -> int:
    """Run a graph over several positions until the keys and values of its iterated groups no longer change.

    Args:
        run: Runs one pass.
        cache: Holds the keys and values.
        groups: The groups.
        positions: The first position of the run, and one past its last.

    Returns:
        The number of passes that ran; one per position is exact.
    """
    start, end = positions
    owners = [owner for group in groups for owner in group.all]
    for owner in owners:
        cache.clear(owner, start, end)
    before = [part for owner in owners for part in cache.read(owner, start, end)]
    for count in range(1, end - start + 1):
        run()
        after = [part for owner in owners for part in cache.read(owner, start, end)]
        if all(_is_close(old, new) for old, new in zip(before, after, strict=True)):
            return count
        before = after
    return end - start


def run_as_trained(
    run: Callable[[], None],
    cache: KVCache,
    groups: Sequence[GroupOwners],
    positions: tuple[int, int],
    passes: int,
    *,
    hides_first: bool,
) -> None:
    """Run a graph over a whole prompt as often as its iterated groups ran in training; see the module's docstring.

    Args:
        run: Runs one pass.
        cache: Holds the keys and values.
        groups: The groups, bottom to top.
        positions: The first position of the run, and one past its last.
        passes: How often each group runs, 2 or more.
        hides_first: Whether the position before the run is the text's first, which has run alone.
    """
    start, end = positions
    finished: dict[int, list[np.ndarray]] = {}  # by owner of the groups below: what its last pass began with
    for group in groups:
        first = {owner: cache.read(owner, 0, start) for owner in group.targets} if hides_first else {}
        for number in range(passes):
            for owner, parts in finished.items():
                cache.write(owner, start, parts)
            if number == 0:
                for owner in group.all:
                    cache.clear(owner, start, end)
                for owner in first:
                    cache.clear(owner, 0, start)
            if number == passes - 1:
                last = {owner: cache.read(owner, start, end) for owner in group.all}
            run()
            if number == 0:
                for owner, parts in first.items():
                    cache.write(owner, 0, parts)
        finished |= last


def _is_close(old: np.ndarray, new: np.ndarray) -> bool:
    if new.dtype == np.int8:
        return bool((old == new).all())
    difference = np.abs(new.astype(np.float32) - old.astype(np.float32)).max()
    return bool(difference <= CONVERGED * np.abs(new).max())
