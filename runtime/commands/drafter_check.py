"""Whether a bundle's trained drafter runs on this machine, and leaves the output what plain decoding gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shortstack.graphs import names
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.decode.trained_drafter import FromDrafter
from shortstack.runtime.engine.whole_drafter import fused
from shortstack.runtime.engine.whole_drafters import whole_drafter
from shortstack.runtime.engine.whole_text import run_for_drafter
from shortstack.runtime.model import Model
from shortstack.runtime.request import Speculate

_ROWS = 6
_NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class DrafterCheck:
    """What a drafter does here.

    Attributes:
        graphs: Its files, which could be opened and have the inputs and outputs of the contract.
        is_finite: Rows of random states give probabilities and states that are numbers.
        has_valid_tokens: They give token ids of the model.
        same_tokens: A text decoded with its drafts is that of plain decoding.
        drafted: Tokens that it drafted of this text.
        accepted: Those of them that the model accepted.
    """

    graphs: tuple[str, ...]
    is_finite: bool
    has_valid_tokens: bool
    same_tokens: bool
    drafted: int
    accepted: int

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return self.is_finite and self.has_valid_tokens and self.same_tokens


def check_drafter(model: Model, tokens: Sequence[int]) -> DrafterCheck | None:
    """Run a bundle's drafter on random rows, then decode a text with it; None for a bundle without one.

    Args:
        model: The bundle; its generation before is over.
        tokens: A text.

    Raises:
        BundleError: One of its graphs cannot be opened or run.
        ContractError: A graph does not match the contract.
    """
    manifest = model.bundle.manifest
    drafter, graphs = manifest.plan.drafter, model.graphs.drafter
    if drafter is None or graphs is None:
        return None
    rng = np.random.default_rng(0)
    ports = [names.feature(depth) for depth in drafter.features] or [names.DRAFT_STATE]
    shape = (1, _ROWS, manifest.spec.hidden_size)
    states = fused(graphs, {port: rng.standard_normal(shape).astype(manifest.dtype) for port in ports})
    given = rng.integers(0, manifest.spec.vocab_size, min(_ROWS + 1, manifest.max_length)).tolist()
    whole = whole_drafter(graphs, given, run_for_drafter(model.graphs, given)[1], 0)
    runs = whole.all_rows(states)
    numbers = [states, *(x for run in runs for x in (run.top_probs, run.logits, run.states))]
    ids = [run.tokens for run in runs] + [run.logit_ids for run in runs if run.logit_ids is not None]
    is_finite = all(bool(np.isfinite(x).all()) for x in numbers)
    in_range = all(bool(((x >= 0) & (x < manifest.spec.vocab_size)).all()) for x in ids)
    prompt = tokens[: max(1, min(len(tokens), model.cache.max_length - _NEW_TOKENS))]
    plain = model.generate(prompt, max_new_tokens=_NEW_TOKENS, ignore_eos=True)
    wanted = Speculate(draft=DraftPolicy(), source=FromDrafter())
    drafted = model.generate(prompt, strategy=wanted, max_new_tokens=_NEW_TOKENS, ignore_eos=True)
    return DrafterCheck(
        tuple(sorted(manifest.drafter_contracts())),
        is_finite,
        in_range,
        plain.tokens == drafted.tokens,
        drafted.stats.drafted,
        drafted.stats.accepted,
    )
