"""A drafter of which each layer drafts one token, on one text: layers for multi-token prediction (MTP).

Row p of stage i is the pair of what stage i - 1 gave for row p, at first the model's state, and the token at p + 1 + i.
With T tokens, its rows up to T - 2 - i are *true*. The i rows after them pair with drafts of the round, and are run
again when the tokens are known::

    tokens        ...  x[T-3]  x[T-2]  x[T-1]  d1      d2
    stage 0       ...  T-4     T-3     T-2                     gives d1
    stage 1       ...          T-4     T-3     T-2             gives d2; row T-2 pairs with a draft
    stage 2       ...                  T-4     T-3     T-2     gives d3; so do its rows T-3 and T-2

So after a round that emitted n tokens, stage i runs n + i rows, and the last one gives its draft. True rows of stage i
leave states for stage i + 1 in its buffer. A stage that a round does not ask for is left behind, and runs more rows
when it is asked for again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.head import Head
from shortstack.runtime.engine.mapped import mapped_zeros
from shortstack.runtime.engine.taps import RoundTaps

_CHUNK_ROWS = 256  # of a prompt


class StagedRows:
    """The drafter of one sequence; see :class:`~shortstack.runtime.engine.drafting.Drafting`.

    Args:
        graphs: The drafter's graphs.
        taps: What the sequence's model leaves for it.
        rows: The most rows of a round.

    Raises:
        ShortstackError: A graph cannot be opened; see :func:`~shortstack.runtime.engine.session.open_sessions`.
    """

    def __init__(self, graphs: DrafterGraphs, taps: RoundTaps, rows: int) -> None:
        manifest = graphs.bundle.manifest
        drafter = manifest.plan.drafter
        assert drafter is not None, "the bundle has no drafter"
        assert drafter.layer_per_draft, "its layers draft together"
        self.most_drafts = drafter.stages
        self.warn_of_overflow = graphs.warn_of_overflow
        dtype: np.dtype[np.floating] = np.dtype(manifest.dtype)
        self.head = Head(max(rows, drafter.stages), manifest.spec.vocab_size, dtype, None)
        self._taps, self._round = taps, rows
        capacity = manifest.max_length + rows + drafter.stages
        self._stages = [
            _Stage(graphs, drafter, stage, capacity, (rows + drafter.stages) * (stage + 1))
            for stage in range(drafter.stages)
        ]
        self._tokens: list[int] = []  # the text that the true rows belong to
        self._late: list[np.ndarray] = []  # states of the model after those that wait in the first stage's buffer
        self._drafts = np.zeros(drafter.stages + 1, np.int64)

    def start(self, tokens: Sequence[int], cached: int) -> int:
        """See :meth:`Drafting.start`: all stages begin at the same row."""
        common = 0
        for old, new in zip(self._tokens, tokens, strict=False):
            if old != new:
                break
            common += 1
        filled = max(min(cached, common - len(self._stages), *(stage.filled for stage in self._stages)), 0)
        for stage in self._stages:
            stage.filled, stage.waiting = filled, 0
        self._late.clear()
        self._taps.take_prompt()
        self._taps.keeps_prompts = True
        return filled

    def end(self) -> None:
        """See :meth:`Drafting.end`."""
        self._taps.keeps_prompts = False

    def keep_round(self, rows: int) -> None:
        """See :meth:`Drafting.keep_round`."""
        self._take_prompt()
        self._keep(self._taps.round(rows)[names.DRAFT_STATE])

    def is_behind(self) -> bool:
        """See :meth:`Drafting.is_behind`; so are stages that rounds have not asked for."""
        self._take_prompt()
        usual = self._round + len(self._stages)
        return bool(self._late) or any(stage.waiting > usual for stage in self._stages[1:])

    def catch_up(self, tokens: Sequence[int]) -> None:
        """See :meth:`Drafting.catch_up`."""
        first = self._stages[0]
        states = np.concatenate([first.states[0, : first.waiting], *self._late])
        last = max(len(states) - self._round, 0)
        first.waiting = 0
        self._late.clear()
        for start in range(0, max(last, 1), _CHUNK_ROWS):
            self._fill(tokens, states[start : min(start + _CHUNK_ROWS, last)])
        self._keep(states[last:])

    def refill(self, tokens: Sequence[int], with_logits: bool) -> None:
        """See :meth:`Drafting.refill`."""
        self._take_prompt()
        first = self._stages[0]
        assert first.filled + first.waiting == len(tokens) - 1, "rows of the text were not kept"
        self._tokens = list(tokens)
        self._run(0, with_logits)

    def put(self, row: int, token: int) -> None:
        """See :meth:`Drafting.put`."""
        self._drafts[row - 1] = token

    def step(self, row: int, with_logits: bool) -> None:
        """See :meth:`Drafting.step`: stage ``row`` drafts."""
        self._run(row, with_logits)

    def _run(self, number: int, with_logits: bool) -> None:
        """Run the rows of a stage that are missing, those that pair with drafts included; the last one drafts."""
        stage, text = self._stages[number], len(self._tokens)
        rows, true = text - 1 - stage.filled, max(text - 1 - number, 0) - stage.filled
        tokens, drafts = self._tokens[stage.filled + 1 + number :], self._drafts[: min(number, rows)]
        stage.ids[0, : rows - len(drafts)] = tokens
        stage.ids[0, rows - len(drafts) : rows] = self._drafts[number - len(drafts) : number]
        above = self._stages[number + 1] if number + 1 < len(self._stages) else None
        stage.draft(rows, self.head, number, with_logits, above)
        if above is not None:
            above.waiting += true
        stage.passed(true)

    def _fill(self, tokens: Sequence[int], states: np.ndarray) -> None:
        """Run true rows through all stages, without a head.

        Args:
            tokens: The text.
            states: States of the model [rows, hidden], which follow those that the first stage has run.
        """
        self._tokens = list(tokens)
        for number, stage in enumerate(self._stages):
            waiting = np.concatenate([stage.states[0, : stage.waiting], states])
            rows = max(min(len(waiting), len(tokens) - 1 - number - stage.filled), 0)
            first = stage.filled + 1 + number
            states = stage.fill(np.asarray(tokens[first : first + rows], np.int64), waiting[:rows])
            stage.filled += rows
            stage.waiting = 0
            stage.keep(waiting[rows:])

    def _take_prompt(self) -> None:
        for past, tensors in self._taps.take_prompt():
            known = self._stages[0].filled + self._stages[0].waiting + sum(map(len, self._late))
            assert past == known, "a part of the prompt was not kept"
            self._keep(tensors[names.DRAFT_STATE])

    def _keep(self, states: np.ndarray) -> None:
        """Keep states of the model until the first stage runs: what a round leaves in its buffer, more beside it."""
        first = self._stages[0]
        if self._late or first.waiting + len(states) > self._round:
            self._late.append(states.copy())
        else:
            first.keep(states)


class _Stage:
    """One stage: its graph, its cache, and the states that wait for it.

    Attributes:
        filled: True rows in its cache.
        waiting: True rows of ``states``, from the first, which follow those in the cache.
        states: What the stage below gives, [1, most rows, hidden].
        ids: The tokens of these rows, [1, most rows].
    """

    def __init__(self, graphs: DrafterGraphs, drafter: DrafterSpec, number: int, capacity: int, rows: int) -> None:
        dtype, own = np.dtype(graphs.bundle.manifest.dtype), drafter.layers[number].attention
        self._session, self._device = graphs.drafts(number), graphs.device
        self._is_last = number == drafter.stages - 1
        self.filled = self.waiting = 0
        self.states, self.ids = np.zeros((1, rows, drafter.hidden_size), dtype), np.zeros((1, rows), np.int64)
        shape = (1, own.kv_heads, capacity, own.cache_head_dim)
        self._cache = {(names.drafter_layer(number), part): mapped_zeros(shape, dtype) for part in names.KV_PARTS}
        self._past_end, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._num_rows = [np.array(count, np.int64) for count in (0, 1)]
        self._unread = np.zeros((1, 1, drafter.hidden_size), dtype)  # states that no stage reads
        self._bindings: dict[tuple[int, int, bool], Binding] = {}

    def keep(self, states: np.ndarray) -> None:
        """Append true states [rows, hidden] to those that wait."""
        self.states[0, self.waiting : self.waiting + len(states)] = states
        self.waiting += len(states)

    def passed(self, rows: int) -> None:
        """Note that true rows were run, the first of those that wait."""
        self.filled += rows
        self.waiting -= rows
        self.states[0, : self.waiting] = self.states[0, rows : rows + self.waiting]

    def draft(self, rows: int, head: Head, row: int, with_logits: bool, above: _Stage | None) -> None:
        """Run the first rows of the buffers; the head sees the last one.

        Args:
            rows: How many.
            head: Where its outputs go.
            row: To which row there.
            with_logits: Whether the head returns logits.
            above: The stage that reads their states; they are written after those that wait there.
        """
        self._set_lengths(rows)
        key = (rows, 0 if above is None else above.waiting, with_logits)
        if key not in self._bindings:
            inputs = {names.INPUT_IDS: self.ids[:, :rows], names.DRAFT_STATE: self.states[:, :rows]}
            outputs = dict(head.outputs(row, row + 1, with_logits))
            states = self._unread if above is None else above.states[:, above.waiting : above.waiting + rows]
            self._bindings[key] = self._bind(inputs, {**outputs, names.DRAFT_STATE_OUT: states}, 1)
        self._bindings[key].run()

    def fill(self, ids: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Run rows without the head; return the states [rows, hidden] that they give, or none of the last stage.

        Args:
            ids: Their tokens [rows].
            states: Their states [rows, hidden].
        """
        if not len(ids):
            return states[:0]
        self._set_lengths(len(ids))
        inputs = {names.INPUT_IDS: ids[None], names.DRAFT_STATE: np.ascontiguousarray(states[None])}
        given = np.zeros_like(states)
        self._bind(inputs, {} if self._is_last else {names.DRAFT_STATE_OUT: given[None]}, 0).run()
        return given

    def _set_lengths(self, rows: int) -> None:
        self._past_end[0] = self.filled + rows - 1
        self._total[...] = self.filled + rows

    def _bind(self, rows: dict[str, np.ndarray], given: dict[str, Tensor], num_rows: int) -> Binding:
        inputs: dict[str, Tensor] = {
            **rows,
            names.SEQLENS_K: self._past_end,
            names.TOTAL_SEQUENCE_LENGTH: self._total,
            names.NUM_ROWS: self._num_rows[num_rows],
        }
        outputs = dict(given)
        for (owner, part), array in self._cache.items():
            inputs[names.past(owner, part)] = outputs[names.present(owner, part)] = array
        return Binding(self._session, inputs, outputs, self._device)
