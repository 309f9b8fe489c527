"""Parses exit criteria from text: ``margin >= 0.5 and patience >= 2``, with thresholds per exit and position.

::

    criterion  = either | ("top_prob" | "margin") ">=" "auto"
    either     = both { "or" both }
    both       = one { "and" one }
    one        = "(" either ")" | measure (">=" | "<=") threshold | "patience >= 2" | "votes >= 2"
               | "max_depth = 24..8" | "never" | "always"
    threshold  = number [ "[" exit ":" number { "," exit ":" number } "]" ] [ "~" decay ]

``top_prob >= 0.9 [4: 0.95, 8: 0.8] ~ 4`` asks for 0.95 after 4 layers, for 0.8 after 8 and for 0.9 at all other exits;
all three fall with CALM's decay of 4. The threshold of ``top_prob >= auto`` is learned while decoding
(:mod:`.adaptive`); it cannot be combined with other criteria.
"""

from __future__ import annotations

import re

from shortstack.graphs.arguments import expect
from shortstack.graphs.errors import RequestError
from shortstack.runtime.early_exit.adaptive import AUTO, Adaptive
from shortstack.runtime.early_exit.criteria import (
    MEASURES,
    Bound,
    Combined,
    Criterion,
    Fixed,
    MaxDepth,
    Patience,
    Threshold,
    Votes,
)

_TOKEN = re.compile(
    r"\s*(?:(?P<word>[a-z_]+)|(?P<number>-?(?:\d+\.(?!\.)\d*|\.\d+|\d+)(?:e[+-]?\d+)?)|(?P<sign>>=|<=|==|=>|=<|\.\.|[()\[\],:~=<>]))"
)
_COUNTS: dict[str, type[Patience] | type[Votes]] = {"patience": Patience, "votes": Votes}
_NAMES = (*MEASURES, *_COUNTS, "max_depth", "never", "always")
EXAMPLE = "top_prob >= 0.9"
_COMPARISONS = frozenset({">=", "<=", ">", "<", "==", "=>", "=<", "="})
_DEEPEST = 32  # nested parentheses


def parse_criterion(text: str) -> Criterion:
    """Return the criterion that an expression describes.

    Raises:
        RequestError: The text is not a valid expression, or a value in it is out of range.
    """
    expect(isinstance(text, str), "exit criterion", text, f"text such as {EXAMPLE!r}")
    parser = _Parser(text)
    criterion = parser.either()
    parser.expect_end()
    if parser.has_auto and not isinstance(criterion, Adaptive):
        raise RequestError(
            f"exit criterion {text!r}: a threshold of {AUTO} cannot be combined with other criteria",
            remedy=f"leave the others out, or give a number instead of {AUTO}",
        )
    return criterion


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self.has_auto = False
        self._depth = 0
        self._tokens: list[tuple[str, int]] = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._error(text[at:].split()[0], "a name, a number or a sign")
            self._tokens.append((match[0].strip(), match.end()))
            at = match.end()
        self._at = 0

    def either(self) -> Criterion:
        criteria = [self.both()]
        while self._take("or"):
            criteria.append(self.both())
        return criteria[0] if len(criteria) == 1 else Combined(tuple(criteria), "or")

    def both(self) -> Criterion:
        criteria = [self.one()]
        while self._take("and"):
            criteria.append(self.one())
        return criteria[0] if len(criteria) == 1 else Combined(tuple(criteria), "and")

    def one(self) -> Criterion:
        if self._take("("):
            self._depth += 1
            if self._depth > _DEEPEST:
                raise self._error("(", f"parentheses at most {_DEEPEST} deep")
            inner = self.either()
            self._need(")")
            self._depth -= 1
            return inner
        name = self._next(" or ".join(_NAMES))
        if name in ("never", "always"):
            return Fixed(always=name == "always")
        if name in _COUNTS:
            self._need(">=")
            return _COUNTS[name](self._integer())
        if name == "max_depth":
            self._need("=")
            first = self._integer()
            self._need("..")
            return MaxDepth(first, self._integer())
        for measure, (comparison, *_) in MEASURES.items():
            if name == measure:
                self._need(comparison)
                if self._take(AUTO):
                    self.has_auto = True
                    return Adaptive(measure)  # type: ignore[arg-type] # it refuses other measures
                return Bound(measure, self._threshold())
        raise self._error(name, " or ".join(_NAMES))

    def expect_end(self) -> None:
        if self._at < len(self._tokens):
            raise self._error(self._tokens[self._at][0], "and, or, or the end")

    def _threshold(self) -> Threshold:
        value = self._number()
        by_exit: dict[int, float] = {}
        if self._take("["):
            while True:
                layer = self._integer()
                if layer in by_exit:
                    raise self._error(str(layer), "an exit that has no threshold yet")
                self._need(":")
                by_exit[layer] = self._number()
                if not self._take(","):
                    break
            self._need("]")
        decay = self._number() if self._take("~") else None
        return Threshold(value, tuple(sorted(by_exit.items())), decay)

    def _number(self) -> float:
        token = self._next("a number")
        try:
            return float(token)
        except ValueError:
            raise self._error(token, "a number") from None

    def _integer(self) -> int:
        token = self._next("a whole number")
        if not token.isdecimal():
            raise self._error(token, "a whole number")
        return int(token)

    def _take(self, token: str) -> bool:
        if self._at < len(self._tokens) and self._tokens[self._at][0] == token:
            self._at += 1
            return True
        return False

    def _need(self, token: str) -> None:
        found = self._next(token)
        if found != token:
            is_comparison = found in _COMPARISONS and token in _COMPARISONS
            raise self._error(found, token, f"write {token} in place of {found}" if is_comparison else None)

    def _next(self, expected: str) -> str:
        if self._at == len(self._tokens):
            raise self._error("the end", expected)
        self._at += 1
        return self._tokens[self._at - 1][0]

    def _error(self, found: str, expected: str, remedy: str | None = None) -> RequestError:
        return RequestError(
            f"exit criterion {self._text!r} cannot be read",
            found=found,
            expected=expected,
            remedy=remedy or f"write a rule such as {EXAMPLE!r}",
        )
