"""The options of `shortstack generate` by what they are for, each group gathered into one value.

Options that would do nothing are refused: :func:`refuse_options_without_effect` knows which go with which strategy.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from shortstack.command_options import gather, refuse_given
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import RequestError
from shortstack.runtime.commands.drafting import Drafting
from shortstack.runtime.decode.sampling import IDLE_WHEN_GREEDY, SamplingParams
from shortstack.runtime.early_exit.expression import EXAMPLE, parse_criterion
from shortstack.runtime.early_exit.policy import ROLLBACK_BELOW, ExitPolicy, KVPolicy, Verify
from shortstack.runtime.engine.session import Placement
from shortstack.runtime.request import StrategyName

if TYPE_CHECKING:
    from shortstack.runtime.calibration.profile import Profile


@dataclass(frozen=True, slots=True)
class Exiting:
    """How tokens leave early."""

    exit_when: str | None
    profile: Path | None
    verify_exits: Verify
    rollback_below: float | None
    kv_policy: KVPolicy
    max_pending: int | None
    prefill_exit: bool
    upper_providers: tuple[str, ...]
    upper_threads: int | None

    @property
    def is_asked(self) -> bool:
        """Whether it is said when a token leaves."""
        return self.exit_when is not None or self.profile is not None

    @property
    def upper(self) -> Placement | None:
        """Where the upper segments compute; None: where the lowest does."""
        if not self.upper_providers and self.upper_threads is None:
            return None
        return Placement(self.upper_providers or ("cpu",), self.upper_threads)

    def check(self) -> None:
        """Refuse what can be refused before a bundle is opened.

        Raises:
            RequestError: Nothing says when tokens leave, the expression cannot be read, or options do not go together.
        """
        if self.exit_when is not None:
            self._completed(ExitPolicy(parse_criterion(self.exit_when)))
        elif self.profile is None:
            raise RequestError(
                "early exit needs to know when a token may leave",
                remedy=f"add --exit-when '{EXAMPLE}', or --profile with what `shortstack calibrate` found",
            )

    def load_profile(self, bundle: Bundle) -> Profile | None:
        """Return the profile that was given, if one was.

        Raises:
            RequestError: It cannot be read, or is of other weights.
        """
        if self.profile is None:
            return None
        from shortstack.runtime.calibration.profile import load_profile

        return load_profile(self.profile, bundle)

    def policy(self, bundle: Bundle, exit_layers: tuple[int, ...], profile: Profile | None) -> ExitPolicy:
        """Return the exit policy, which this bundle can follow.

        Raises:
            RequestError: The bundle lacks an exit or what the criterion needs, or options do not go together.
        """
        if profile is not None:
            policy = profile.policy()
        else:
            assert self.exit_when is not None
            policy = ExitPolicy(parse_criterion(self.exit_when), exit_layers or None)
        policy = self._completed(policy)
        policy.exits_in(bundle.manifest.plan)
        return policy

    def _completed(self, policy: ExitPolicy) -> ExitPolicy:
        return replace(
            policy,
            verify=self.verify_exits,
            rollback_below=self.rollback_below,
            kv_policy=self.kv_policy,
            max_pending=self.max_pending,
            prefill_exit=self.prefill_exit,
        )


def unchecked_exits(bundle: Bundle, policy: ExitPolicy) -> str | None:
    """Return a warning if tokens may leave unchecked at exits that nothing shows to be trained; None if there is none.

    An exit without weights of its own predicts well only in a model that was trained for it, as by LayerSkip.
    """
    plan = bundle.manifest.plan
    used = policy.exits_in(plan)
    plain = [str(each.exit_layer) for each in plan.exits if each.exit_layer in used and each.is_plain]
    if policy.verify != "none" or str(policy.criterion) == "never" or not plain:
        return None
    return (
        f"nothing checks the tokens that leave after {', '.join(plain)} layers, where the exit has no weights of its "
        "own. Unless this model was trained to exit there, the text will be poor: look with --compare, add "
        "--verify-exits exact, find a safe threshold with `shortstack calibrate`, or train an exit (docs/training.md)"
    )


@dataclass(frozen=True, slots=True)
class Showing:
    """What is shown besides the text."""

    show_exits: bool
    report: Path | None
    no_sweep: bool
    as_json: bool


strategy_option = click.option(
    "--strategy", type=click.Choice(get_args(StrategyName)), help="How to decode.  [default: plain]"
)
exit_layers_option = click.option(
    "--exit-layer",
    "-e",
    "exit_layers",
    type=int,
    multiple=True,
    metavar="E",
    help="The exit that drafts [default: the lowest]. With early exit: where tokens may leave; may be given more "
    "than once [default: all].",
)
max_new_tokens_option = click.option(
    "--max-new-tokens", "-n", type=int, default=128, show_default=True, help="Most tokens to generate."
)
stop_option = click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End before TEXT, which may be a special token's; may be given more than once.",
)
exiting_options = gather(
    Exiting,
    "exiting",
    click.option("--exit-when", metavar="RULE", help=f"When a token leaves early, such as '{EXAMPLE}'."),
    click.option(
        "--profile",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Leave early as `shortstack calibrate` found it safe.",
    ),
    click.option(
        "--verify-exits",
        type=click.Choice(get_args(Verify)),
        default="none",
        show_default=True,
        help="Whether the whole model checks the tokens that left early.",
    ),
    click.option(
        "--rollback-below",
        type=float,
        metavar="P",
        help="With --verify-exits rollback: take back tokens that the whole model finds less likely than P.  "
        f"[default: {ROLLBACK_BELOW}]",
    ),
    click.option(
        "--kv-policy",
        type=click.Choice(get_args(KVPolicy)),
        default="flush",
        show_default=True,
        help="How the layers above the exit catch up with tokens that left early.",
    ),
    click.option(
        "--max-pending",
        type=int,
        metavar="N",
        help="How many such tokens may wait.  [default: from measured costs]",
    ),
    click.option("--prefill-exit", is_flag=True, help="Tokens of the prompt may leave early, too."),
    click.option(
        "--upper-provider", "upper_providers", multiple=True, help="Execution provider of all but the lowest segment."
    ),
    click.option("--upper-threads", type=int, help="Threads of their own for all but the lowest segment."),
    title="Early exit",
)
sampling_options = gather(
    SamplingParams,
    "sampling",
    click.option(
        "--temperature", type=float, default=0.0, show_default=True, help="0 is greedy: the most likely token."
    ),
    click.option("--top-k", type=int, default=0, help="Sample from the K most likely tokens.  [default: 0, all]"),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        help="Sample from the smallest set with this probability.  [default: 1, all]",
    ),
    click.option("--min-p", type=float, default=0.0, help="Drop tokens less likely than this share of the top token."),
    click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 makes used tokens less likely."),
    click.option("--seed", type=int, help="Makes sampling repeatable; implies --fixed-draft."),
    title="Sampling",
)
showing_options = gather(
    Showing,
    "showing",
    click.option("--show-exits", is_flag=True, help="Show after how many layers each token was decided."),
    click.option(
        "--report",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Also compare with plain decoding, and draw early exit on one page that needs no network.",
    ),
    click.option("--no-sweep", is_flag=True, help="With --report: do not try other thresholds."),
    click.option("--json", "as_json", is_flag=True, help="Print text, token ids and statistics as JSON."),
    title="Output",
)


def refuse_options_without_effect(
    strategy: StrategyName | None,
    compare: bool | None,
    exit_layers: tuple[int, ...],
    drafting: Drafting,
    exiting: Exiting,
    sampling_temperature: float,
    showing: Showing,
) -> None:
    """Refuse options that were given on the command line and would do nothing.

    Args:
        strategy: The one that was asked for.
        compare: Whether every strategy runs; None where the command has no ``--compare``.
        exit_layers: The exits that were named.
        drafting: How drafts are made.
        exiting: When tokens leave early.
        sampling_temperature: 0 is greedy.
        showing: What is shown.

    Raises:
        RequestError: There are some; names them and what to do.
    """
    or_compare = "" if compare is None else ", or add --compare"
    drafts = compare or strategy == "self-speculative"
    exits = strategy == "early-exit" or (compare and exiting.is_asked)
    exit_names = tuple(field.name for field in fields(Exiting))
    draft_names = tuple(field.name for field in fields(Drafting))
    if compare and strategy is not None:
        raise RequestError("--compare runs every strategy", remedy="drop --strategy")
    if not drafts and not exits:
        remedy = f"add --strategy self-speculative{or_compare}"
        refuse_given(("exit_layers", *draft_names), "plain decoding drafts nothing", remedy)
    if not drafts:
        refuse_given(draft_names, f"{strategy or 'plain'} decoding does not draft", f"drop it{or_compare}")
    if not exits and not compare:
        refuse_given(exit_names, "no token leaves early", "add --strategy early-exit")
    elif not exits:
        refuse_given(exit_names, "nothing says when tokens leave early", f"add --exit-when '{EXAMPLE}'")
    if drafting.draft in ("drafter", "lookup") and not exits:
        refuse_given(("exit_layers",), "no exit drafts", "leave it out, or use --draft exit")
    if drafting.draft in ("exit", "drafter") or (drafting.draft is None and drafting.fixed_draft):
        refuse_given(("draft_texts",), "nothing is looked up", "add --draft lookup")
    if len(exit_layers) > 1 and not exits:
        raise RequestError(
            "--exit-layer: one exit drafts", found=", ".join(map(str, exit_layers)), remedy="give it once"
        )
    if exiting.profile is not None:
        refuse_given(
            ("exit_when", "exit_layers", "prefill_exit"), "the profile says when tokens leave", "drop it, or --profile"
        )
    if showing.report is None:
        refuse_given(("no_sweep",), "without a report nothing is swept", "add --report FILE")
    elif not exits:
        refuse_given(("report",), "no token leaves early", f"add --strategy early-exit --exit-when '{EXAMPLE}'")
    elif not showing.report.parent.is_dir() or showing.report.is_dir():
        raise RequestError(f"--report {showing.report} cannot be written", remedy="choose another file")
    elif sampling_temperature != 0:
        raise RequestError(
            "--report compares greedy decoding", found=f"temperature {sampling_temperature}", remedy="drop one of them"
        )
    if sampling_temperature == 0:
        refuse_given(IDLE_WHEN_GREEDY, "a temperature of 0 is greedy", "add --temperature T with T above 0")
