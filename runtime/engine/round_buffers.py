"""The small buffers that the graphs of a stack share, with one row per position of a round.

::

    row               0    1    2   ...  window - 1, then one spare row: w = window + 1
    ids   [1, w+1]    x0   d1   d2  ...              token ids; drafting on row r writes its token to row r + 1
    state [1, w+1, h] s    g1   g2  ...              the state of the position before each row, or a guess of it
    hidden[1, w, h]   ·    ·    ·                    per boundary: the residual stream between two segments
    final [1, w]      p1   p2   p3                   the token that the final head predicts after row r

States are kept only if an exit in use sees them. s is a state of the whole model. Drafting on row r writes the exit's
guess of that position's state to row r + 1. Verifying ends the round and writes the whole model's state of that
position to row r. :meth:`RoundBuffers.keep_state` then copies the state of the position before the newest token to
row 0; it is the only copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shortstack.runtime.engine.assistant_rows import AssistantRows, SharedCache
from shortstack.runtime.engine.binder import Rows
from shortstack.runtime.engine.draft_vocab import read_draft_vocab
from shortstack.runtime.engine.drafter_rows import DrafterRows
from shortstack.runtime.engine.drafter_stages import StagedRows
from shortstack.runtime.engine.drafting import Drafting
from shortstack.runtime.engine.head import Head
from shortstack.runtime.engine.levels import Levels
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.taps import RoundTaps


class RoundBuffers:
    """The buffers, and the slices of them that a run reads and writes.

    Args:
        graphs: The bundle's graphs.
        levels: Its levels.
        window: The most rows that one round may have.
        cache: The sequence's cache, for a drafter that reads it; None where nothing drafts.

    Attributes:
        heads: Outputs of each level's head, by row; the final head comes last.
        exit: Outputs of the lowest level's head; for an uncut stack, a head that no run writes to.
        hidden: By boundary, the residual stream [1, window + 1, hidden].
        taps: What a drafter reads.
    """

    def __init__(self, graphs: OpenGraphs, levels: Levels, window: int, cache: SharedCache | None = None) -> None:
        bundle = graphs.bundle
        manifest = bundle.manifest
        spec = manifest.spec
        self._dtype: np.dtype[np.floating] = np.dtype(manifest.dtype)
        self._hidden_size = spec.hidden_size
        rows = self._count = window + 1  # with the spare row, see the module's docstring
        self._num_rows = [np.array(count, np.int64) for count in range(rows + 1)]
        self._has_state = levels.has_state
        self.heads: list[Head] = []
        for exit_spec in levels.exits:
            ids = read_draft_vocab(bundle, exit_spec)
            vocab = spec.vocab_size if ids is None else len(ids)
            self.heads.append(Head(rows, vocab, self._dtype, ids, has_gate=exit_spec.has_gate))
        self.heads.append(Head(rows, spec.vocab_size, self._dtype, None))
        self.exit = self.heads[0] if levels.exits else Head(rows, spec.vocab_size, self._dtype, None)
        self._ids = np.zeros((1, rows + 1), np.int64)
        self.exit.token = self._ids[0, 1:]  # the drafted token is the next row's input, without a copy
        self.hidden = [np.zeros((1, rows, self._hidden_size), self._dtype) for _ in manifest.plan.segments[1:]]
        self.taps = RoundTaps(manifest, rows)
        self._drafter_graphs = graphs.drafter
        self._drafter: Drafting | None = None
        drafter = manifest.plan.drafter
        self._shared_cache = cache if drafter is not None and drafter.shared else None
        # No rows if no exit in use sees a state: then exits that are not in use are bound to empty states.
        self._states = np.zeros((1, rows + 1 if self._has_state else 0, self._hidden_size), self._dtype)

    @property
    def drafter(self) -> Drafting:
        """The bundle's trained drafter on the text of these rows, made when it is first asked for."""
        if self._drafter is None:
            assert self._drafter_graphs is not None, "the bundle has no drafter"
            graphs, cache = self._drafter_graphs, self._shared_cache
            drafter = graphs.bundle.manifest.plan.drafter
            if cache is not None:
                self._drafter = AssistantRows(graphs, self.taps, self._count, cache)
            else:
                kind = StagedRows if drafter is not None and drafter.layer_per_draft else DrafterRows
                self._drafter = kind(graphs, self.taps, self._count)
        return self._drafter

    def release_cache(self) -> None:
        """Let go of the cache's buffers, which are about to be replaced."""
        if isinstance(self._drafter, AssistantRows):
            self._drafter.release()

    def put(self, row: int, token: int) -> None:
        """Set the token of a row."""
        self._ids[0, row] = token

    def keep_state(self, row: int) -> None:
        """Copy the state that the last verification left in a row to row 0, for the next round."""
        if row and self._has_state:
            self._states[0, 0] = self._states[0, row]

    def round_rows(self, segment: int, start: int, end: int, num_rows: int, head: Head, with_logits: bool) -> Rows:
        """Return the tensors for a segment on rows ``[start, end)``, with its head on the last ``num_rows`` of them."""
        below = None if segment == 0 else self.hidden[segment - 1][:, start:end]
        above = self.hidden[segment][:, start:end] if segment < len(self.hidden) else None
        taps = self.taps.of_round(segment, start, end)
        return self._rows(self._ids[:, start:end], below, above, end - num_rows, num_rows, head, with_logits, taps)

    def prompt_rows(
        self,
        segment: int,
        ids: np.ndarray,
        past: int,
        below: np.ndarray,
        head: Head | None,
        with_logits: bool,
        spare: int = 0,
    ) -> tuple[Rows, np.ndarray]:
        """Return the tensors for a segment on a chunk of a prompt, and the array that gets its residual stream.

        Args:
            segment: Which segment.
            ids: The chunk's token ids [1, rows].
            past: Position of the first.
            below: The residual stream that the segment below left, [1, rows, hidden]; the lowest segment ignores it.
            head: The head that sees the chunk's last position; None for no head.
            with_logits: Whether the head returns logits.
            spare: How many rows to append whose results are not read; the head sees them too.
        """
        taps = self.taps.of_prompt(segment, past, ids.shape[1], spare)
        if spare:
            ids = np.pad(ids, ((0, 0), (0, spare)))
            below = below if segment == 0 else np.pad(below, ((0, 0), (0, spare), (0, 0)))
        above = np.empty((1, ids.shape[1], self._hidden_size), self._dtype)
        hidden = None if segment == 0 else below
        num_rows = 0 if head is None else 1 + spare
        return self._rows(ids, hidden, above, 0, num_rows, head or self.heads[-1], with_logits, taps), above

    def _rows(
        self,
        ids: np.ndarray,
        below: np.ndarray | None,
        above: np.ndarray | None,
        start: int,
        num_rows: int,
        head: Head,
        with_logits: bool,
        taps: Mapping[str, np.ndarray],
    ) -> Rows:
        """Collect the tensors of a run whose head begins at row ``start`` of the round."""
        states = self._states
        return Rows(
            ids=ids,
            num_rows=self._num_rows[num_rows],
            hidden=below,
            hidden_out=above,
            head=head.outputs(start, start + num_rows, with_logits) if num_rows else {},
            exit_state=states[:, start : start + num_rows],
            exit_state_out=states[:, start + 1 : start + 1 + num_rows] if num_rows else None,
            final_state=states[:, start : start + num_rows] if num_rows and self._has_state else None,
            taps=taps,
        )
