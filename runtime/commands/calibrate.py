"""`shortstack calibrate`: the boldest threshold for early exit that keeps a bound on the loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from shortstack.command_options import Command, option_group, provider_option, threads_option
from shortstack.command_paths import BundlePath
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import RequestError
from shortstack.progress import progress_stages
from shortstack.runtime.calibration.calibrate import Calibration, CalibrationSpec, too_few
from shortstack.runtime.calibration.calibrate import calibrate as run_calibration
from shortstack.runtime.calibration.dissimilarity import LOSSES, Loss
from shortstack.runtime.calibration.learn_then_test import TESTS, Test
from shortstack.runtime.calibration.profile import PROFILE_FILE, Profile, read_profile, write_profile
from shortstack.runtime.calibration.prompts import read_prompts
from shortstack.runtime.calibration.template import DEFAULT_TEMPLATE, Template
from shortstack.runtime.commands.slots import choose_slots, slots_option
from shortstack.runtime.commands.template_variables import check_variables, template_option
from shortstack.runtime.model import Model


@click.command(cls=Command)
@click.argument("bundle", type=BundlePath(path_type=Path))
@option_group(
    "Prompts",
    click.option(
        "--data",
        type=click.Path(path_type=Path),
        required=True,
        metavar="FILE",
        help='Prompts like those to come, jsonl: {"prompt": ...}, {"messages": [...]} or {"text": ...} a line.',
    ),
    template_option,
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Use N of the prompts, drawn at random."),
    click.option("--max-new-tokens", "-n", type=int, default=64, show_default=True, help="Most tokens per answer."),
)
@option_group(
    "Guarantee",
    click.option("--delta", type=float, default=0.1, show_default=True, help="Bound on the mean loss."),
    click.option("--epsilon", type=float, default=0.05, show_default=True, help="Probability that the bound may fail."),
    click.option(
        "--loss",
        type=click.Choice(LOSSES),
        default="text",
        show_default=True,
        help="How an answer is compared with the full model's. text: 1 - ROUGE-L; token: edit distance, as a share; "
        "any: 1 if any token differs.",
    ),
    click.option(
        "--test",
        type=click.Choice(TESTS),
        default="hoeffding",
        show_default=True,
        help="The statistical test; binomial needs --loss any.",
    ),
)
@option_group(
    "Early exit",
    click.option(
        "--criterion",
        default=DEFAULT_TEMPLATE,
        show_default=True,
        help="When tokens leave; the threshold {} is calibrated.",
    ),
    click.option(
        "--exit-layer",
        "-e",
        "exit_layers",
        type=int,
        multiple=True,
        metavar="E",
        help="The exits where tokens may leave.  [default: all]",
    ),
    click.option("--grid", metavar="NUMBERS", help="Thresholds to try, in any order: '0.99 0.9 0.5'."),
    click.option("--sweep", is_flag=True, help="Measure all thresholds, for the curve; the result is the same."),
)
@option_group("Machine", slots_option, provider_option, threads_option)
@option_group(
    "Output",
    click.option(
        "--out",
        "-o",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help=f"Where to write the profile.  [default: BUNDLE/{PROFILE_FILE}]",
    ),
    click.option("--name", help="What the profile is for.  [default: the name of the prompts' file]"),
    click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON."),
)
def calibrate(
    bundle: Path,
    data: Path,
    delta: float,
    epsilon: float,
    template_variables: dict[str, Any],
    limit: int | None,
    max_new_tokens: int,
    criterion: str,
    exit_layers: tuple[int, ...],
    grid: str | None,
    loss: Loss,
    test: Test,
    sweep: bool,
    name: str | None,
    out: Path | None,
    slots: int | None,
    providers: tuple[str, ...],
    threads: int | None,
    as_json: bool,
) -> int:
    """Find the boldest threshold for early exit at which BUNDLE still answers almost as the full model does.

    With probability 1 - epsilon over the draw of the prompts, the mean loss over all prompts of their kind is at most
    delta. Exits with 1 where no threshold passes; the profile then asks for the full model.
    """
    spec = CalibrationSpec(
        delta=delta,
        epsilon=epsilon,
        template=Template(criterion),
        exit_layers=exit_layers or None,
        grid=None if grid is None else _numbers(grid),
        loss=loss,
        test=test,
        max_new_tokens=max_new_tokens,
        is_sweep=sweep,
    )
    opened = open_bundle(bundle)
    target = bundle / PROFILE_FILE if out is None else out
    _check_target(target)
    model = Model(opened, providers=providers or None, threads=threads, slots=choose_slots(opened, slots))
    check_variables(template_variables, model.tokenizer)
    prompts = read_prompts(data, model.tokenizer, opened.manifest.max_length, limit, template_variables)
    if prompts.too_long:
        click.echo(f"note: {prompts.too_long} prompts are longer than the context and were left out", err=True)
    if len(prompts.ids) < spec.fewest_prompts and sweep:
        click.echo(f"warning: {too_few(len(prompts.ids), spec)}", err=True)
    with progress_stages() as stage:
        found = run_calibration(model, prompts.ids, spec, stage)
    profile = found.profile(data.stem if name is None else name, model)
    write_profile(profile, target, follow_links=out is not None)
    if as_json:
        click.echo(json.dumps(profile.to_json()))
    else:
        _print(found, profile, target)
    return 0 if found.accepted else 1


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(number) for number in text.replace(",", " ").split())
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise RequestError("--grid", found=repr(text), expected="numbers", remedy="such as --grid '0.99 0.9 0.5'")
    return values


def _check_target(target: Path) -> None:
    """Refuse a place where the profile cannot be written, before hours of work, or must not."""
    if not target.parent.is_dir():
        raise RequestError(f"--out {target}: {target.parent} is not a folder", remedy="make it first")
    if target.is_dir():
        raise RequestError(f"--out {target} is a folder", remedy="name a file in it")
    if target.is_file():  # what else there may be is written to, such as /dev/stdout
        try:
            read_profile(target)
        except RequestError:
            raise RequestError(
                f"--out {target} exists and is not an exit profile", remedy="remove it, or choose another name"
            ) from None


def _print(found: Calibration, profile: Profile, target: Path) -> None:
    spec = found.spec
    click.echo(f"{profile.prompts} prompts, loss {spec.loss}, test {spec.test}: mean loss <= {spec.delta:g} wanted")
    click.echo("threshold  mean loss    p-value  mean exit  left early  tokens/s")
    plain = "-" if found.plain_tokens_per_s is None else f"{found.plain_tokens_per_s:.1f}"
    click.echo(f"{'plain':>9}  {0:9.4f}  {'-':>9}  {found.num_layers:9.2f}  {0:10.1%}  {plain:>8}")
    for point in profile.curve:
        speed = "-" if point.tokens_per_s is None else f"{point.tokens_per_s:.1f}"
        verdict = "" if point.is_accepted else "  not accepted"
        click.echo(
            f"{point.threshold:9g}  {point.mean_loss:9.4f}  {point.p_value:9.2g}  {point.mean_exit_layer:9.2f}"
            f"  {point.exited_share:10.1%}  {speed:>8}{verdict}"
        )
    if found.chosen is None:
        click.echo("no threshold passes: full model")
    else:
        click.echo(
            f"{profile.criterion}: with probability {1 - spec.epsilon:g} the mean loss is at most {spec.delta:g};"
            f" {profile.exited_share:.0%} of the tokens leave early,"
            f" and a token waits for {1 - profile.predicted_saving:.0%} of the layers on average"
        )
    click.echo(f"{target}")
