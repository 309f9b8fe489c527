"""``python -m shortstack.samples.bench.soak BUNDLE``: thousands of random requests, some of which leave on the way.

Requests of all strategies join as streams and in batches. They are read at different speeds, and some are cancelled,
closed, dropped, or refused since they do not fit. Each request must come to an end, and memory must stay flat once
everything has been used: buffers, costs, slots of each set of exits. What is flat is the median of the last tenth of
the measurements, next to that of the first tenth after the warm-up; a single measurement varies with what the system
has taken back.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from shortstack.graphs.errors import RequestError, ShortstackError
from shortstack.progress import progress_stages
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy, Verify
from shortstack.runtime.model import Model, load
from shortstack.runtime.request import ExitEarly, Plain, Request, Speculate, Strategy
from shortstack.runtime.result import Result
from shortstack.samples.bench.memory import memory_now
from shortstack.samples.command import run_command

WARM_UP = 500  # requests until memory must be flat
FLAT_BYTES = 4_000_000  # of growth, and
FLAT_SHARE = 0.02  # of the memory after the warm-up: what a median may vary by


@dataclass(slots=True)
class Soak:
    """What a soak found.

    Attributes:
        requests: How many requests were made.
        ended: How many requests came to each end: a reason, or ``refused``, ``closed``, ``cancelled`` or ``dropped``.
        tokens: Tokens that were read.
        elapsed_s: Seconds.
        memory: Requests that had been made, and resident bytes then.
        growth_bytes: How much more memory the end took than the time after the warm-up.
        is_flat: Whether that is as good as nothing.
        lost: Requests without an end, and one more if a slot did not come back.
    """

    requests: int
    ended: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    elapsed_s: float = 0.0
    memory: list[tuple[int, int]] = field(default_factory=list)
    growth_bytes: int = 0
    is_flat: bool = True
    lost: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether memory stayed flat and nothing was lost."""
        return self.is_flat and not self.lost


def soak(bundle: Path, requests: int, slots: int, seed: int, every: int) -> Soak:
    """Run random requests.

    Args:
        bundle: The bundle.
        requests: How many.
        slots: How many slots, 2 or more.
        seed: What is random follows from it.
        every: Memory is measured after so many requests.
    """
    rng = random.Random(seed)
    found = Soak(requests)
    started = time.perf_counter()
    with progress_stages() as stage, load(bundle, slots=slots) as model:
        advance = stage("Answering requests", requests)
        crowd = _Crowd(model, rng)
        for number in range(requests):
            crowd.join()
            while crowd.size > 2 * slots:
                crowd.act()
            if number % every == every - 1:
                found.memory.append((number + 1, memory_now()["rss_bytes"]))
            advance(1)
        while crowd.size:
            crowd.act()
        found.ended, found.tokens = dict(crowd.ended), crowd.tokens
        found.lost = requests - crowd.ended.total() + _lost_slots(model)
    found.elapsed_s = time.perf_counter() - started
    found.growth_bytes, found.is_flat = growth([size for count, size in found.memory if count > WARM_UP])
    return found


def growth(sizes: Sequence[int]) -> tuple[int, bool]:
    """Return how many bytes memory grew by, from the first tenth of its sizes to the last, and whether it is flat."""
    if not sizes:
        return 0, True
    tenth = max(len(sizes) // 10, 1)
    first, last = statistics.median(sizes[:tenth]), statistics.median(sizes[-tenth:])
    return int(last - first), last - first <= max(FLAT_BYTES, FLAT_SHARE * first)


class _Crowd:
    """Those who have asked for a text and have not got it yet."""

    def __init__(self, model: Model, rng: random.Random) -> None:
        self._model = model
        self._rng = rng
        self._context = model.bundle.manifest.max_length
        self._vocab = model.bundle.manifest.spec.vocab_size
        self._texts = [[rng.randrange(self._vocab) for _ in range(min(200, self._context))] for _ in range(3)]
        self._readers: list[tuple[Stream, float]] = []  # with how eager each is
        self._batches: list[tuple[Iterator[tuple[int, Result]], list[int]]] = []  # with the number still to come
        self.ended: Counter[str] = Counter()
        self.tokens = 0

    @property
    def size(self) -> int:
        """How many requests have no end yet."""
        return len(self._readers) + sum(left[0] for _, left in self._batches)

    def join(self) -> None:
        """One more request."""
        request = self._request()
        if self._rng.random() < 0.2:
            self._batches.append((self._model.stream_batch([request], keep_going=True), [1]))
            return
        try:
            self._readers.append((self._model.start(request), self._rng.choice((0.05, 1.0, 3.0))))
        except ShortstackError:
            self.ended["refused"] += 1

    def act(self) -> None:
        """Somebody reads a token, waits for the result of a batch, or leaves."""
        if self._batches and (not self._readers or self._rng.random() < 0.02):
            results, left = self._batches.pop(0)
            for _, result in results:
                self._end("refused" if isinstance(result.error, RequestError) else result.finish_reason)
                self.tokens += len(result.tokens)
                left[0] -= 1
            return
        index = self._rng.choices(range(len(self._readers)), [eager for _, eager in self._readers])[0]
        stream = self._readers[index][0]
        if self._rng.random() < 0.01:
            self._leave(self._readers.pop(index)[0])
        elif next(stream, None) is None:
            self._end(str(stream.finish_reason))
            del self._readers[index]
        else:
            self.tokens += 1

    def _leave(self, stream: Stream) -> None:
        way = self._rng.choice(("closed", "cancelled", "dropped"))
        if way == "closed":
            stream.close()
        elif way == "cancelled":
            stream.cancel()
        self._end(way)

    def _end(self, way: str) -> None:
        self.ended[way] += 1

    def _request(self) -> Request:
        rng = self._rng
        length = rng.choice((1, 4, 16, 40, rng.randint(1, min(self._context - 1, 320))))
        if rng.random() < 0.02:
            length = self._context + rng.randint(0, 8)  # refused
        text = rng.choice(self._texts)[: rng.randint(0, length)]
        prompt = [*text, *(rng.randrange(self._vocab) for _ in range(length - len(text)))]
        sampling = SamplingParams(0.9, seed=rng.randrange(99)) if rng.random() < 0.3 else SamplingParams()
        return Request(
            prompt,
            self._strategy(),
            sampling,
            max_new_tokens=rng.randint(1, 24),
            ignore_eos=rng.random() < 0.8,
            reuse_cache=rng.random() < 0.7,
        )

    def _strategy(self) -> Strategy:
        rng, exits = self._rng, self._model.exit_layers
        kind = rng.choice(("plain", "draft", "leave") if exits else ("plain",))
        if kind == "plain":
            return Plain()
        if kind == "draft":
            return Speculate(rng.choice(exits), DraftPolicy(rng.randint(1, 6), has_bonus=rng.random() < 0.5))
        rule = parse_criterion(rng.choice(("always", "never", "top_prob >= 0.3", "margin >= 0.2")))
        used = tuple(sorted(rng.sample(exits, rng.randint(1, len(exits)))))
        verify: Verify = rng.choice(("none", "exact"))
        return ExitEarly(ExitPolicy(rule, used, verify=verify, max_pending=rng.choice((None, 2, 8))))


def _lost_slots(model: Model) -> int:
    """Return 1 if some slot cannot be used any more, else 0.

    As many streams as there are slots start. If the last one has to wait for another to end, a slot is missing.
    """
    most = min(16 * model.slots, model.bundle.manifest.max_length - 1)
    streams = [model.stream([number], max_new_tokens=most, ignore_eos=True) for number in range(model.slots)]
    next(streams[-1])
    is_lost = any(stream.stats.emitted >= most for stream in streams)
    for stream in streams:
        stream.close()
    return int(is_lost)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--requests", type=click.IntRange(2), default=10_000, help="How many requests.")
@click.option("--slots", type=click.IntRange(2), default=4, help="How many sequences run at once.")
@click.option("--seed", type=int, default=0, help="What is random follows from it.")
@click.option("--every", type=click.IntRange(1), default=100, help="Requests between two measurements of memory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(bundle: Path, requests: int, slots: int, seed: int, every: int, as_json: bool) -> None:
    """Let random requests join and leave BUNDLE; exit code 1 if memory grows or a request is lost."""
    found = soak(bundle, requests, slots, seed, every)
    if as_json:
        click.echo(json.dumps({**asdict(found), "is_sound": found.is_sound}))
    else:
        click.echo("requests  resident MB")
        for count, size in found.memory:
            click.echo(f"{count:8}  {size / 1e6:11.1f}")
        ends = ", ".join(f"{count} {way}" for way, count in sorted(found.ended.items()))
        click.echo(f"{requests} requests in {found.elapsed_s:.0f} s: {ends}; {found.tokens} tokens; {found.lost} lost")
        verdict = "flat" if found.is_flat else "NOT FLAT"
        if requests > WARM_UP:
            click.echo(f"memory after the first {WARM_UP}: {found.growth_bytes / 1e6:+.1f} MB, {verdict}")
    if not found.is_sound:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
