"""`shortstack generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import click

from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_map import iterated_groups
from shortstack.runtime.commands.agreement import Agreement, agreement_of
from shortstack.runtime.commands.options import (
    Drafting,
    Exiting,
    Showing,
    drafting_options,
    exiting_options,
    refuse_options_without_effect,
    sampling_options,
    showing_options,
)
from shortstack.runtime.commands.show import FinishedRun, print_comparison, print_summary, show_stream
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.engine.passes import parse_passes
from shortstack.runtime.model import Model, Prompt, Strategy, load

if TYPE_CHECKING:
    from shortstack.runtime.calibration.profile import Profile

_TURNS = 3  # of early exit and plain decoding for a report, since times vary
_INTERRUPTED = 130  # 128 + SIGINT, what shells report


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate; how is said when it starts."""

    model: Model
    prompt: Prompt
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    draft_exit: int | None
    draft: DraftPolicy
    exits: ExitPolicy | None

    def start(self, strategy: Strategy, exits: ExitPolicy | None = None) -> Stream:
        """Start generating; ``exits`` instead of the request's own policy, for early exit."""
        is_early = strategy == "early-exit"
        return self.model.stream(
            self.prompt,
            max_new_tokens=self.max_new_tokens,
            strategy=strategy,
            exit_layer=None if is_early else self.draft_exit,
            draft=self.draft,
            exits=(exits or self.exits) if is_early else None,
            sampling=self.sampling,
            stop=self.stop,
        )

    def show(
        self, strategy: Strategy, *, is_quiet: bool, has_title: bool = False, shows_exits: bool = False
    ) -> FinishedRun:
        """Generate to the end and show it."""
        return show_stream(
            strategy,
            self.start(strategy),
            self.model.bundle.manifest.spec.num_hidden_layers,
            exit_layers=self.model.exit_layers,
            is_quiet=is_quiet,
            has_title=has_title,
            shows_exits=shows_exits,
        )


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("prompt")
@click.option("--strategy", type=click.Choice(get_args(Strategy)), help="How to decode.  [default: plain]")
@click.option("--compare", is_flag=True, help="Decode plainly, self-speculatively and as --exit-when says; compare.")
@click.option("--max-new-tokens", "-n", type=int, default=128, show_default=True)
@click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without the chat template.")
@click.option("--system", help="System message of the chat.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the text before TEXT; may be given more than once.")
@click.option(
    "--exit-layer",
    "-e",
    "exit_layers",
    type=int,
    multiple=True,
    metavar="E",
    help="The exit that drafts [default: the lowest]; or those where tokens leave, several times [default: all].",
)
@drafting_options
@exiting_options
@sampling_options
@click.option("--provider", "providers", multiple=True, help="Execution provider: cpu, cuda, or onnxruntime's name.")
@click.option("--threads", type=int, help="Threads.  [default: all usable cores]")
@click.option(
    "--prefill-passes",
    metavar="N|converged|sequential",
    help="How often a prompt runs through layers that use K,V of layers above them.  [default: converged]",
)
@click.option("--verify", is_flag=True, help="Check the sha256 of every file first.")
@showing_options
def generate(
    bundle: str,
    prompt: str,
    strategy: Strategy | None,
    compare: bool,
    max_new_tokens: int,
    raw: bool,
    system: str | None,
    stop: tuple[str, ...],
    exit_layers: tuple[int, ...],
    drafting: Drafting,
    exiting: Exiting,
    sampling: SamplingParams,
    providers: tuple[str, ...],
    threads: int | None,
    prefill_passes: str | None,
    verify: bool,
    showing: Showing,
) -> None:
    """Continue PROMPT (- reads it from standard input) with the model in BUNDLE."""
    refuse_options_without_effect(strategy, compare, exit_layers, exiting, sampling.temperature, showing)
    strategies = _strategies(strategy, compare, exiting)
    if "early-exit" in strategies:
        exiting.check()
    draft = drafting.policy(sampling)
    model = load(
        bundle,
        providers=providers or None,
        threads=threads,
        upper=exiting.upper,
        prefill_passes=parse_passes(prefill_passes or "converged"),
        verify_hashes=verify,
    )
    if prefill_passes is not None and not iterated_groups(model.bundle.manifest.spec.kv_map):
        raise RequestError(
            "--prefill-passes would have no effect: no layer of this bundle uses keys and values of a layer above it",
            remedy="leave it out",
        )
    profile = exiting.load_profile(model)
    policy = exiting.policy(model, exit_layers, profile) if "early-exit" in strategies else None
    if profile is not None and profile.threshold is None:
        click.echo(f"note: {exiting.profile} found no safe threshold, so no token leaves early", err=True)
    text = sys.stdin.read() if prompt == "-" else prompt
    asked = _as_prompt(model, text, raw, system)
    draft_exit = min(exit_layers, default=None)
    request = Request(model, asked, max_new_tokens, sampling, stop, draft_exit, draft, policy)
    shown: list[FinishedRun] = []
    for name in strategies:
        shown.append(request.show(name, is_quiet=showing.as_json, has_title=compare, shows_exits=showing.show_exits))
        if shown[-1].is_cancelled:
            break
    is_complete = not shown[-1].is_cancelled
    if showing.report is not None and is_complete:
        _report(request, shown, text, profile, showing)
    agreement = _agreement(shown) if sampling.is_greedy and is_complete else None
    if showing.as_json:
        results = [_as_json(one, showing, agreement) for one in shown]
        click.echo(json.dumps(results if compare else results[0]))
    elif compare and is_complete:
        print_comparison(shown, is_greedy=sampling.is_greedy, is_lossy=_is_lossy(policy), agreement=agreement)
    else:
        print_summary(shown[-1], shows_exits=showing.show_exits)
    if not is_complete:
        sys.exit(_INTERRUPTED)
    lossless = [one for one in shown if one.strategy != "early-exit" or not _is_lossy(policy)]
    if compare and sampling.is_greedy and len({one.token_ids for one in lossless}) > 1:
        sys.exit(1)


def _strategies(strategy: Strategy | None, compare: bool, exiting: Exiting) -> tuple[Strategy, ...]:
    if not compare:
        return (strategy or "plain",)
    return ("plain", "self-speculative", "early-exit") if exiting.is_asked else ("plain", "self-speculative")


def _is_lossy(policy: ExitPolicy | None) -> bool:
    """Whether early exit may say something else than plain decoding."""
    return policy is not None and policy.verify != "exact"


def _agreement(shown: list[FinishedRun]) -> Agreement | None:
    """Return how far early exit says what plain decoding says, where both ran."""
    tokens = {one.strategy: one.token_ids for one in shown}
    if "early-exit" not in tokens or "plain" not in tokens:
        return None
    return agreement_of(tokens["early-exit"], tokens["plain"])


def _as_json(shown: FinishedRun, showing: Showing, agreement: Agreement | None) -> dict[str, Any]:
    data = shown.to_json(with_exits=showing.show_exits)
    if agreement is not None and shown.strategy == "early-exit":
        data["agreement"] = agreement.to_json()
    return data


def _report(request: Request, shown: list[FinishedRun], prompt: str, profile: Profile | None, showing: Showing) -> None:
    """Draw the page, running what it needs besides what was shown; early exit and plain decoding take turns."""
    from shortstack.runtime.commands.exit_report.page import write_page
    from shortstack.runtime.commands.exit_report.report import build_report
    from shortstack.runtime.commands.exit_report.sweep import sweep

    assert showing.report is not None
    policy = request.exits
    assert policy is not None
    manifest = request.model.bundle.manifest
    early = [one for one in shown if one.strategy == "early-exit"]
    click.echo("decoding for the report ...", err=True)
    plain = [one for one in shown if one.strategy == "plain"]
    while len(plain) < _TURNS:
        if len(early) == len(plain):
            early.append(_again(request, "early-exit"))
        plain.append(_again(request, "plain"))
    run = partial(request.start, "early-exit")
    layers = manifest.spec.num_hidden_layers
    points = () if showing.no_sweep else sweep(policy, plain[0].token_ids, layers, run)
    report = build_report(manifest, prompt, policy, early, plain, sweep=points, profile=profile)
    write_page(report, showing.report)
    click.echo(f"report: {showing.report}", err=True)


def _again(request: Request, strategy: Strategy) -> FinishedRun:
    """Generate once more without showing it; what is cut short is no measurement."""
    shown = request.show(strategy, is_quiet=True)
    if shown.is_cancelled:
        raise KeyboardInterrupt
    return shown


def _as_prompt(model: Model, text: str, raw: bool, system: str | None) -> Prompt:
    """Return chat messages where the bundle has a chat template and the caller did not ask for raw text."""
    if raw or not model.tokenizer.has_chat_template:
        if system is not None:
            raise RequestError("--system needs a chat template", remedy="drop --system, or --raw if given")
        return text
    if not text.strip():
        raise RequestError("the prompt is empty", remedy="give some text")
    messages = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages
