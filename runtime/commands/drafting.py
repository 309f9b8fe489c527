"""The options that say what drafts and how much, gathered into one value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import click

from shortstack.command_options import gather
from shortstack.runtime.decode.draft_length import USUAL_DRAFTS, DraftPolicy
from shortstack.runtime.decode.drafters import FromExit
from shortstack.runtime.decode.hybrid import FromHybrid
from shortstack.runtime.decode.lookup import LOOKUP_DRAFTS, MOST_LOOKED_UP, FromLookup
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.text_index import read_texts
from shortstack.runtime.decode.trained_drafter import FromDrafter
from shortstack.runtime.request import Speculate
from shortstack.runtime.text.tokenizer import Tokenizer

DraftsFrom = Literal["auto", "exit", "drafter", "lookup"]
"""Where drafts come from."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """How self-speculation drafts."""

    draft: DraftsFrom | None
    draft_texts: Path | None
    draft_tokens: int | None
    confidence: float
    fixed_draft: bool
    bonus: bool

    def policy(self, sampling: SamplingParams) -> DraftPolicy:
        """Return the draft policy."""
        # One row emits one token, as a plain step does: an adaptive rule would never choose it.
        is_lookup = self.draft == "lookup"
        has_bonus = self.bonus or is_lookup
        may_adapt = not self.fixed_draft and not sampling.is_repeatable
        most = self.draft_tokens
        if most is None:
            most = (MOST_LOOKED_UP if may_adapt else LOOKUP_DRAFTS) if is_lookup else USUAL_DRAFTS
        is_adaptive = may_adapt and (most + has_bonus > 1 or self.draft in (None, "auto"))
        looked_up = None if is_lookup else self.draft_tokens or MOST_LOOKED_UP
        return DraftPolicy(
            most, self.confidence, is_adaptive=is_adaptive, has_bonus=has_bonus, max_lookup_tokens=looked_up
        )

    def speculate(self, exit_layers: tuple[int, ...], sampling: SamplingParams, tokenizer: Tokenizer) -> Speculate:
        """Return the strategy that drafts so.

        Args:
            exit_layers: The exits that were named.
            sampling: How tokens are chosen.
            tokenizer: The bundle's.

        Raises:
            RequestError: The texts to look drafts up in cannot be read.
        """
        policy, layer = self.policy(sampling), min(exit_layers, default=None)
        texts = None if self.draft_texts is None else read_texts(self.draft_texts, tokenizer)
        match self.draft:
            case "lookup":
                return Speculate(None, policy, FromLookup(texts))
            case "exit":
                return Speculate(None, policy, FromExit(layer))
            case "drafter":
                return Speculate(None, policy, FromDrafter())
        return Speculate(layer, policy) if texts is None else Speculate(None, policy, FromHybrid(layer, texts))


drafting_options = gather(
    Drafting,
    "drafting",
    click.option(
        "--draft",
        type=click.Choice(get_args(DraftsFrom)),
        help="What drafts: an exit, the bundle's trained drafter, or lookup of what followed the same words earlier in "
        "the text, which needs neither. Auto takes in each round what pays.  [default: auto]",
    ),
    click.option(
        "--draft-texts",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Look drafts up in this text too, or in those of a jsonl file, such as earlier answers.",
    ),
    click.option(
        "--draft-tokens",
        "-k",
        type=int,
        help=f"Most tokens per draft.  [default: {USUAL_DRAFTS}; looked up {MOST_LOOKED_UP}]",
    ),
    click.option(
        "--confidence",
        type=float,
        default=0.0,
        metavar="P",
        help="End a draft after a token whose probability is below P.  [default: 0, never]",
    ),
    click.option(
        "--fixed-draft",
        is_flag=True,
        help="Always draft that many, instead of what pays by measured costs; then an exit drafts alone.",
    ),
    click.option(
        "--bonus",
        is_flag=True,
        help="Give the last drafted token a row of its own, for one more token where all are accepted.",
    ),
    title="Drafting (self-speculative)",
)
