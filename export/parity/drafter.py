"""Compares a bundle's trained drafter with its twin in PyTorch, fed what the bundle's graphs are fed.

On each text:

1. what the model leaves for the drafter, against the reference's streams: a wrong depth or norm shows here;
2. the fused states, and the states and logits of all first drafts, row by row;
3. further drafts from several places, each on what the drafter itself gave for the row before;
4. rounds of a real generation, with rows that were refilled after accepted and rejected drafts. The twin runs all rows
   anew. A draft that differs is a problem unless the twin's logits are a near tie there.

The output does not depend on a drafter, so nothing shows that one reads the wrong depths but that its drafts are bad:
the acceptance rate is part of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from shortstack.export.parity.compare import LayerError, head_error, tolerance_of
from shortstack.export.parity.drafter_reference import DrafterReference
from shortstack.export.parity.drafter_report import DrafterParity, DraftFork
from shortstack.export.parity.reference import Reference
from shortstack.export.parity.twin_reference import TwinReference
from shortstack.export.twin.drafter import DrafterTwin, normalised
from shortstack.graphs import names
from shortstack.runtime.decode.choice import Choice, Proposal
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.decode.drafters import Draft
from shortstack.runtime.decode.runs import Asking
from shortstack.runtime.decode.trained_drafter import FromDrafter, TrainedDrafter
from shortstack.runtime.engine.decoder import State
from shortstack.runtime.engine.whole_drafter import WholeDrafter
from shortstack.runtime.engine.whole_text import Array, run_taps
from shortstack.runtime.model import Model
from shortstack.runtime.request import Speculate

_PLACES = 4  # of a text, from which further drafts are compared
_ROUNDS = 16  # of a generation that are compared: the twin runs all rows of the text for each draft
_LEAST_DRAFTS, _MOST_DRAFTS = 4, 7


def compare_drafts(
    model: Model,
    reference: Reference | TwinReference,
    drafter: DrafterReference,
    texts: Sequence[Sequence[int]],
    *,
    greedy_tokens: int,
    advance: Callable[[float], None] = lambda _: None,
) -> DrafterParity:
    """Compare a loaded bundle's drafter with its twin.

    Args:
        model: The bundle.
        reference: What its model is compared with.
        drafter: The twin.
        texts: Token ids of each text, which generations continue.
        greedy_tokens: Tokens of each generation; below 2 there are no rounds to compare, and no acceptance.
        advance: Called with 1 after each text.
    """
    manifest, twin = model.bundle.manifest, drafter.twin
    count = min(max(twin.spec.most_drafts, _LEAST_DRAFTS), _MOST_DRAFTS)
    report = DrafterParity(
        twin.spec.kind, twin.spec.features, tolerance_of(manifest), weights=list(drafter.weight_errors)
    )
    pairs: dict[int, list[tuple[Array, Array]]] = {number: [] for number in range(1, count + 1)}
    tensors: dict[str, LayerError] = {}

    def keep(what: str, ours: Array, theirs: Array, text: int, first: int = 0) -> None:
        off = np.abs(ours.astype(np.float32) - theirs).max(axis=-1)  # [rows]
        off = np.where(np.isnan(off), np.inf, off)
        size = float(np.abs(theirs).max())
        error = LayerError(
            what, float(off.max()) / size if size else float(off.max()), (text, first + int(off.argmax()))
        )
        if what not in tensors or error.relative > tensors[what].relative:
            tensors[what] = error

    for index, text in enumerate(texts):
        if len(text) > 1:
            _compare_rows(model, reference, drafter, text, index, count, pairs, keep, report)
        if greedy_tokens > 1:
            _compare_rounds(model, twin, text, index, greedy_tokens, count, report)
        advance(1)
    report.drafts = [head_error(number, found) for number, found in pairs.items() if found]
    report.tensors = list(tensors.values())
    return report


def _compare_rows(
    model: Model,
    reference: Reference | TwinReference,
    drafter: DrafterReference,
    text: Sequence[int],
    index: int,
    count: int,
    pairs: Mapping[int, list[tuple[Array, Array]]],
    keep: Callable[..., None],
    report: DrafterParity,
) -> None:
    """Compare what the model leaves, all first drafts, and further drafts from several places of one text."""
    twin, rows = drafter.twin, len(text) - 1
    graphs = model.graphs
    assert graphs.drafter is not None
    taps = run_taps(graphs, text)
    for port, expected in _expected_taps(model, reference, drafter, text).items():
        keep(f"{port} of the model", taps[port][0], expected, index)
    whole = WholeDrafter(graphs.drafter, rows + count)
    true_taps = {port: np.ascontiguousarray(array[:, :rows]) for port, array in taps.items()}
    fused = whole.fused(true_taps)
    u = twin.fused({port: torch.from_numpy(array[0].astype(np.float32)) for port, array in true_taps.items()})
    keep("fused states", fused, u.numpy(), index)
    ids = torch.tensor(list(text[1:]))
    ours, theirs = whole.run(fused, text[1:], 0), twin.rows(u, ids)
    keep("states of first drafts", ours.states, theirs.states.numpy(), index)
    pairs[1].append((ours.logits.astype(np.float32), theirs.logits.numpy()))
    for row, token in enumerate(ours.tokens.tolist()):
        _note(report, twin, theirs.logits[row], token, (index, "all rows at once", row + 2, 1))
    # From the end to the beginning: drafted rows overwrite those of the text that follow them.
    places = sorted({round((number + 1) * rows / _PLACES) for number in range(_PLACES)} - {0}, reverse=True)
    found: dict[int, list[tuple[Array, Array]]] = {number: [] for number in range(2, count + 1)}
    for true_rows in places:
        state, states = ours.states[true_rows - 1], torch.cat([u[:true_rows], theirs.states[true_rows - 1 : true_rows]])
        drafts = [int(ours.tokens[true_rows - 1])]
        for number in range(2, count + 1):
            mine = whole.run(state[None], drafts[-1:], true_rows + number - 2)
            all_ids = torch.cat([ids[:true_rows], torch.tensor(drafts)])
            other = twin.rows(states, all_ids, heads=1)
            position = true_rows + number
            keep(f"states of draft {number}", mine.states, other.states[-1:].numpy(), index, position)
            found[number].append((mine.logits.astype(np.float32), other.logits.numpy()))
            drafts.append(int(mine.tokens[0]))
            _note(report, twin, other.logits[0], drafts[-1], (index, f"from row {true_rows - 1}", position, number))
            state, states = mine.states[0], torch.cat([states, other.states[-1:]])
    for number, each in found.items():
        pairs[number].append((np.concatenate([a for a, _ in each]), np.concatenate([b for _, b in each])))


def _expected_taps(
    model: Model, reference: Reference | TwinReference, drafter: DrafterReference, text: Sequence[int]
) -> dict[str, Array]:
    """Return what the reference leaves for the drafter, [seq, hidden] by port."""
    features, depth = drafter.twin.spec.features, model.bundle.manifest.spec.num_hidden_layers
    streams = reference.streams(text, features or (depth,))
    if features:
        return {names.feature(each): streams[each] for each in features}
    state = normalised(torch.from_numpy(streams[depth]), drafter.norm, drafter.model_norm)
    return {names.DRAFT_STATE: state.numpy()}


def _compare_rounds(
    model: Model,
    twin: DrafterTwin,
    text: Sequence[int],
    index: int,
    greedy_tokens: int,
    count: int,
    report: DrafterParity,
) -> None:
    """Compare the drafts of a generation, and count how many of them the model accepts."""
    new = min(greedy_tokens, model.cache.max_length - len(text))
    if new < 2:
        return
    source = _Recorded()
    wanted = Speculate(draft=DraftPolicy(max_draft_tokens=count), source=source)
    result = model.generate(text, max_new_tokens=new, strategy=wanted, ignore_eos=True)
    for whole, own in ((report.drafted_at, result.stats.drafted_at), (report.accepted_at, result.stats.accepted_at)):
        whole += [0] * (len(own) - len(whole))
        for place, number in enumerate(own):
            whole[place] += number
    tokens = [*text, *result.tokens]
    taps = run_taps(model.graphs, tokens)
    u = twin.fused({port: torch.from_numpy(array[0].astype(np.float32)) for port, array in taps.items()})
    for length, proposals in source.rounds[:_ROUNDS]:
        states, drafts = u[: length - 1], list[int]()
        for number, proposal in enumerate(proposals, 1):
            given = twin.rows(states, torch.tensor([*tokens[1:length], *drafts]), heads=1)
            where = (index, f"a round after {length - len(text)} new tokens", length + number - 1, number)
            _note(report, twin, given.logits[0], proposal.token, where)
            drafts.append(proposal.token)
            states = torch.cat([states, given.states[-1:]])


def _note(
    report: DrafterParity, twin: DrafterTwin, logits: torch.Tensor, ours: int, where: tuple[int, str, int, int]
) -> None:
    """Compare one draft with the twin's logits [rows of the head]."""
    report.compared += 1
    best = int(logits.argmax())
    theirs = twin.token(best)
    if ours != theirs:
        row = twin.row(ours)
        gap = float("inf") if row is None else float(logits[best] - logits[row])
        report.forks.append(DraftFork(*where, ours, theirs, gap))


@dataclass(frozen=True)
class _Recorded(FromDrafter):
    """The bundle's drafter drafts, and each round is recorded: the length of the text before it, and its drafts."""

    rounds: list[tuple[int, Sequence[Proposal]]] = field(default_factory=list, compare=False)

    def drafter(self, stack: State, choice: Choice) -> TrainedDrafter:
        """See :meth:`DraftSource.drafter`."""
        rounds = self.rounds

        class Recording(TrainedDrafter):
            def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Asking[Draft]:
                length = len(tokens)
                draft = yield from super().draft(past, tokens, most, least_confidence)
                rounds.append((length, draft.proposals))
                return draft

        return Recording(stack, choice)
