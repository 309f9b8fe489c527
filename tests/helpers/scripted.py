"""A decoder without a neural net, for tests of the decoding loops: scripted predictions over a cache that checks reads.

::

    model   = ScriptedModel(seed=7, vocab_size=8, agreement=0.6)     what the final head and the exit predict
    decoder = ScriptedDecoder(model, window=8, max_length=32)        an engine.decoder.Decoder that checks what is read
    with scripted_time(decoder): ...                                 the loops measure decoder.clock, not the machine

A prediction is a function of the exact text before it, so a loop that looks at the wrong text gets other tokens. The
cache records from which text the row of each position was computed, once for the layers below the exit and once for
those above. A run reads all rows before its own. It fails with "hole" if one is missing, and with "stale" if one
belongs to another text. It never reads later rows, like attention with a length. A draft with a head also reads the
state of the position before its own: the whole model's for row 0, the exit's guess for the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt

from shortstack.runtime.decode import stream
from shortstack.runtime.engine.head import Head

_SPREAD = 2.5  # logits lie in -2.5..2.5: the best of eight tokens has about 0.4 on average


class Prefix:
    """A text, as a node in the tree of all texts of one model; equal texts are the same object."""

    __slots__ = ("digest", "exit_logits", "final_logits", "following", "length", "parent", "token")

    def __init__(self, parent: Prefix | None, token: int, digest: bytes) -> None:
        self.parent = parent
        self.token = token
        self.digest = digest
        self.length: int = 0 if parent is None else parent.length + 1
        self.following: dict[int, Prefix] = {}
        self.final_logits: npt.NDArray[np.float32] | None = None
        self.exit_logits: npt.NDArray[np.float32] | None = None

    def then(self, token: int) -> Prefix:
        if token not in self.following:
            digest = hashlib.blake2b(self.digest + token.to_bytes(4, "little"), digest_size=16).digest()
            self.following[token] = Prefix(self, token, digest)
        return self.following[token]

    def tokens(self) -> list[int]:
        return [] if self.parent is None else [*self.parent.tokens(), self.token]


class ScriptedModel:
    """The predictions of two heads after every text.

    Args:
        seed: Each seed gives a different model.
        vocab_size: Number of tokens.
        agreement: How often the exit's most likely token is the final head's: a probability, or a pattern, which is
            indexed by the number of tokens before the predicted one and repeats.
        draft_ids: Token ids of a trimmed exit head, ascending. The exit cannot agree if the final head's token is not
            among them.
        sure_at: Lengths of texts after which the final head is certain.
    """

    def __init__(
        self,
        seed: int = 0,
        vocab_size: int = 8,
        agreement: float | Sequence[bool] = 0.5,
        draft_ids: Iterable[int] | None = None,
        sure_at: Iterable[int] = (),
    ) -> None:
        self.vocab_size = vocab_size
        self.draft_ids = None if draft_ids is None else np.array(sorted(draft_ids), np.int64)
        self.root = Prefix(None, -1, seed.to_bytes(8, "little"))
        self._agreement = agreement
        self._sure_at = frozenset(sure_at)

    def __repr__(self) -> str:
        ids = None if self.draft_ids is None else self.draft_ids.tolist()
        seed = int.from_bytes(self.root.digest, "little")
        return f"ScriptedModel({seed}, {self.vocab_size}, {self._agreement}, {ids}, {sorted(self._sure_at)})"

    def prefix(self, tokens: Iterable[int]) -> Prefix:
        node = self.root
        for token in tokens:
            node = node.then(token)
        return node

    def final(self, text: Prefix) -> npt.NDArray[np.float32]:
        """Logits [vocab] of the whole model."""
        if text.final_logits is None:
            logits = self._random(text, b"final", self.vocab_size)
            if text.length in self._sure_at:
                logits[int(logits.argmax())] = 100.0
            text.final_logits = logits
        return text.final_logits

    def exit(self, text: Prefix) -> npt.NDArray[np.float32]:
        """Logits of the exit, [vocab] or [len(draft_ids)]."""
        if text.exit_logits is None:
            ids = np.arange(self.vocab_size) if self.draft_ids is None else self.draft_ids
            logits = self._random(text, b"exit", len(ids))
            wanted = np.flatnonzero(ids == self.final(text).argmax())  # one row, or none if a trimmed head lacks it
            if self._agrees(text):
                logits[wanted] = np.float32(logits.max() + 1.0)
            elif len(ids) > 1:
                logits[wanted] = np.float32(logits.min() - 1.0)
            text.exit_logits = logits
        return text.exit_logits

    def next_token(self, tokens: Iterable[int]) -> int:
        """The whole model's most likely token after a text."""
        return int(self.final(self.prefix(tokens)).argmax())

    def continuation(self, tokens: Sequence[int], count: int, max_length: int) -> list[int]:
        """The tokens that greedy decoding must emit after a prompt; every loop is compared with them."""
        text = list(tokens)
        while len(text) < len(tokens) + count and (len(text) < max_length or len(text) == len(tokens)):
            text.append(self.next_token(text))
        return text[len(tokens) :]

    def _agrees(self, text: Prefix) -> bool:
        if isinstance(self._agreement, Sequence):
            return self._agreement[text.length % len(self._agreement)]
        draw = int.from_bytes(hashlib.blake2b(text.digest + b"agrees", digest_size=4).digest(), "little")
        return draw < self._agreement * 2**32

    def _random(self, text: Prefix, head: bytes, size: int) -> npt.NDArray[np.float32]:
        words = np.frombuffer(hashlib.shake_256(text.digest + head).digest(2 * size), np.uint16)
        return ((words / 2**15 - 1.0) * _SPREAD).astype(np.float32)


class Call(NamedTuple):
    """One run: its kind, its first position and its number of rows."""

    kind: Literal["prefill", "draft", "verify"]
    start: int
    rows: int
    with_head: bool = True


class State(NamedTuple):
    """The state that a row holds: that of a text's last token, from the whole model or guessed by the exit."""

    text: Prefix
    is_guess: bool


class ScriptedError(Exception):
    """A run that was scripted to fail."""


class ScriptedCache:
    """For each layer group and position, the text that the row was computed from, up to and including the position."""

    def __init__(self) -> None:
        self.lower: dict[int, Prefix] = {}
        self.upper: dict[int, Prefix] = {}

    def assert_holds(self, model: ScriptedModel, tokens: Sequence[int]) -> None:
        """Assert that both groups hold exactly this text from position 0 on; later positions do not matter."""
        text = model.root
        for position, token in enumerate(tokens):
            text = text.then(token)
            for name, group in (("lower", self.lower), ("upper", self.upper)):
                assert position in group, f"hole in the {name} layers at position {position}"
                assert group[position] is text, f"stale row in the {name} layers at position {position}"


class ScriptedClock:
    """A clock that advances only during runs."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def perf_counter(self) -> float:
        return self.now_s


class ScriptedDecoder:
    """A :class:`shortstack.runtime.engine.decoder.Decoder`.

    Args:
        model: Its predictions.
        window: The most rows that one round may have.
        max_length: Positions of the longest context.
        cache: A cache to share with another decoder of the same model; None makes a new one.
        is_cut: False for a stack without an exit: drafting runs nothing, and verifying runs every layer.
        draft_s: Seconds of one row through the lower layers.
        verify_s: Seconds of one, two, ... rows through the upper layers; the last one for more rows.
        head_s: Seconds of the exit's head.
        sees_state: Whether the exit reads the state of the row before.
        rows_s: Seconds of one, two, ... rows at once through the lower layers; None: ``draft_s``, however many.

    Attributes:
        calls: All runs, in order.
        kept_rows: The rows passed to :meth:`keep_state`, in order.
        fails_at: Index of the run that writes garbage to its rows and raises :class:`ScriptedError`; None for none.
        delays_s: Extra seconds of some runs, by the index of the run.
        clock: Advances with each run.
    """

    def __init__(
        self,
        model: ScriptedModel,
        *,
        window: int = 16,
        max_length: int = 64,
        cache: ScriptedCache | None = None,
        is_cut: bool = True,
        draft_s: float = 0.25,
        verify_s: Sequence[float] = (0.75,),
        head_s: float = 0.0,
        rows_s: Sequence[float] | None = None,
        sees_state: bool = True,
    ) -> None:
        self.model = model
        self.window = window
        self.max_length = max_length
        self.num_layers = 2
        self.exit_layer = int(is_cut)
        self.has_drafter = False
        self.sees_state = sees_state
        self.cache = cache or ScriptedCache()
        self.clock = ScriptedClock()
        self.calls: list[Call] = []
        self.kept_rows: list[int] = []
        self.fails_at: int | None = None
        self.delays_s: dict[int, float] = {}
        exit_vocab = model.vocab_size if model.draft_ids is None else len(model.draft_ids)
        self.final = Head(window, model.vocab_size, np.dtype(np.float32), None)
        self.exit = Head(window, exit_vocab, np.dtype(np.float32), model.draft_ids)
        self._ids = np.zeros(window + 1, np.int64)
        self.exit.token = self._ids[1:]
        self._hidden: list[Prefix | None] = [None] * window
        self._states: list[State | None] = [None] * (window + 1)
        self._is_cut = is_cut
        self._draft_s = draft_s
        self._verify_s = verify_s
        self._head_s = head_s
        self._rows_s = rows_s or (draft_s,)

    def prefill(self, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        assert len(tokens), "nothing to prefill"
        self._begin(Call("prefill", past, len(tokens)), self.cache.lower, self.cache.upper)
        self.clock.now_s += 1.0
        text = self._read(self.cache.lower, past)
        assert self._read(self.cache.upper, past) is text, "the layer groups hold different texts"
        for position, token in enumerate(tokens, past):
            text = text.then(self._checked(token))
            self.cache.lower[position] = self.cache.upper[position] = text
        self._poison_final()
        self._states = [State(text, is_guess=False), *[None] * self.window]
        say(self.final, 0, self.model.final(text), with_logits)

    def put(self, row: int, token: int) -> None:
        self._ids[row] = self._checked(token)

    def draft(self, row: int, past: int, with_head: bool, with_logits: bool) -> None:
        assert 0 <= row < self.window, f"row {row} of a window of {self.window}"
        position = past + row
        self._begin(Call("draft", position, 1, with_head), self.cache.lower if self._is_cut else {})
        if not self._is_cut:
            assert not with_head, "a stack without an exit cannot propose"
            return
        self.clock.now_s += self._draft_s + self._head_s * with_head
        before = self._read(self.cache.lower, position)
        text = before.then(self._checked(int(self._ids[row])))
        self.cache.lower[position] = self._hidden[row] = text
        if with_head:
            assert not self.sees_state or self._states[row] == State(before, is_guess=row > 0), (
                f"row {row} drafts from {self._states[row]}"
            )
            self._states[row + 1] = State(text, is_guess=True)
            say(self.exit, row, self.model.exit(text), with_logits)

    def draft_rows(self, start: int, end: int, past: int) -> None:
        assert 0 <= start < end <= self.window, f"rows {start}..{end} of a window of {self.window}"
        self._begin(Call("draft", past + start, end - start, False), self.cache.lower if self._is_cut else {})
        if not self._is_cut:
            return
        self.clock.now_s += self._rows_s[min(end - start, len(self._rows_s)) - 1]
        text = self._read(self.cache.lower, past + start)
        for row in range(start, end):
            text = text.then(self._checked(int(self._ids[row])))
            self.cache.lower[past + row] = self._hidden[row] = text

    def verify(self, rows: int, past: int, with_logits: bool) -> None:
        assert 1 <= rows <= self.window, f"{rows} rows of a window of {self.window}"
        groups = [self.cache.upper] if self._is_cut else [self.cache.lower, self.cache.upper]
        self._begin(Call("verify", past, rows), *groups)
        self.clock.now_s += self._verify_s[min(rows, len(self._verify_s)) - 1]
        text = self._read(self.cache.upper, past)
        if not self._is_cut:
            assert self._read(self.cache.lower, past) is text, "the layer groups hold different texts"
        self._poison_final()
        self._states = [None] * (self.window + 1)
        for row in range(rows):
            if self._is_cut:
                hidden = self._hidden[row]
                assert hidden is not None, f"hole: row {row} was never drafted"
                assert hidden.parent is text, f"stale hidden state in row {row}"
                text = hidden
            else:
                text = text.then(self._checked(int(self._ids[row])))
                self.cache.lower[past + row] = text
            self.cache.upper[past + row] = text
            self._states[row] = State(text, is_guess=False)
            say(self.final, row, self.model.final(text), with_logits)

    def keep_state(self, row: int) -> None:
        assert self.calls[-1].kind == "verify", f"a state of {self.calls[-1]}"
        self.kept_rows.append(row)
        self._states = [self._states[row], *[None] * self.window]

    def _begin(self, call: Call, *written: dict[int, Prefix]) -> None:
        self.clock.now_s += self.delays_s.get(len(self.calls), 0.0)
        self.calls.append(call)
        end = call.start + call.rows
        assert call.start >= 0, f"a run from position {call.start}"
        assert end <= self.max_length, f"{end} positions in a context of {self.max_length}"
        if self.fails_at == len(self.calls) - 1:
            garbage = Prefix(None, -1, b"garbage")
            for group in written:
                group.update(dict.fromkeys(range(call.start, end), garbage))
            raise ScriptedError(call)

    def _read(self, group: dict[int, Prefix], past: int) -> Prefix:
        """Return the text that positions 0..past-1 hold, after checking that it is a single text without holes."""
        name = "lower" if group is self.cache.lower else "upper"
        text = self.model.root
        for position in range(past):
            assert position in group, f"hole in the {name} layers at position {position} of {past}"
            assert group[position].parent is text, f"stale row in the {name} layers at position {position} of {past}"
            text = group[position]
        return text

    def _checked(self, token: int) -> int:
        assert 0 <= token < self.model.vocab_size, f"token {token} of {self.model.vocab_size}"
        return token

    def _poison_final(self) -> None:
        """Spoil all rows of the final head, so that a loop that reads a row which the next run does not write fails."""
        self.final.token[:] = -1
        if len(self.final.logits):
            self.final.logits[:] = np.nan


def say(head: Head, row: int, logits: npt.NDArray[np.float32], with_logits: bool) -> None:
    """Write a head's outputs to a row."""
    head.outputs(row, row + 1, with_logits)  # allocates the logits when they are first asked for
    best, head.top_prob[row], head.margin[row], head.entropy[row] = summary(logits.tobytes())
    head.token[row] = best if head.ids is None else head.ids[best]
    if len(head.logits):
        head.logits[row] = logits if with_logits else np.nan


@lru_cache(maxsize=4096)
def summary(logits_bytes: bytes) -> tuple[int, float, float, float]:
    """Return the row of the most likely token, its probability, its margin over the next one, the entropy in nats."""
    logits = np.frombuffer(logits_bytes, np.float32).astype(np.float64)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    ranked = sorted(probs, reverse=True)
    margin = ranked[0] - ranked[1] if len(ranked) > 1 else 1.0
    return int(logits.argmax()), float(ranked[0]), float(margin), float(-(probs * np.log(probs + 1e-30)).sum())


@contextmanager
def scripted_time(decoder: ScriptedDecoder) -> Iterator[ScriptedClock]:
    """Make streams read the decoder's clock, as the loops do, so that the script sets their seconds."""
    with mock.patch.object(stream, "time", decoder.clock):
        yield decoder.clock
