"""When a token may leave at an exit: one small class per criterion. Each reads only what exits compute anyway.

==============================  ======================================================================  ==============
expression                      a token leaves at an exit if                                            known from
==============================  ======================================================================  ==============
``top_prob >= 0.9``             the most likely token has at least this probability                     EE-LLM
``margin >= 0.5``               ... is ahead of the second by at least this probability                 CALM
``entropy <= 0.5``              the distribution's entropy, in nats, is at most this                    DeeBERT
``similarity >= 0.99``          the residual stream has at least this cosine with that at the exit      CALM
                                below
``gate >= 0.8``                 the exit's learned gate gives at least this; needs an exit with a gate  CALM
``patience >= 2``               this many exits in a row, up to this one, predict the same token        PABEE
``votes >= 3``                  this many of the exits so far, with this one, predict its token         voting
``mean_prob >= 0.8``            the exits so far give its token this probability on average; an exit    averaging
                                that predicts another token counts as 0
``max_depth = 24..8``           the exit's depth has reached a bound that falls linearly from the first SkipDecode
                                to the last token that may be generated
``never``, ``always``           never; always, and so at the lowest exit
==============================  ======================================================================  ==============

Sources: EE-LLM https://arxiv.org/abs/2312.04916, CALM https://arxiv.org/abs/2207.07061, DeeBERT
https://arxiv.org/abs/2004.12993, PABEE https://arxiv.org/abs/2006.04152, SkipDecode https://arxiv.org/abs/2307.02628.

Criteria combine with ``and`` and ``or``. Criteria that need a backward pass or dropout at inference (gradient norms,
layer-wise relevance propagation, Monte Carlo dropout) cannot be computed from inference graphs and are not supported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from shortstack.graphs.errors import RequestError
from shortstack.runtime.early_exit.reading import Reading

Need = Literal["gate", "similarity"]
Measure = Literal["top_prob", "margin", "entropy", "similarity", "gate", "mean_prob"]
MEASURES: dict[Measure, tuple[str, float, float]] = {  # the comparison, and the range of the measure
    "top_prob": (">=", 0.0, 1.0),
    "margin": (">=", 0.0, 1.0),
    "entropy": ("<=", 0.0, 14.0),  # at most the logarithm of the vocabulary's size: 14 is that of a million
    "similarity": (">=", -1.0, 1.0),
    "gate": (">=", 0.0, 1.0),
    "mean_prob": (">=", 0.0, 1.0),
}
_DECAYED_SHARE = 0.1  # the share of a threshold that its decay removes in the limit


class Criterion(Protocol):
    """A rule that decides whether a token leaves. Parsing its ``str`` gives an equal criterion."""

    @property
    def needs(self) -> frozenset[Need]:
        """The values that it needs beyond those that every exit computes."""
        ...

    @property
    def least_exits(self) -> int:
        """With fewer exits in use, no token can ever leave."""
        ...

    @property
    def exit_layers(self) -> frozenset[int]:
        """The exits that the criterion names."""
        ...

    def leaves(self, reading: Reading) -> bool:
        """Return whether the token leaves at the exit with this reading."""
        ...


@dataclass(frozen=True, slots=True)
class Threshold:
    """A bound on a measure.

    Attributes:
        value: The bound.
        by_exit: Other bounds for some exits, (exit layer, bound), ascending.
        decay: tau of CALM's decaying threshold, lambda_t = 0.9 lambda + 0.1 lambda exp(-tau t / N) for the t-th of at
            most N tokens, as in CALM's code (arXiv 2207.07061, section 4.2). It falls because early tokens matter more.
            None: constant.
    """

    value: float
    by_exit: tuple[tuple[int, float], ...] = ()
    decay: float | None = None

    def at(self, reading: Reading) -> float:
        """Return the bound for one exit and position."""
        value = dict(self.by_exit).get(reading.exit_layer, self.value)
        if self.decay is None:
            return value
        falling = math.exp(-self.decay * reading.position / max(reading.max_new_tokens, 1))
        return (1 - _DECAYED_SHARE) * value + _DECAYED_SHARE * value * falling

    def __str__(self) -> str:
        exits = ", ".join(f"{layer}: {value!r}" for layer, value in self.by_exit)
        return f"{self.value!r}" + (f" [{exits}]" if exits else "") + (f" ~ {self.decay!r}" if self.decay else "")


@dataclass(frozen=True, slots=True)
class Bound:
    """A measure compared with a threshold.

    Attributes:
        measure: The measure.
        threshold: The threshold.

    Raises:
        RequestError: The measure is unknown, the threshold is not a number or outside the measure's range, so that
            every token or none would leave, or the decay is not positive or not defined for this measure.
    """

    measure: Measure
    threshold: Threshold

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise RequestError("exit criterion", found=repr(self.measure), expected=", ".join(MEASURES))
        comparison, least, most = MEASURES[self.measure]
        for value in (self.threshold.value, *(value for _, value in self.threshold.by_exit)):
            if not least <= value <= most:
                raise RequestError(
                    f"threshold of {self.measure} is out of range",
                    found=f"{value:g}",
                    expected=f"{least:g}..{most:g}{' nats' if self.measure == 'entropy' else ''}",
                    remedy=_instead_of(value, comparison, most),
                )
        decay = self.threshold.decay
        if decay is not None and not (math.isfinite(decay) and decay > 0):
            raise RequestError(f"decay of {self.measure}", found=decay, expected="above 0")
        if decay is not None and comparison == "<=":
            raise RequestError(f"{self.measure} has no decay", remedy="leave out ~ and the number after it")

    @property
    def needs(self) -> frozenset[Need]:
        """See :class:`Criterion`."""
        return frozenset({self.measure}) if self.measure in ("gate", "similarity") else frozenset()

    @property
    def least_exits(self) -> int:
        """See :class:`Criterion`; a similarity compares with the exit below, which the lowest exit does not have."""
        return 2 if self.measure == "similarity" else 1

    @property
    def exit_layers(self) -> frozenset[int]:
        """See :class:`Criterion`."""
        return frozenset(layer for layer, _ in self.threshold.by_exit)

    def leaves(self, reading: Reading) -> bool:
        """See :class:`Criterion`."""
        value = measured(reading, self.measure)
        if value is None:
            return False
        bound = self.threshold.at(reading)
        return value <= bound if self.measure == "entropy" else value >= bound

    def __str__(self) -> str:
        return f"{self.measure} {MEASURES[self.measure][0]} {self.threshold}"


def _instead_of(value: float, comparison: str, most: float) -> str:
    """Return what a caller may have meant by a threshold outside the range of its measure."""
    if comparison == "<=":
        return "give a number of this range; `always` lets every token leave"
    is_percent = most < value <= 100
    instead = f"write {value / 100:g} for {value:g} percent" if is_percent else "give a number of this range"
    return f"{instead}; `never` lets no token leave"


def measured(reading: Reading, measure: Measure) -> float | None:
    """Return the value of a measure; None if the exit does not compute it."""
    if measure == "mean_prob":
        readings = (*reading.below, reading)
        return sum(r.top_prob for r in readings if r.token == reading.token) / len(readings)
    value: float | None = getattr(reading, measure)
    return value


@dataclass(frozen=True, slots=True)
class Patience:
    """A number of exits in a row predict the same token.

    Attributes:
        exits: How many, including this one.
    """

    exits: int
    needs = frozenset[Need]()
    exit_layers = frozenset[int]()

    def __post_init__(self) -> None:
        _check_count("patience", self.exits)

    @property
    def least_exits(self) -> int:
        """See :class:`Criterion`."""
        return self.exits

    def leaves(self, reading: Reading) -> bool:
        """See :class:`Criterion`."""
        newest = (*reading.below, reading)[-self.exits :]
        return len(newest) == self.exits and all(r.token == reading.token for r in newest)

    def __str__(self) -> str:
        return f"patience >= {self.exits}"


@dataclass(frozen=True, slots=True)
class Votes:
    """A number of the exits so far predict this exit's token.

    Attributes:
        votes: How many, including this one.
    """

    votes: int
    needs = frozenset[Need]()
    exit_layers = frozenset[int]()

    def __post_init__(self) -> None:
        _check_count("votes", self.votes)

    @property
    def least_exits(self) -> int:
        """See :class:`Criterion`."""
        return self.votes

    def leaves(self, reading: Reading) -> bool:
        """See :class:`Criterion`."""
        return 1 + sum(r.token == reading.token for r in reading.below) >= self.votes

    def __str__(self) -> str:
        return f"votes >= {self.votes}"


@dataclass(frozen=True, slots=True)
class MaxDepth:
    """The exit's depth has reached a bound that falls linearly over the tokens of a request.

    Attributes:
        first: The bound for the first token.
        last: The bound for the last one.
    """

    first: int
    last: int
    needs = frozenset[Need]()
    least_exits = 1
    exit_layers = frozenset[int]()

    def __post_init__(self) -> None:
        if not self.first >= self.last >= 1:
            raise RequestError(
                "max_depth", found=f"{self.first}..{self.last}", expected="two depths of 1 or more, falling"
            )

    def leaves(self, reading: Reading) -> bool:
        """See :class:`Criterion`."""
        share = reading.position / max(reading.max_new_tokens - 1, 1)
        return reading.exit_layer >= self.first + (self.last - self.first) * min(share, 1.0)

    def __str__(self) -> str:
        return f"max_depth = {self.first}..{self.last}"


@dataclass(frozen=True, slots=True)
class Fixed:
    """Every token leaves at the lowest exit, or none leaves at all.

    Attributes:
        always: Whether every token leaves.
    """

    always: bool
    needs = frozenset[Need]()
    least_exits = 1
    exit_layers = frozenset[int]()

    def leaves(self, reading: Reading) -> bool:
        """See :class:`Criterion`."""
        return self.always

    def __str__(self) -> str:
        return "always" if self.always else "never"


@dataclass(frozen=True, slots=True)
class Combined:
    """Several criteria joined by ``and`` or by ``or``.

    Attributes:
        criteria: The criteria.
        by: ``and`` if all must agree that a token leaves, ``or`` if one is enough.
    """

    criteria: tuple[Criterion, ...]
    by: Literal["and", "or"]

    @property
    def needs(self) -> frozenset[Need]:
        """See :class:`Criterion`."""
        return frozenset[Need]().union(*(c.needs for c in self.criteria))

    @property
    def least_exits(self) -> int:
        """See :class:`Criterion`."""
        counts = [c.least_exits for c in self.criteria]
        return max(counts) if self.by == "and" else min(counts)

    @property
    def exit_layers(self) -> frozenset[int]:
        """See :class:`Criterion`."""
        return frozenset[int]().union(*(c.exit_layers for c in self.criteria))

    def leaves(self, reading: Reading) -> bool:
        """See :class:`Criterion`."""
        found = (c.leaves(reading) for c in self.criteria)
        return all(found) if self.by == "and" else any(found)

    def __str__(self) -> str:
        def shown(c: Criterion) -> str:  # `and` binds more tightly
            is_looser = self.by == "and" and isinstance(c, Combined) and c.by == "or"
            return f"({c})" if is_looser else str(c)

        return f" {self.by} ".join(map(shown, self.criteria))


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise RequestError(f"exit criterion {name}", found=count, expected="1 or more")
