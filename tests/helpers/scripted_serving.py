"""A scripted model of several slots with everything above the engine: streams, batches, loops, a small tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any, cast

from helpers.schedules import FaultOnPurposeError, Outcome, any_request, any_texts, outcome_of, spoilt
from helpers.scripted import ScriptedModel
from helpers.scripted_slots import SHAPES, VOCAB, Shape, SlotScript
from shortstack.runtime.batch.generations import Generations
from shortstack.runtime.batch.many import in_slots
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.loops import Loops
from shortstack.runtime.request import ExitEarly, Request
from shortstack.runtime.result import Result
from shortstack.runtime.text.stop import StopStrings
from shortstack.runtime.text.tokenizer import Tokenizer

EOS = 7


class Letters:
    """A tokenizer of one letter a token; it may fail at one of them."""

    special_ids = frozenset({EOS})
    has_text_tokens = False

    def __init__(self, fails_at: int | None = None) -> None:
        self._fails_at = fails_at

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == self._fails_at:
            raise FaultOnPurposeError("of a tokenizer")
        return b"abcdefgh"[token_id : token_id + 1]

    def special_text(self, token_id: int) -> str:
        return "</s>"


class ScriptedServing:
    """See the module's docstring; a :class:`helpers.schedules.Served`.

    Args:
        script: The bundle.
        slots: How many slots.
    """

    def __init__(self, script: SlotScript, slots: int) -> None:
        self.script = script
        self.engine = script.engine(slots)
        self.generations = Generations(self.engine, Loops(), lambda: None)
        self.bad_letters: dict[int, int] = {}  # by the identity of a request: where its tokenizer fails

    def start(self, request: Request) -> Stream:
        return self.generations.start(request, *self._prepared(request), self._stream)

    def batch(self, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]:
        return in_slots(self.generations, requests, self._prepared, self._stream, ahead=2)

    def check(self) -> None:
        self.script.assert_slots_hold(self.engine)
        busy = [job.slot.number for job in self.engine._active if job.slot is not None]
        free = self.engine._slots._free
        assert sorted([*busy, *free]) == list(range(self.engine.cache.slots)), f"busy {busy}, free {free}"

    def check_ended(self, stream: Stream) -> None:
        assert all(job.stats is not stream.stats for job in self.engine._active), "a stream that has ended still runs"

    def run_to_the_end(self) -> None:
        """Run what readers have left, and check that nothing remains."""
        while not self.engine.is_idle:
            self.engine.run_once()
        self.check()
        assert not self.engine.submitted

    def _prepared(self, request: Request) -> tuple[list[int], tuple[int, ...]]:
        ids = list(request.prompt)
        return ids, request.strategy.exits_in(self.script.manifest.plan)  # type: ignore[arg-type]

    def _stream(self, request: Request, steps: Iterator[Step], stats: Stats, limit: int) -> Stream:
        letters = Letters(self.bad_letters.get(id(request)))
        return Stream(
            steps,
            stats,
            cast(Tokenizer, letters),
            eos_ids=() if request.ignore_eos else (EOS,),
            stop=StopStrings(request.stop),
            stop_ids=request.stop_token_ids,
            limit=limit,
            limit_reason="length" if limit == request.max_new_tokens else "context",
        )


class Case:
    """A random scripted model, requests for it, and what each request gives alone.

    Args:
        seed: Of everything.
        shape: Layers and exits; None chooses one.
        requests: How many requests.
    """

    def __init__(self, seed: int, shape: Shape | None = None, requests: int = 6) -> None:
        self.rng = rng = random.Random(seed)
        self.shape = shape or SHAPES[rng.choice(list(SHAPES))]
        model = ScriptedModel(rng.randrange(2**20), VOCAB, agreement=rng.choice((0.0, 0.3, 0.7, 0.9, 1.0)))
        self.context = rng.choice((12, 24, 48))
        self.script = SlotScript(self.shape, model, self.context)
        self.script.run_s, self.script.row_s = rng.choice(((1.0, 0.1), (0.1, 1.0), (1.0, 0.0)))
        self.sizes: dict[str, Any] = {
            "chunk": rng.choice((2, 5, 16)),
            "prompt_chunk": rng.choice((3, 8, 256)),
            "worth_copying": rng.choice((1, 4, 16)),
        }
        texts = any_texts(rng, VOCAB, self.context)
        self.requests = [any_request(rng, self.shape.exits, VOCAB, self.context, texts) for _ in range(requests)]
        for index in range(requests):
            if rng.random() < 0.1:
                self.requests[index] = spoilt(rng, self.requests[index])
        self.bad_letters = {id(request): rng.randrange(VOCAB) for request in self.requests if rng.random() < 0.05}
        self._alone: dict[int, Outcome] = {}

    def serving(self, slots: int) -> ScriptedServing:
        """Return a model of so many slots."""
        made = ScriptedServing(self.script, slots)
        made.bad_letters = self.bad_letters
        return made

    def wanted(self, request: Request) -> Outcome:
        """Return what a request gives in a model that serves nothing else."""
        if id(request) not in self._alone:
            found = self._alone[id(request)] = outcome_of(self.serving(1).start(request))
            if follows_the_model(request) and found.end != "FaultOnPurposeError":
                most = min(request.max_new_tokens, self.context - len(request.prompt))
                text = self.script.model.continuation(list(request.prompt), most, self.context)  # type: ignore[arg-type]
                if EOS in text and not request.ignore_eos:
                    text = text[: text.index(EOS) + 1]
                assert list(found.tokens) == text, f"{request}: {found}, the model says {text}"
        return self._alone[id(request)]


def follows_the_model(request: Request) -> bool:
    """Whether a request's tokens are the most likely ones of the whole model."""
    strategy = request.strategy
    is_judged = not isinstance(strategy, ExitEarly) or strategy.policy.verify == "exact"
    return is_judged and request.sampling == SamplingParams()
