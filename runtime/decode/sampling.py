"""From logits to a token: sampling options, sparse distributions, and the acceptance rule of speculative sampling.

For the decoding loops. Numpy only; knows neither models nor tokenizers. Logits are processed in the order and with the
semantics of transformers' ``generate`` (v5, ``_get_logits_processor``). An option at its neutral value is skipped:

====================  =========  ==================================================================================
option                neutral    what it does
====================  =========  ==================================================================================
repetition_penalty    1          divides positive logits of tokens seen in the prompt or the output, and multiplies
                                 the others (CTRL, arXiv 1909.05858, section 4.1); once per token, however often seen
temperature           1          divides the logits; 0 is greedy, takes the largest logit and ignores the options below
top_k                 0          keeps the k largest, and all that equal the k-th
top_p                 1          keeps the smallest set of most probable tokens with a sum >= p, at least one; among
                                 equals the lowest id goes in first (nucleus sampling, arXiv 1904.09751)
min_p                 0          keeps tokens with at least min_p times the probability of the most probable one
                                 (arXiv 2407.01082)
====================  =========  ==================================================================================

Dimensions: V rows of logits (vocabulary, or the rows of a trimmed head), n tokens in a distribution's support.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shortstack.graphs.arguments import is_between, is_whole
from shortstack.graphs.errors import ContractError, RequestError

Context: TypeAlias = Sequence[int] | AbstractSet[int] | NDArray[np.int64]

# Within these bounds float32 quotients of a model's logits stay finite; beyond them sampling is greedy or uniform.
_SMALLEST, _LARGEST = 1e-6, 1e6
_POSITIVE = f"a number from {_SMALLEST:g} to {_LARGEST:g}"
_FRACTION = "a number from 0 to 1"
# Below this, accept() rejects too rarely for any experiment to see, and the residual is rounding noise.
_NO_MASS = 1e-12
IDLE_WHEN_GREEDY = ("top_k", "top_p", "min_p", "seed")
"""Options that do nothing where the temperature is 0."""
_TOP_K_GROUP = 64
_NUCLEUS_STEP = 1 / 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens; the defaults are greedy decoding.

    Args:
        temperature: 0 for greedy, otherwise the divisor of the logits.
        top_k: Number of candidates kept, 0 for all.
        top_p: Probability mass kept, 1 for all.
        min_p: Smallest probability kept, as a fraction of the largest, 0 for all.
        repetition_penalty: Above 1 discourages tokens of the prompt and the output so far, below 1 encourages them.
        seed: Seed of the random generator, None for a fresh one.

    Raises:
        RequestError: An option is out of range; the message names all that are.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature_ok = is_between(self.temperature, _SMALLEST, _LARGEST) or is_between(self.temperature, 0, 0)
        checks = {
            "temperature": (temperature_ok, f"0 (greedy) or {_POSITIVE}"),
            "top_k": (is_whole(self.top_k, 0), "a whole number, 0 (off) or more"),
            "top_p": (is_between(self.top_p, 0, 1), f"{_FRACTION} (1 is off)"),
            "min_p": (is_between(self.min_p, 0, 1), f"{_FRACTION} (0 is off)"),
            "repetition_penalty": (
                is_between(self.repetition_penalty, _SMALLEST, _LARGEST),
                f"{_POSITIVE} (1 is off)",
            ),
            "seed": (self.seed is None or is_whole(self.seed, 0), "a whole number, 0 or more, or no seed"),
        }
        problems = [
            f"sampling option {name}: found {getattr(self, name)!r}, expected {expected}"
            for name, (valid, expected) in checks.items()
            if not valid
        ]
        if problems:
            raise RequestError("; ".join(problems))

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0

    @property
    def is_repeatable(self) -> bool:
        """Whether random draws come from a seed, so that nothing that uses them may depend on measured times."""
        return not self.is_greedy and self.seed is not None

    @property
    def needs_logits(self) -> bool:
        """Whether choosing a token takes logits, not just the graph's ``token`` output."""
        return not self.is_greedy or self.repetition_penalty != 1

    def generator(self) -> np.random.Generator:
        """Return a new random generator with this seed."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """A probability distribution over the tokens that have any probability, usually few of the vocabulary.

    Args:
        ids: int64[n], the tokens' ids in the full vocabulary, ascending.
        probs: float64[n], their probabilities, which sum to 1.
    """

    ids: NDArray[np.int64]
    probs: NDArray[np.float64]

    @classmethod
    def point(cls, token: int) -> Distribution:
        """Return the distribution of a token that is certain: greedy decoding, or a draft found by n-gram lookup."""
        return cls(np.array([token], dtype=np.int64), np.ones(1))

    def prob(self, token: int) -> float:
        """Return the probability of one token, 0 outside the support."""
        row = int(self.ids.searchsorted(token))
        return float(self.probs[row]) if row < self.ids.size and self.ids[row] == token else 0.0

    def probs_at(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the probabilities of several tokens, float64 in the shape of ``ids``."""
        rows = self._rows(ids)
        return np.where(self.ids[rows] == ids, self.probs[rows], 0.0)

    def sample(self, rng: np.random.Generator) -> int:
        """Draw a token: one uniform draw, inverted through the cumulative distribution."""
        draw = rng.random()
        if self.ids.size == 1:
            return int(self.ids[0])
        cumulative = self.probs.cumsum()
        # Scaled by the last entry, not by 1, so that rounding cannot move the draw past the end; "right" skips zeros.
        row = int(cumulative.searchsorted(draw * cumulative[-1], side="right"))
        return int(self.ids[min(row, self.ids.size - 1)])

    def _rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of each of ``ids`` that is in the support, and some valid row for any other."""
        last = self.ids.size - 1
        is_whole_vocabulary = self.ids[-1] == last  # ascending and distinct, so ids and rows are the same
        return np.minimum(ids if is_whole_vocabulary else self.ids.searchsorted(ids), last)


def distribution(
    logits: NDArray[np.floating[Any]],
    params: SamplingParams,
    context: Context,
    *,
    ids: NDArray[np.int64] | None = None,
) -> Distribution:
    """Return the distribution to sample the next token from.

    Args:
        logits: float[V], one row of a head's output.
        params: The sampling options. Greedy gives a one-point distribution; among equal logits the lowest id wins.
        context: Tokens of the prompt and the output so far, for the repetition penalty. Order and repeats do not
            matter. An int64 array (a view of a growing buffer) is fastest, since sequences are converted on each call.
        ids: int64[V], ascending: the vocabulary id of each row of a trimmed head; None if row and id are the same.

    Raises:
        ContractError: The logits are not one row with the shape of ``ids``, or the largest is NaN or infinite.
    """
    if logits.ndim != 1 or logits.size == 0 or (ids is not None and ids.shape != logits.shape):
        expected = "[V], at least one row" if ids is None else f"{list(ids.shape)}, one per id of the trimmed head"
        raise ContractError("shape of the logits", found=list(logits.shape), expected=expected)
    scores = logits.astype(np.float32, copy=False)
    if params.repetition_penalty != 1:
        scores = _penalised(scores, _context_rows(context, scores.size, ids), params.repetition_penalty)
    top_row = int(scores.argmax())  # the first of equals, or of NaNs
    peak = scores[top_row]
    if not math.isfinite(peak):
        raise not_finite("the largest logit", float(peak))
    if params.is_greedy:
        return Distribution.point(top_row if ids is None else int(ids[top_row]))

    rows, weights = _kept(scores, float(peak), params)
    weights /= weights.sum()
    return Distribution(rows if ids is None else ids[rows], weights)


def not_finite(what: str, found: float) -> ContractError:
    """Return the error of a head whose outputs are no numbers."""
    return ContractError(
        f"the model's output is not valid: {what}",
        found=found,
        expected="a finite number",
        remedy="check the bundle's files with --verify and its weights with `shortstack parity`, or export it again",
    )


def accept(p: Distribution, q: Distribution, token: int, rng: np.random.Generator) -> bool:
    """Decide whether to accept a drafted token, which happens with probability min(1, p(token) / q(token)).

    If :func:`residual` replaces a rejected token, the emitted token is distributed as ``p``, whatever ``q`` is:
    Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192, algorithm 1 and
    appendix A.1. Makes one uniform draw.

    Args:
        p: The full model's distribution at the position.
        q: The distribution that ``token`` was drawn from.
        token: The drafted token.
        rng: The random generator.
    """
    return rng.random() * q.prob(token) < p.prob(token)


def residual(p: Distribution, q: Distribution) -> Distribution:
    """Return the distribution to sample from after a rejection: max(0, p - q), normalised.

    See arXiv 2211.17192, section 2.3. Outside the support of ``p`` the difference is never positive, so the result's
    support is part of that of ``p``. If ``p`` equals ``q`` up to rounding, no mass is left, and ``p`` itself is
    returned. A rejection is then about as rare as that rounding is small.
    """
    if p.ids.size == q.ids.size and np.array_equal(p.ids, q.ids):
        difference = p.probs - q.probs
    elif p.ids.size < q.ids.size:
        difference = p.probs - q.probs_at(p.ids)
    else:  # look up the smaller support in the larger: a trimmed draft head makes this about three times faster
        rows = p._rows(q.ids)
        shared = p.ids[rows] == q.ids
        difference = p.probs.copy()
        difference[rows[shared]] -= q.probs[shared]
    np.maximum(difference, 0.0, out=difference)
    mass = difference.sum()
    if mass <= _NO_MASS:
        return p
    rows = np.flatnonzero(difference)
    return Distribution(p.ids[rows], difference[rows] / mass)


def _kept(
    scores: NDArray[np.float32], peak: float, params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the rows that top-k, top-p and min-p keep, ascending, and their probabilities divided by the largest."""
    rows: NDArray[np.int64] | None = None  # all
    if 0 < params.top_k < scores.size:
        rows = _top_k_rows(scores, params.top_k)
    if params.top_p < 1:
        # float32 over the whole vocabulary only selects; the kept rows are computed again in float64 below
        weights = _weights(scores if rows is None else scores[rows].astype(np.float64), peak, params.temperature)
        kept = _nucleus_rows(weights, params.top_p)
        rows = kept if rows is None else rows[kept]
    elif rows is None and params.min_p > 0:
        # a coarse cut of the vocabulary, looser than min_p by more than float32 rounding
        cut = peak + params.temperature * math.log(params.min_p)
        rows = np.flatnonzero(scores >= np.float32(cut - 1e-5 * (1 + abs(peak) + abs(cut))))
    if rows is None:
        return np.arange(scores.size), _weights(scores, peak, params.temperature).astype(np.float64)

    weights64 = _weights(scores[rows].astype(np.float64), peak, params.temperature)
    if params.min_p > 0:
        strong = weights64 >= params.min_p
        rows, weights64 = rows[strong], weights64[strong]
    return rows, weights64


def _weights(scores: NDArray[Any], peak: float, temperature: float) -> NDArray[Any]:
    """Return exp((scores - peak) / temperature) in the dtype of ``scores``: softmax before it is normalised."""
    weights = scores - peak
    weights /= temperature
    result: NDArray[Any] = np.exp(weights, out=weights)
    return result


def _penalised(scores: NDArray[np.float32], rows: NDArray[np.int64], penalty: float) -> NDArray[np.float32]:
    seen = scores[rows]
    scores = scores.copy()  # the caller's logits live in a bound output buffer
    scores[rows] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return scores


def _context_rows(context: Context, size: int, ids: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return the rows of the logits that belong to the context's tokens; tokens without a row are left out."""
    tokens: NDArray[np.int64] = (
        context if isinstance(context, np.ndarray) else np.fromiter(context, dtype=np.int64, count=len(context))
    )
    if ids is None:
        return tokens[(tokens >= 0) & (tokens < size)]
    rows = np.minimum(ids.searchsorted(tokens), size - 1)
    known: NDArray[np.bool_] = ids[rows] == tokens
    return rows[known]


def _top_k_rows(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the rows of the k largest scores and of all that equal the k-th, ascending; 0 < k < V.

    The k-th largest of the maxima of disjoint groups is a lower bound of the k-th largest score. So few candidates
    reach it that partitioning them is nearly free. In all, this takes half the time of partitioning the vocabulary
    (measured for V = 49152 and 128256 with AVX2, where numpy's partition is vectorised already).
    """
    groups = scores.size // _TOP_K_GROUP
    rows: NDArray[np.int64] | None = None
    candidates = scores
    if groups > k:
        # a group is a column: the maximum over axis 0 runs along memory
        maxima = scores[: groups * _TOP_K_GROUP].reshape(_TOP_K_GROUP, groups).max(axis=0)
        rows = np.flatnonzero(scores >= _kth_largest(maxima, k))
        candidates = scores[rows]
    kept = np.flatnonzero(candidates >= _kth_largest(candidates, k))
    return kept if rows is None else rows[kept]


def _kth_largest(values: NDArray[np.float32], k: int) -> np.float32:
    result: np.float32 = np.partition(values, values.size - k)[values.size - k]
    return result


def _nucleus_rows(weights: NDArray[Any], top_p: float) -> NDArray[np.int64]:
    """Return the rows of the fewest largest ``weights`` that make up a share >= top_p, ascending; the largest is 1.

    Sorts only the weights above a threshold, which is lowered until they hold enough mass.
    """
    needed = top_p * float(weights.sum(dtype=np.float64))
    threshold = _NUCLEUS_STEP
    while True:
        rows = np.flatnonzero(weights >= threshold)
        candidates = weights[rows].astype(np.float64)
        if threshold == 0 or candidates.sum() >= needed:
            break
        threshold = threshold * _NUCLEUS_STEP if threshold > np.finfo(np.float32).tiny else 0.0
    order = np.argsort(-candidates, kind="stable")  # among equals, the lowest row first
    count = 1 + int(candidates[order].cumsum().searchsorted(needed, side="left"))
    return np.sort(rows[order[:count]])
