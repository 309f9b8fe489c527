"""`shortstack generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from shortstack.command_options import option_group, provider_option, threads_option
from shortstack.command_paths import BundlePath
from shortstack.graphs.errors import INTERRUPTED, RequestError
from shortstack.graphs.kv_map import iterated_groups
from shortstack.runtime.commands.agreement import Agreement, agreement_of
from shortstack.runtime.commands.drafting import Drafting, drafting_options
from shortstack.runtime.commands.options import (
    Exiting,
    Showing,
    exit_layers_option,
    exiting_options,
    max_new_tokens_option,
    refuse_options_without_effect,
    sampling_options,
    showing_options,
    stop_option,
    strategy_option,
    unchecked_exits,
)
from shortstack.runtime.commands.prompt_argument import PromptCommand, read_prompt
from shortstack.runtime.commands.show import FinishedRun, print_comparison, print_summary, show_stream
from shortstack.runtime.commands.template_variables import OPTION, check_variables, template_option
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.engine.passes import parse_passes
from shortstack.runtime.model import Model, load
from shortstack.runtime.request import ExitEarly, Plain, Prompt, Request, Speculate, Strategy, StrategyName

if TYPE_CHECKING:
    from shortstack.runtime.calibration.profile import Profile

_TURNS = 3  # of early exit and plain decoding for a report, since times vary


@click.command(cls=PromptCommand)
@click.argument("bundle", type=BundlePath())
@click.argument("prompt")
@option_group(
    "Prompt",
    click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without the chat template."),
    click.option("--system", help="System message of the chat."),
    template_option,
)
@option_group(
    "Decoding",
    strategy_option,
    click.option(
        "--compare", is_flag=True, help="Decode plainly, self-speculatively and as --exit-when says; compare."
    ),
    exit_layers_option,
    max_new_tokens_option,
    stop_option,
    click.option(
        "--stop-id",
        "stop_ids",
        type=int,
        multiple=True,
        metavar="ID",
        help="End at this token id; may be given more than once.",
    ),
    click.option(
        "--prefill-passes",
        metavar="N|converged|sequential",
        help="How often a prompt runs through layers that use K,V of layers above them; N: as often as in training, 9 "
        "for LCKV.  [default: converged]",
    ),
)
@sampling_options
@drafting_options
@exiting_options
@option_group(
    "Machine",
    provider_option,
    threads_option,
    click.option("--verify", is_flag=True, help="Check the sha256 of every file first."),
)
@showing_options
def generate(
    bundle: str,
    prompt: str,
    strategy: StrategyName | None,
    compare: bool,
    max_new_tokens: int,
    raw: bool,
    system: str | None,
    template_variables: dict[str, Any],
    stop: tuple[str, ...],
    stop_ids: tuple[int, ...],
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
    refuse_options_without_effect(strategy, compare, exit_layers, drafting, exiting, sampling.temperature, showing)
    names = _strategies(strategy, compare, exiting)
    if "early-exit" in names:
        exiting.check()
    drafting.policy(sampling)
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
    profile = exiting.load_profile(model.bundle)
    policy = exiting.policy(model.bundle, exit_layers, profile) if "early-exit" in names else None
    if profile is not None and profile.threshold is None:
        click.echo(f"note: {exiting.profile} found no safe threshold, so no token leaves early", err=True)
    if policy is not None and profile is None and not compare and (found := unchecked_exits(model.bundle, policy)):
        click.echo(f"warning: {found}", err=True)
    text = read_prompt(prompt)
    asked = Request(
        _as_prompt(model, text, raw, system, template_variables),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        stop_token_ids=stop_ids,
        template_variables=template_variables or None,
    )
    drafts = drafting.speculate(exit_layers, sampling, model.tokenizer) if "self-speculative" in names else None
    requests = {name: replace(asked, strategy=make_strategy(name, drafts, policy)) for name in names}
    for request in requests.values():  # all are checked before the first one runs
        request.strategy.exits_in(model.bundle.manifest.plan)
    runs: list[FinishedRun] = []
    for request in requests.values():
        runs.append(_show(model, request, is_quiet=showing.as_json, has_title=compare, shows_exits=showing.show_exits))
        if runs[-1].is_cancelled:
            break
    is_complete = not runs[-1].is_cancelled
    if showing.report is not None and is_complete:
        _report(model, requests["early-exit"], runs, text, profile, showing)
    agreement = _agreement(runs) if sampling.is_greedy and is_complete else None
    if showing.as_json:
        results = [_as_json(run, showing, agreement) for run in runs]
        click.echo(json.dumps(results if compare else results[0]))
    elif compare and is_complete:
        print_comparison(runs, is_greedy=sampling.is_greedy, is_lossy=_is_lossy(policy), agreement=agreement)
    else:
        print_summary(runs[-1], shows_exits=showing.show_exits)
    if not is_complete:
        sys.exit(INTERRUPTED)
    lossless = [run for run in runs if run.strategy != "early-exit" or not _is_lossy(policy)]
    if compare and sampling.is_greedy and len({run.token_ids for run in lossless}) > 1:
        sys.exit(1)


def _strategies(strategy: StrategyName | None, compare: bool, exiting: Exiting) -> tuple[StrategyName, ...]:
    if not compare:
        return (strategy or "plain",)
    return ("plain", "self-speculative", "early-exit") if exiting.is_asked else ("plain", "self-speculative")


def make_strategy(name: StrategyName, drafts: Speculate | None, policy: ExitPolicy | None) -> Strategy:
    """Return the strategy of this name that the options describe."""
    if name == "early-exit":
        assert policy is not None
        return ExitEarly(policy)
    if name == "plain":
        return Plain()
    assert drafts is not None
    return drafts


def _show(
    model: Model, request: Request, *, is_quiet: bool, has_title: bool = False, shows_exits: bool = False
) -> FinishedRun:
    """Generate to the end and show it."""
    return show_stream(
        request.strategy.name,
        model.start(request),
        model.bundle.manifest.spec.num_hidden_layers,
        exit_layers=model.exit_layers,
        is_quiet=is_quiet,
        has_title=has_title,
        shows_exits=shows_exits,
    )


def _is_lossy(policy: ExitPolicy | None) -> bool:
    """Whether early exit may say something else than plain decoding."""
    return policy is not None and policy.verify != "exact"


def _agreement(runs: list[FinishedRun]) -> Agreement | None:
    """Return how far early exit agrees with plain decoding, where both ran."""
    tokens = {run.strategy: run.token_ids for run in runs}
    if "early-exit" not in tokens or "plain" not in tokens:
        return None
    return agreement_of(tokens["early-exit"], tokens["plain"])


def _as_json(run: FinishedRun, showing: Showing, agreement: Agreement | None) -> dict[str, Any]:
    data = run.to_json(with_exits=showing.show_exits)
    if agreement is not None and run.strategy == "early-exit":
        data["agreement"] = agreement.to_json()
    return data


def _report(
    model: Model,
    request: Request,
    runs: list[FinishedRun],
    prompt: str,
    profile: Profile | None,
    showing: Showing,
) -> None:
    """Draw the page, running what it needs besides what was shown; early exit and plain decoding take turns."""
    from shortstack.runtime.commands.exit_report.page import write_page
    from shortstack.runtime.commands.exit_report.report import build_report
    from shortstack.runtime.commands.exit_report.sweep import sweep

    assert showing.report is not None
    assert isinstance(request.strategy, ExitEarly)
    policy = request.strategy.policy
    manifest = model.bundle.manifest
    early = [run for run in runs if run.strategy == "early-exit"]
    click.echo("decoding for the report ...", err=True)
    plain = [run for run in runs if run.strategy == "plain"]
    while len(plain) < _TURNS:
        if len(early) == len(plain):
            early.append(_again(model, request))
        plain.append(_again(model, replace(request, strategy=Plain())))

    def run_at(other: ExitPolicy) -> Stream:
        return model.start(replace(request, strategy=ExitEarly(other)))

    layers = manifest.spec.num_hidden_layers
    points = () if showing.no_sweep else sweep(policy, plain[0].token_ids, layers, run_at)
    report = build_report(manifest, prompt, policy, early, plain, sweep=points, profile=profile)
    write_page(report, showing.report)
    click.echo(f"report: {showing.report}", err=True)


def _again(model: Model, request: Request) -> FinishedRun:
    """Generate once more without showing it; what is cut short is no measurement."""
    run = _show(model, request, is_quiet=True)
    if run.is_cancelled:
        raise KeyboardInterrupt
    return run


def _as_prompt(model: Model, text: str, raw: bool, system: str | None, variables: Mapping[str, Any]) -> Prompt:
    """Return chat messages where the bundle has a chat template and the caller did not ask for raw text."""
    if raw and variables:
        raise RequestError(f"{OPTION} needs the chat template, which --raw leaves out", remedy="drop one of them")
    check_variables(variables, model.tokenizer)
    if raw or not model.tokenizer.has_chat_template:
        if system is not None:
            raise RequestError("--system needs a chat template", remedy="drop --system, or --raw if given")
        return text
    if not text.strip():
        raise RequestError("the prompt is empty", remedy="give some text")
    messages = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages
