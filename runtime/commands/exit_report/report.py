"""What the page shows, as plain data: tokens with their depths, both generations' figures, the curve of thresholds.

A setting has one speed, the median over its runs; every speed-up is a ratio of two such medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from shortstack.graphs.manifest import Manifest
from shortstack.runtime.calibration.profile import Point, Profile
from shortstack.runtime.commands.agreement import Agreement, agreement_of
from shortstack.runtime.commands.exit_report.circumstances import Circumstances, find_circumstances
from shortstack.runtime.commands.exit_report.spread import Spread
from shortstack.runtime.commands.exit_report.sweep import SweepPoint, varied_bound, with_own
from shortstack.runtime.commands.show import FinishedRun
from shortstack.runtime.commands.show_exits import DepthCount, bucket_of, count_depths
from shortstack.runtime.decode.step import Stats
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
        is_shared: The other generation has it too, once the two are aligned.
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
        early: Runs with early exit; the first is the one that is shown. All give the same tokens.
        plain: Runs of the same request, decoded plainly; as many, which took turns with the others.
        agreement: Between the two.
        circumstances: When, where and with what it was measured.
        sweep: This and other thresholds, from the fewest early tokens to the most; empty where none was tried.
        profile: The calibration that the policy comes from.
    """

    source_name: str
    prompt: str
    policy: ExitPolicy
    exit_layers: tuple[int, ...]
    layers: int
    early: tuple[FinishedRun, ...]
    plain: tuple[FinishedRun, ...]
    agreement: Agreement
    circumstances: Circumstances
    sweep: tuple[SweepPoint, ...] = ()
    profile: Profile | None = None

    @property
    def shown(self) -> FinishedRun:
        """The generation with early exit that is shown."""
        return self.early[0]

    @property
    def early_speed(self) -> Spread:
        """Decoding speed with early exit, tokens/s."""
        return spread_of(self.early, lambda stats: stats.tokens_per_s)

    @property
    def plain_speed(self) -> Spread:
        """Decoding speed of plain decoding, tokens/s."""
        return spread_of(self.plain, lambda stats: stats.tokens_per_s)

    @property
    def speed_up(self) -> float:
        """The ratio of the two medians; 0 where there was nothing to measure."""
        return self.times_plain(self.early_speed).median

    @property
    def turns(self) -> Spread:
        """The ratio of each turn, a run with early exit and a plain one; their range holds :attr:`speed_up`."""
        pairs = zip(self.early_speed.values, self.plain_speed.values, strict=True)
        return Spread.of(early / plain if plain else 0.0 for early, plain in pairs)

    def times_plain(self, speed: Spread) -> Spread:
        """Return a speed in units of the median of plain decoding."""
        return speed.over(self.plain_speed.median)

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
        found = {count.depth: count for count in count_depths(self.shown.tokens)}
        return [found.get(depth, DepthCount(depth, 0, 0.0)) for depth in (*self.exit_layers, self.layers)]

    @property
    def tokens(self) -> list[ReportToken]:
        """The tokens of early exit."""
        return self._marked(self.shown.tokens, self.plain[0].token_ids)

    @property
    def plain_tokens(self) -> list[ReportToken]:
        """The tokens of plain decoding."""
        return self._marked(self.plain[0].tokens, self.shown.token_ids)

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


def spread_of(runs: Sequence[FinishedRun], figure: Callable[[Stats], float]) -> Spread:
    """Return one figure of each run."""
    return Spread.of(figure(run.stats) for run in runs)


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
        sweep: Other thresholds; the request's own comes from the runs.
        profile: The calibration that the policy comes from.
    """
    agreement = agreement_of(early[0].token_ids, plain[0].token_ids)
    return ExitReport(
        source_name=Path(manifest.source_name).name or manifest.source_name,
        prompt=prompt,
        policy=policy,
        exit_layers=policy.exits_in(manifest.plan),
        layers=manifest.spec.num_hidden_layers,
        early=tuple(early),
        plain=tuple(plain),
        agreement=agreement,
        circumstances=find_circumstances(manifest),
        sweep=_with_shown(policy, sweep, early, agreement),
        profile=profile,
    )


def _with_shown(
    policy: ExitPolicy, others: tuple[SweepPoint, ...], early: Sequence[FinishedRun], agreement: Agreement
) -> tuple[SweepPoint, ...]:
    bound = varied_bound(policy.criterion)
    if bound is None:
        return ()
    own = SweepPoint(
        threshold=bound.threshold.value,
        similarity=agreement.similarity,
        mean_exit_layer=early[0].stats.mean_exit_layer,
        exited_share=early[0].exited_share,
        tokens_per_s=spread_of(early, lambda stats: stats.tokens_per_s),
        is_chosen=True,
    )
    return with_own(policy, others, own)
