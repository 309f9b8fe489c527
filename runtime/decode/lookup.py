"""Drafts that are looked up: what followed the end of the text where it occurred before.

The place is searched in the text itself, prompt and output, and in other texts if there are any. Such drafts cost
microseconds and no run of the model. They help where a text repeats itself or its prompt: summaries, answers from
documents, edited code, forms. (Prompt lookup decoding; also LLMA, arXiv 2304.04487.)

The whole model judges them, whatever the bundle has: no exit is needed. They are not drawn at random, so sampling
treats each as certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shortstack.graphs.plan import SplitPlan
from shortstack.runtime.decode.choice import Choice, Proposal
from shortstack.runtime.decode.drafters import Draft
from shortstack.runtime.decode.suffix_index import Match, SuffixIndex
from shortstack.runtime.decode.text_index import TextIndex
from shortstack.runtime.engine.decoder import State

LOOKUP_DRAFTS = 10
"""The tokens that are drafted where nobody says how many and their number is fixed."""
MOST_LOOKED_UP = 15
"""The most tokens that are drafted where nobody says how many and their number follows measurements."""


@dataclass(frozen=True, slots=True)
class FromLookup:
    """Drafts are looked up in the text so far.

    Attributes:
        texts: Other texts in which they are looked up too; the longer match wins.
    """

    texts: TextIndex | None = None

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        """See :meth:`DraftSource.exits_in`: it uses no exit."""
        return ()

    def drafter(self, stack: State, choice: Choice) -> LookupDrafter:
        """See :meth:`DraftSource.drafter`."""
        return LookupDrafter(self.texts)


class Found(NamedTuple):
    """Where drafts come from in a round.

    Attributes:
        length: Tokens of the text's end that occurred there.
        source: The index that holds it.
        match: Where.
    """

    length: int
    source: SuffixIndex | TextIndex
    match: Match

    @property
    def name(self) -> str:
        """What such drafts are counted as."""
        return "texts" if isinstance(self.source, TextIndex) else "lookup"

    def tokens(self, count: int) -> list[int]:
        """Return the first ``count`` drafts, or as many as there are."""
        return self.source.following(self.match, count)

    def proposals(self, count: int) -> list[Proposal]:
        """Return them as proposals."""
        return [Proposal(token, 1.0, 0, source=self.name) for token in self.tokens(count)]


class LookupDrafter:
    """Drafts by lookup.

    Args:
        texts: See :class:`FromLookup`.
    """

    def __init__(self, texts: TextIndex | None = None) -> None:
        self._texts = texts
        self._own = SuffixIndex()

    def find(self, tokens: Sequence[int]) -> Found | None:
        """Return where the end of a text occurred before; None if it did not."""
        self._own.extend(tokens)
        own = self._own.longest()
        other = None if self._texts is None else self._texts.longest(tokens)
        if other is not None and (own is None or other.length > own.length):
            assert self._texts is not None
            return Found(other.length, self._texts, other)
        return None if own is None else Found(own.length, self._own, own)

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Draft:
        """See :meth:`Drafter.draft`."""
        found = self.find(tokens)
        return Draft([] if found is None else found.proposals(most))

    def start(self, tokens: Sequence[int], cached: int) -> int:
        """See :meth:`Drafter.start`."""
        self._own = SuffixIndex()
        self._own.extend(tokens)
        return cached

    def end(self) -> None:
        """See :meth:`Drafter.end`."""

    def observe(self, emitted: int, rows: int) -> None:
        """See :meth:`Drafter.observe`: the next search sees the text itself."""
