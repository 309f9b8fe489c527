"""Compares a bundle's trained drafter with its twin in PyTorch, fed what the bundle's graphs are fed.

On each text:

1. what the model leaves for the drafter, against the reference's streams: a wrong depth or norm shows here;
2. the fused states, and the states and logits of all first drafts, row by row. Where each layer drafts one token,
   all of them run over the text so. An assistant's twin reads keys and values of the reference. Of a head with
   centroids, its choice of groups is compared, and the logits of the groups that the bundle chose;
3. further drafts from several places, each on what the bundle's drafter gave for the draft before;
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
from shortstack.export.twin.drafter_parts import Drafted, DraftedText, TwinOfDrafter, normalised
from shortstack.graphs import names
from shortstack.runtime.decode.choice import Choice, Proposal
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.decode.drafters import Draft
from shortstack.runtime.decode.runs import Asking
from shortstack.runtime.decode.trained_drafter import FromDrafter, TrainedDrafter
from shortstack.runtime.engine.decoder import State
from shortstack.runtime.engine.whole_drafter import DraftedRows, fused
from shortstack.runtime.engine.whole_drafters import whole_drafter
from shortstack.runtime.engine.whole_text import Array, Stored, run_for_drafter
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
    if twin.spec.layer_per_draft:
        count = twin.spec.stages
    report = DrafterParity(
        twin.spec.kind,
        twin.spec.features,
        tolerance_of(manifest),
        weights=list(drafter.weight_errors),
        shared=twin.spec.shared,
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
            _compare_rounds(model, reference, twin, text, index, greedy_tokens, count, report)
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
    taps, cache = run_for_drafter(graphs, text)
    for port, expected in _expected_taps(model, reference, drafter, text).items():
        keep(f"{port} of the model", taps[port][0], expected, index)
    true_taps = {port: np.ascontiguousarray(array[:, :rows]) for port, array in taps.items()}
    states = fused(graphs.drafter, true_taps)
    read = _read(reference, twin, text, true_taps)
    keep("fused states", states, read.states.numpy(), index)
    whole = whole_drafter(graphs.drafter, text, cache, count)

    def compare(mine: DraftedRows, other: Drafted, number: int, where: str, first: int) -> tuple[Array, Array]:
        """Compare rows of which the first one's draft is for position ``first``; return both sides' logits."""
        what = "first drafts" if number == 1 else f"draft {number}"
        theirs, seen = other.logits.numpy(), other.logits
        keep(f"states of {what}", mine.states, other.states[-len(mine.states) :].numpy(), index, first - 1)
        if mine.logit_ids is not None and other.scores is not None:
            columns = torch.tensor([[twin.head_ids.row(token) for token in row] for row in mine.logit_ids.tolist()])
            keep(f"groups of {what}", *chosen_scores(columns, other.scores, theirs.shape[1]), index, first - 1)
            theirs = other.logits.gather(1, columns).numpy()
            seen = torch.full_like(other.logits, -torch.inf).scatter(1, columns, torch.from_numpy(theirs))
        for row, token in enumerate(mine.tokens.tolist()):
            _note(report, twin, seen[row], token, (index, where, first + row, number))
        return mine.logits.astype(np.float32), theirs

    everywhere = whole.all_rows(states)
    for number, (mine, other) in enumerate(zip(everywhere, twin.all_rows(read), strict=True), 1):
        pairs[number].append(compare(mine, other, number, "all rows at once", number + 1))
    # From the end to the beginning: drafted rows overwrite those of the text that follow them.
    places = sorted({round((number + 1) * rows / _PLACES) for number in range(_PLACES)} - {0}, reverse=True)
    found: dict[int, list[tuple[Array, Array]]] = {number: [] for number in range(2, count + 1)}
    for true_rows in places:
        ours, theirs = whole.round(true_rows + 1), twin.round(read, true_rows + 1)
        theirs.draft([])
        given = everywhere[0].row(true_rows - 1)
        drafts = [int(given.tokens[0])]
        for number in range(2, count + 1):
            states_before = torch.from_numpy(given.states.astype(np.float32))
            given = ours.draft(drafts)
            other = theirs.draft(drafts, states_before)
            last = given.row(-1)
            found[number].append(compare(last, other, number, f"from row {true_rows - 1}", true_rows + number))
            drafts.append(int(last.tokens[0]))
    for number, each in found.items():
        pairs[number].append((np.concatenate([a for a, _ in each]), np.concatenate([b for _, b in each])))


def _read(
    reference: Reference | TwinReference, twin: TwinOfDrafter, text: Sequence[int], taps: Mapping[str, Stored]
) -> DraftedText:
    """Return what the twin reads of a text: what the bundle left, and keys and values of the reference, in float32."""
    states = twin.fused({port: torch.from_numpy(array[0].astype(np.float32)) for port, array in taps.items()})
    if not twin.spec.shared:
        return DraftedText(text, states)
    model = reference.run_text(text, ())
    return DraftedText(
        text,
        states,
        {
            owner: (torch.tensor(model.keys[owner])[None], torch.tensor(model.values[owner])[None])
            for owner in twin.spec.shared
        },
    )


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
    reference: Reference | TwinReference,
    twin: TwinOfDrafter,
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
    read = _read(reference, twin, tokens, run_for_drafter(model.graphs, tokens)[0])
    for length, proposals in source.rounds[:_ROUNDS]:
        after, drafts = twin.round(read, length), list[int]()
        for number, proposal in enumerate(proposals, 1):
            given = after.draft(drafts)
            where = (index, f"a round after {length - len(text)} new tokens", length + number - 1, number)
            _note(report, twin, given.logits[0], proposal.token, where, given.missed)
            drafts.append(proposal.token)


def chosen_scores(columns: torch.Tensor, scores: torch.Tensor, head_rows: int) -> tuple[Array, Array]:
    """Return the twin's scores of the groups that a bundle chose, and of the likeliest, best first, [rows, groups].

    They differ by little where groups are chosen that are as likely but for rounding.

    Args:
        columns: The rows of the head that the bundle computed, int64 [rows, n].
        scores: The twin's score of each group, [rows, centroids].
        head_rows: Rows of the head, in all groups.
    """
    size = head_rows // scores.shape[1]
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, columns // size, True)
    count = columns.shape[1] // size
    ours = scores.masked_fill(~is_chosen, -torch.inf).topk(count).values
    return ours.numpy(), scores.topk(count).values.numpy()


def _note(
    report: DrafterParity,
    twin: TwinOfDrafter,
    logits: torch.Tensor,
    ours: int,
    where: tuple[int, str, int, int],
    missed: torch.Tensor | None = None,
) -> None:
    """Compare one draft with the twin's logits [rows of the head]; those that ``missed`` [1, rows] are not computed."""
    report.compared += 1
    best = int((logits if missed is None else logits.masked_fill(missed[0] > 0, -torch.inf)).argmax())
    theirs = twin.head_ids.token(best)
    if ours != theirs:
        row = twin.head_ids.row(ours)
        gap = float("inf") if row is None else float(logits[best] - logits[row])
        if row is not None and missed is not None:
            gap += float(missed[0, row])
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
