"""The graphs of several sequences without a neural net: segments that check what they are handed and what they read.

::

    script = SlotScript(shape, seed=7)          a bundle's layers and exits, and what its heads predict
    engine = script.engine(slots=3)             the product's engine over segments that do no arithmetic
    script.assert_slots_hold(engine)            what slots say that they hold is in the cache of every layer

Everything but the runs themselves is the product's: slots, buffers, the cache, prefixes, loops. A row of a cache, of a
residual stream or of a state holds the number of the text that it was computed from. So a segment knows which text each
row before its own belongs to. It fails with "hole" or "stale" if one is missing or of another text, as the other
scripted decoders do, and it checks that parts have slots of their own and room for their rows. What a head says is a
function of the text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from helpers.scripted import Prefix, ScriptedError, ScriptedModel, summary
from helpers.scripted_engine import ScriptedEngine
from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.kv_map import borrowed, lenders
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.plan import ExitSpec, SplitPlan
from shortstack.graphs.precision import SPARE_ROWS, Precision
from shortstack.graphs.spec_json import llama_spec
from shortstack.runtime.batch import engine as engine_file
from shortstack.runtime.batch import prefixes
from shortstack.runtime.batch.engine import Engine
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.packed_segment import Part
from shortstack.runtime.engine.session import Device
from shortstack.runtime.engine.slot_cache import SlotCache

VOCAB = 8
_HIDDEN = 8
_DIGITS, _BASE = 3, 100  # a text's number in a row: digits that fit into an int8
_GARBAGE = 101


@dataclass(frozen=True)
class Shape:
    """What a bundle is cut into.

    Attributes:
        kv_map: The layer whose keys and values each layer uses.
        exits: The exits.
        is_int8: The cache is int8, so runs have no spare row.
    """

    kv_map: tuple[int, ...]
    exits: tuple[ExitSpec, ...]
    is_int8: bool = False


def _exits(*layers: int, **fields: Any) -> tuple[ExitSpec, ...]:
    return tuple(ExitSpec(layer, **fields) for layer in layers)


SHAPES = {
    "float": Shape((0, 1, 2, 3), _exits(1, 3)),
    "int8 cache": Shape((0, 1, 2, 3), _exits(1, 2, 3, has_gate=True), is_int8=True),
    "complete": Shape((0, 1, 1, 1), _exits(2, 3)),
    "shared across cuts": Shape((0, 0, 2, 0), _exits(1, 2)),
    "shared across cuts, int8 cache": Shape((0, 0, 2, 0), _exits(1, 2), is_int8=True),
    "exits with blocks": Shape((0, 1, 2, 3), _exits(1, 3, branch="block")),
    "exits that see states": Shape((0, 1, 2, 3), _exits(1, 2, branch="linear", sees_state=True)),
}


class Run(NamedTuple):
    """One run of a segment: its rows, its slots, and whether it is a chunk of a prompt."""

    segment: int
    rows: int
    slots: tuple[int, ...]
    is_prompt: bool


class FakeTime:
    """A clock that runs advance, in place of the module ``time``."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


class Texts:
    """Numbers for texts, and the rows that they leave in a cache."""

    def __init__(self, root: Prefix) -> None:
        self._all = [root]
        self._codes: dict[Prefix, np.ndarray] = {root: np.zeros(_DIGITS, np.float32)}
        self._paths: dict[Prefix, np.ndarray] = {root: np.zeros((0, _DIGITS), np.float32)}

    def code(self, text: Prefix) -> np.ndarray:
        """Return the digits of a text's number."""
        found = self._codes.get(text)
        if found is None:
            number = len(self._all)
            self._all.append(text)
            digits = [number // _BASE**place % _BASE for place in range(_DIGITS)]
            found = self._codes[text] = np.array(digits, np.float32)
        return found

    def of(self, digits: np.ndarray) -> Prefix | None:
        """Return the text with these digits; None if there is none."""
        low, mid, high = digits[:_DIGITS].tolist()
        number = int(low + _BASE * mid + _BASE**2 * high)
        is_number = max(low, mid, high) < _BASE and number < len(self._all)
        return self._all[number] if is_number else None

    def path(self, text: Prefix) -> np.ndarray:
        """Return the rows [length, digits] that the text's positions leave."""
        found = self._paths.get(text)
        if found is None:
            assert text.parent is not None
            found = self._paths[text] = np.vstack([self.path(text.parent), self.code(text)])
        return found


class SlotScript:
    """A bundle's shape and the predictions of its heads.

    Args:
        shape: Layers and exits.
        model: What heads say.
        max_length: Positions of the longest context.
    """

    def __init__(self, shape: Shape, model: ScriptedModel, max_length: int = 48) -> None:
        self.shape = shape
        self.model = model
        self.texts = Texts(model.root)
        self.time = FakeTime()
        self.runs: list[Run] = []
        self.problems: list[AssertionError] = []
        self.run_s, self.row_s = 1.0, 0.25
        self.fails: Callable[[int, Sequence[Part]], bool] = lambda segment, parts: False
        spec = llama_spec(
            model_type="llama",
            num_hidden_layers=len(shape.kv_map),
            hidden_size=_HIDDEN,
            intermediate_size=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=VOCAB,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            kv_map=shape.kv_map,
        )
        self.manifest = Manifest(
            spec=spec,
            plan=SplitPlan(spec.num_hidden_layers, shape.exits),
            dtype="float32",
            max_length=max_length,
            files={},
            source_name="script",
            source_sha256="",
            tools={},
            precision=Precision(kv_cache="int8" if shape.is_int8 else "float"),
        )

    def engine(self, slots: int) -> ScriptedEngine:
        """Return an engine over this bundle."""
        bundle = Bundle(Path("script"), self.manifest)
        graphs = OpenGraphs(bundle, (), (Device(),) * len(self.manifest.plan.segments), is_packed=True)
        made: list[ScriptedEngine] = []

        def segment(graphs: OpenGraphs, index: int, cache: SlotCache, fewest_rows: int) -> Any:
            return ScriptedSegment(self, index, cache, made)

        with mock.patch.object(engine_file, "PackedSegment", segment):
            made.append(ScriptedEngine(graphs, slots, 1))
        return made[0]

    @contextmanager
    def sizes(self, *, chunk: int = 16, prompt_chunk: int = 256, worth_copying: int = 16) -> Iterator[None]:
        """Let engines read the script's clock, and have other sizes than the product's.

        Args:
            chunk: The fewest rows of a chunk of a prompt beside others.
            prompt_chunk: The most rows of a chunk.
            worth_copying: Positions from which on a copy is made.
        """
        with (
            mock.patch.object(engine_file, "time", self.time),
            mock.patch.object(engine_file, "_FEWEST_CHUNK_ROWS", chunk),
            mock.patch.object(engine_file, "PREFILL_ROWS", prompt_chunk),
            mock.patch.object(prefixes, "_WORTH_COPYING", worth_copying),
        ):
            yield

    def assert_slots_hold(self, engine: Engine) -> None:
        """Assert that no check has failed, and that every layer's cache holds what each slot's text says it does."""
        if self.problems:
            raise self.problems[0]
        for number, sequence in enumerate(engine._slots._texts):
            text = self.model.prefix(sequence.tokens[: sequence.cached])
            path = self.texts.path(text)
            for (owner, part), array in engine.cache._arrays.items():
                found = array[number, 0, : sequence.cached, :_DIGITS]
                if not (found == path).all():
                    where = int(np.flatnonzero((found != path).any(axis=1))[0])
                    raise AssertionError(f"slot {number}, {owner} {part}: position {where} of {sequence.cached}")


class ScriptedSegment:
    """Stands for :class:`~shortstack.runtime.engine.packed_segment.PackedSegment`."""

    def __init__(self, script: SlotScript, index: int, cache: SlotCache, engine: list[ScriptedEngine]) -> None:
        manifest = script.manifest
        segment = manifest.plan.segments[index]
        kv_map = manifest.spec.kv_map
        self._script = script
        self._index = index
        self._cache = cache
        self._engine = engine
        self._exit = manifest.plan.exit_of(segment)
        self._spare = 0 if script.shape.is_int8 else SPARE_ROWS
        self._is_last = segment.is_last
        self._borrowed = list(borrowed(kv_map, segment.start, segment.end))
        self._seen = [*manifest.cache_types(segment), *self._borrowed]  # owners of the caches that it reads
        self._lends = list(lenders(kv_map, segment.start, segment.end))

    def run(self, parts: Sequence[Part]) -> None:
        script = self._script
        rows = sum(part.count for part in parts)
        script.time.now_s += script.run_s + script.row_s * rows
        try:
            is_prompt = self._engine[0].check_order(self._index, parts)
            script.runs.append(Run(self._index, rows, tuple(part.slot for part in parts), is_prompt))
            self._check_room(parts)
            fails = script.fails(self._index, parts)
            for part in parts:
                self._run_part(part, fails)
        except AssertionError as problem:  # which the engine would take for an error of the jobs
            script.problems.append(problem)
            raise
        if fails:
            raise ScriptedError(self._index)

    def _check_room(self, parts: Sequence[Part]) -> None:
        slots = [part.slot for part in parts]
        assert len(set(slots)) == len(slots), f"slots {slots} of one run"
        longest = max(part.count for part in parts) + self._spare
        for part in parts:
            assert 0 <= part.slot < self._cache.slots
            assert part.count >= 1
            assert 0 <= part.num_rows <= part.count
            assert part.past >= 0
            end = part.past + part.count
            assert end <= self._cache.max_length, f"{end} positions in a context of {self._cache.max_length}"
            # The kernel's rule, for a part that is padded to the longest one.
            assert part.past + longest <= self._cache.capacity, f"{part.past} + {longest} of {self._cache.capacity}"

    def _run_part(self, part: Part, fails: bool) -> None:
        texts = self._script.texts
        past, count = part.past, part.count
        first_seen = count - part.num_rows
        text = self._text_before(part)
        codes = []
        for row in range(count):
            text = self._text_of(part, row, text)
            codes.append(texts.code(text))
            if row >= first_seen:
                self._say(part, row - first_seen, text, fails)
        rows = np.array(codes)
        for layer in self._borrowed:
            for kv in names.KV_PARTS:
                found = part.new_rows[names.new_rows(layer, kv)][0, :, :_DIGITS]
                assert (found == rows).all(), f"stale new rows of layer {layer}"
        if fails:
            rows = np.full_like(rows, _GARBAGE)
        for layer in self._lends:
            for kv in names.KV_PARTS:
                part.new_rows[names.new_rows(layer, kv)][0, :, :_DIGITS] = rows
        for owner in self._seen:  # a consumer writes its producer's rows again
            for kv in names.KV_PARTS:
                array = self._cache._arrays[owner, kv][part.slot, 0]
                array[past : past + count, :_DIGITS] = rows
                if self._spare:
                    array[past + count, :_DIGITS] = _GARBAGE
        if (out := part.rows.hidden_out) is not None:
            out[0, :, :_DIGITS] = rows
            out[0, :, _DIGITS] = self._index
            out[0, :, _DIGITS + 1 :] = (rows[:, :1] * 7 + self._index) % 5

    def _text_before(self, part: Part) -> Prefix:
        """Return the text that positions 0..past-1 hold, after checking that all caches hold it without a hole."""
        texts, past = self._script.texts, part.past
        if not past:
            return self._script.model.root
        where = f"segment {self._index}, slot {part.slot}"
        text = texts.of(self._cache._arrays[self._seen[0], names.KV_PARTS[0]][part.slot, 0, past - 1])
        assert text is not None, f"hole: {where} at position {past - 1}"
        assert text.length == past, f"stale: {where} at position {past - 1}"
        path = texts.path(text)
        for owner in self._seen:
            for kv in names.KV_PARTS:
                rows = self._cache._arrays[owner, kv][part.slot, 0, :past, :_DIGITS]
                if not (rows == path).all():
                    at = int(np.flatnonzero((rows != path).any(axis=1))[0])
                    raise AssertionError(f"stale: {where}, {owner} {kv} at position {at} of {past}")
        return text

    def _text_of(self, part: Part, row: int, before: Prefix) -> Prefix:
        if self._index == 0:
            token = int(part.rows.ids[0, row])
            assert 0 <= token < VOCAB, f"token {token} in row {row}"
            return before.then(token)
        assert part.rows.hidden is not None
        hidden = part.rows.hidden[0, row]
        assert hidden[_DIGITS] == self._index - 1, f"hole: segment {self._index} has nothing below in row {row}"
        text = self._script.texts.of(hidden[:_DIGITS])
        assert text is not None
        assert text.parent is before, f"stale: segment {self._index}, residual stream of row {row}"
        return text

    def _say(self, part: Part, row: int, text: Prefix, fails: bool) -> None:
        """Write a head's outputs; poison, if the run fails or the exit sees the state of another position."""
        script, rows = self._script, part.rows
        exit_state = self._exit is not None and self._exit.sees_state
        is_wrong = fails
        if exit_state:
            assert rows.exit_state is not None
            seen = script.texts.of(rows.exit_state[0, row, :_DIGITS])
            is_wrong |= seen is not text.parent
            if rows.exit_state_out is not None:
                rows.exit_state_out[0, row, :_DIGITS] = script.texts.code(text)
        if self._is_last and rows.final_state is not None:
            rows.final_state[0, row, :_DIGITS] = script.texts.code(text)
        logits = script.model.final(text) if self._is_last else self._exit_logits(text)
        if is_wrong:
            logits = np.full_like(logits, np.nan)
        token, top_prob, margin, entropy = (-1, np.nan, np.nan, np.nan) if is_wrong else summary(logits.tobytes())
        said = {names.TOKEN: token, names.TOP_PROB: top_prob, names.MARGIN: margin, names.ENTROPY: entropy}
        said |= {names.LOGITS: logits, names.GATE: margin}
        for name, target in rows.head.items():
            assert isinstance(target, np.ndarray)
            target[0, row] = said[name]

    def _exit_logits(self, text: Prefix) -> np.ndarray:
        """A higher exit is surer of the same token, or predicts another."""
        logits = self._script.model.exit(text) * np.float32(1 + self._index)
        return np.roll(logits, self._index) if text.digest[self._index] % 4 == 0 else logits
