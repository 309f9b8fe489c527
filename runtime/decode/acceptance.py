"""How often drafts are accepted: of an exit or drafter, and of lookup by the length of its match.

Each estimate begins as a guess that weighs as much as two judged tokens, and forgets slowly. A draft of lookup at
place j of a round counts as one of a match that is j tokens longer: it is one, once those before it are accepted.
"""

from __future__ import annotations

_GUESS_WEIGHT = 2
_LEAST_WEIGHT = 0.1  # of one judged token: a memory of about ten
_LEAST_LOOKUP_WEIGHT = 0.05  # every draft that could have been made is judged, so there are more of them
_GUESSES = (0.25, 0.4, 0.55, 0.65, 0.75, 0.85, 0.9)  # by the class of the match's length
_CLASS = (0, 0, 0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 5, 5, 6)  # of lengths 0..16: 2, 3, 4, 5-6, 7-9, 10-15, 16 and more


class Rate:
    """The estimated probability that one judged draft is accepted.

    Args:
        guess: What it is before the first one.
        least_weight: The weight of a new one among many.

    Attributes:
        value: The estimate.
        judged: How many were judged.
    """

    def __init__(self, guess: float, least_weight: float = _LEAST_WEIGHT) -> None:
        self._least_weight = least_weight
        self.value, self.judged = guess, 0

    def observe(self, *, accepted: bool) -> None:
        """Learn from one judged draft."""
        self.judged += 1
        weight = max(self._least_weight, 1 / (_GUESS_WEIGHT + self.judged))
        self.value += weight * (accepted - self.value)


class LookupRates:
    """The rates of one index that is looked up in, by the length of the match."""

    def __init__(self) -> None:
        self._rates = [Rate(guess, _LEAST_LOOKUP_WEIGHT) for guess in _GUESSES]

    def at(self, length: int) -> Rate:
        """Return the rate for a match of so many tokens."""
        return self._rates[_CLASS[min(length, len(_CLASS) - 1)]]

    def values(self, length: int, count: int) -> list[float]:
        """Return the estimates for the first ``count`` drafts of a match."""
        return [self.at(length + place).value for place in range(count)]
