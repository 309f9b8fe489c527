"""Generations of plain and speculative decoding over scripted models, checked after every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from helpers.scripted import ScriptedDecoder, ScriptedModel, scripted_time
from helpers.scripted_texts import GREEDY
from shortstack.runtime.decode.choice import Choice, make_choice
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.drafters import ExitDrafter
from shortstack.runtime.decode.plain import plain
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.speculative import speculative
from shortstack.runtime.decode.step import Stats, Step


def self_speculative(
    decoder: ScriptedDecoder, sequence: TokenSequence, choice: Choice, stats: Stats, count: int, length: DraftLength
) -> Iterator[Step]:
    """Decode speculatively with drafts from the decoder's exit."""
    loop = speculative(decoder, sequence, choice, stats, count, length, ExitDrafter(decoder, choice))
    return solo(loop, decoder)


class ScriptedLength(DraftLength):
    """Drafts as many tokens as a list says, and repeats the list: any sequence that an adaptive rule could choose."""

    def __init__(self, wanted: Sequence[int], has_bonus: bool) -> None:
        super().__init__(DraftPolicy(has_bonus=has_bonus))
        self._wanted = wanted
        self._round = -1

    def choose(self, max_rows: int, tokens: Sequence[int] = ()) -> int:
        self._round += 1
        return min(self._wanted[self._round % len(self._wanted)], max_rows)


@dataclass(frozen=True)
class Wanted:
    """How to decode: plainly (None), by a policy, or with a scripted list of draft lengths."""

    length: DraftPolicy | tuple[int, ...] | None
    has_bonus: bool = False
    sampling: SamplingParams = GREEDY

    def start(self, decoder: ScriptedDecoder, sequence: TokenSequence, stats: Stats, count: int) -> Iterator[Step]:
        choice = make_choice(self.sampling)
        if self.length is None:
            return solo(plain(decoder, sequence, choice, stats, count), decoder)
        scripted = isinstance(self.length, tuple)
        length = ScriptedLength(self.length, self.has_bonus) if scripted else DraftLength(self.length)
        return self_speculative(decoder, sequence, choice, stats, count, length)


def fixed(k: int, *, bonus: bool = False, confidence: float = 0.0) -> Wanted:
    return Wanted(DraftPolicy(k, confidence, has_bonus=bonus))


PLAIN = Wanted(None)

policies = st.builds(
    DraftPolicy,
    max_draft_tokens=st.integers(1, 6),
    confidence=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    is_adaptive=st.booleans(),
    has_bonus=st.booleans(),
)
drafting = st.builds(Wanted, policies) | st.builds(
    Wanted, st.lists(st.integers(0, 15), min_size=1, max_size=6).map(tuple), st.booleans()
)


def assert_consistent(decoder: ScriptedDecoder, sequence: TokenSequence, stats: Stats) -> None:
    assert sequence.cached == len(sequence) - 1
    decoder.cache.assert_holds(decoder.model, sequence.tokens[: sequence.cached])
    assert stats.is_balanced


def run(
    model: ScriptedModel, prompt: Sequence[int], wanted: Wanted, count: int, *, window: int = 16, max_length: int = 64
) -> tuple[list[Step], Stats, ScriptedDecoder]:
    """Decode to the end, and check the cache and the counts after every step."""
    # Judging four rows costs more than judging two, so an adaptive length has a choice to make.
    decoder = ScriptedDecoder(model, window=window, max_length=max_length, verify_s=(0.7, 0.8, 1.3, 1.8))
    sequence = TokenSequence(prompt)
    stats = Stats(prompt=len(prompt))
    steps = []
    with scripted_time(decoder):
        for step in wanted.start(decoder, sequence, stats, count):
            steps.append(step)
            assert sequence.tokens == [*prompt, *(s.token for s in steps)]
            assert stats.emitted == len(steps)
            assert_consistent(decoder, sequence, stats)
    assert stats.is_balanced
    assert stats.discarded == 0
    return steps, stats, decoder
