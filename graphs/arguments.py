"""Checks of arguments that come from outside, where Python lets any type through.

A bool is no number here, although Python counts with it; numpy's scalars are numbers.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from shortstack.graphs.errors import RequestError


def is_whole(value: object, least: float = float("-inf"), most: float = float("inf")) -> bool:
    """Return whether a value is a whole number between two bounds."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_between(value: object, low: float, high: float) -> bool:
    """Return whether a value is a number between two bounds, which NaN is not."""
    return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) <= high


def shown(value: object) -> str:
    """Return how a message shows a value of any type: its repr, on one line and cut short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def expect(is_right: bool, name: str, value: object, expected: str, remedy: str | None = None) -> None:
    """Refuse a value that is not right.

    Raises:
        RequestError: It is not; says what was found and which forms are accepted.
    """
    if not is_right:
        raise RequestError(name, found=shown(value), expected=expected, remedy=remedy)


def expect_flags(owner: object, *names: str) -> None:
    """Refuse attributes of a value that are neither True nor False."""
    for name in names:
        value: Any = getattr(owner, name)
        expect(isinstance(value, bool), name, value, "True or False")
