"""What the page shows, as plain data: tokens with their depths, both generations' figures, the curve of thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from statistics import median

from shortstack.graphs.manifest import Manifest
from shortstack.runtime.calibration.profile import Point, Profile
from shortstack.runtime.commands.agreement import Agreement, agreement_of
from shortstack.runtime.commands.exit_report.sweep import SweepPoint, varied_bound
from shortstack.runtime.commands.show import FinishedRun
from shortstack.runtime.commands.show_exits import DepthCount, bucket_of, count_depths
from shortstack.runtime.decode.stream import Token
from shortstack.runtime.early_exit.policy import ExitPolicy

BUCKETS = 6
FINAL = "final"


@dataclass(frozen=True, slots=True)
class ReportToken:
    """One token.

    Attributes:
        position: From 0.
        token: As it was streamed.
        css: Colour class of its depth.
        is_shared: The other generation has it, too, once the two are aligned.
    """

    position: int
    token: Token
    css: str
    is_shared: bool


@dataclass(frozen=True, slots=True)
class ExitReport:
    """Everything on the page.

    Attributes:
        source_name: The checkpoint's name.
        prompt: As it was asked.
        policy: How tokens left.
        exit_layers: The exits in use, ascending.
        layers: Layers of the whole model.
        early: The generation with early exit.
        plain: The same request, decoded plainly.
        early_tokens_per_s: Decoding speed, median of the runs; for the ratio, they took turns.
        plain_tokens_per_s: Likewise.
        speedup: Speed over that of plain decoding, median of the turns; 0 where there was nothing to measure.
        runs: Turns.
        agreement: Between the two.
        sweep: Other thresholds, from the fewest early tokens to the most; empty where none was tried.
        profile: The calibration that the policy comes from.
    """

    source_name: str
    prompt: str
    policy: ExitPolicy
    exit_layers: tuple[int, ...]
    layers: int
    early: FinishedRun
    plain: FinishedRun
    early_tokens_per_s: float
    plain_tokens_per_s: float
    speedup: float
    runs: int
    agreement: Agreement
    sweep: tuple[SweepPoint, ...] = ()
    profile: Profile | None = None

    @property
    def measure(self) -> str:
        """What the threshold of the sweep is one of."""
        bound = varied_bound(self.policy.criterion)
        return "" if bound is None else bound.measure

    @property
    def curve(self) -> tuple[Point, ...]:
        """The calibration's curve over all its prompts, if there is one."""
        return () if self.profile is None else self.profile.curve

    @property
    def counts(self) -> list[DepthCount]:
        """Tokens by depth, shallow first; depths without a token included."""
        found = {count.depth: count for count in count_depths(self.early.tokens)}
        return [found.get(depth, DepthCount(depth, 0, 0.0)) for depth in (*self.exit_layers, self.layers)]

    @property
    def tokens(self) -> list[ReportToken]:
        """The tokens of early exit."""
        return self._marked(self.early.tokens, self.plain.token_ids)

    @property
    def plain_tokens(self) -> list[ReportToken]:
        """The tokens of plain decoding."""
        return self._marked(self.plain.tokens, self.early.token_ids)

    def css(self, depth: int) -> str:
        """Return the colour class of a depth."""
        bucket = bucket_of(depth, self.exit_layers, BUCKETS)
        return FINAL if bucket is None else f"d{bucket}"

    def _marked(self, tokens: Sequence[Token], others: Sequence[int]) -> list[ReportToken]:
        ids = [token.id for token in tokens]
        blocks = SequenceMatcher(None, ids, others, autojunk=False).get_matching_blocks()
        shared = {position for block in blocks for position in range(block.a, block.a + block.size)}
        return [
            ReportToken(position, token, self.css(token.exit_layer), position in shared)
            for position, token in enumerate(tokens)
        ]


def build_report(
    manifest: Manifest,
    prompt: str,
    policy: ExitPolicy,
    early: Sequence[FinishedRun],
    plain: Sequence[FinishedRun],
    *,
    sweep: tuple[SweepPoint, ...] = (),
    profile: Profile | None = None,
) -> ExitReport:
    """Gather a report.

    Args:
        manifest: Of the bundle.
        prompt: As it was asked.
        policy: How tokens left.
        early: Runs of the request with early exit, the one to show first.
        plain: Runs of the same request, decoded plainly; as many, which took turns with the others.
        sweep: Other thresholds.
        profile: The calibration that the policy comes from.
    """
    early_speeds = [one.stats.tokens_per_s for one in early]
    plain_speeds = [one.stats.tokens_per_s for one in plain]
    ratios = [a / b if b else 0.0 for a, b in zip(early_speeds, plain_speeds, strict=True)]
    return ExitReport(
        source_name=Path(manifest.source_name).name or manifest.source_name,
        prompt=prompt,
        policy=policy,
        exit_layers=policy.exits_in(manifest.plan),
        layers=manifest.spec.num_hidden_layers,
        early=early[0],
        plain=plain[0],
        early_tokens_per_s=median(early_speeds),
        plain_tokens_per_s=median(plain_speeds),
        speedup=median(ratios),
        runs=len(ratios),
        agreement=agreement_of(early[0].token_ids, plain[0].token_ids),
        sweep=sweep,
        profile=profile,
    )
