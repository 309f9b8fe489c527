"""`shortstack generate`."""

from __future__ import annotations

import json
import sys
from functools import partial

import click
from click.core import ParameterSource

from shortstack.graphs.errors import RequestError
from shortstack.runtime.draft_length import DraftPolicy
from shortstack.runtime.model import Model, Prompt, Strategy, load
from shortstack.runtime.sampling import SamplingParams
from shortstack.runtime.show import Shown, print_comparison, print_summary, show_stream

_STRATEGIES: tuple[Strategy, ...] = ("plain", "self-speculative")
_DRAFT_OPTIONS = ("exit_layer", "draft_tokens", "confidence", "fixed_draft", "bonus")
_SAMPLING_OPTIONS = ("top_k", "top_p", "min_p", "seed")
_INTERRUPTED = 130  # 128 + SIGINT, what shells report


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("prompt")
@click.option("--strategy", type=click.Choice(_STRATEGIES), help="How to decode.  [default: plain]")
@click.option("--compare", is_flag=True, help="Decode plainly, then self-speculatively, and compare.")
@click.option("--max-new-tokens", "-n", type=int, default=128, show_default=True)
@click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without the chat template.")
@click.option("--system", help="System message of the chat.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the text before TEXT; may be given more than once.")
@click.option("--exit-layer", "-e", type=int, metavar="E", help="The exit that drafts.  [default: the lowest]")
@click.option("--draft-tokens", "-k", type=int, default=4, show_default=True, help="Tokens per draft at most.")
@click.option("--confidence", type=float, default=0.0, help="End a draft after a token less likely than this.")
@click.option("--fixed-draft", is_flag=True, help="Always draft that many, instead of adapting to measured costs.")
@click.option("--bonus", is_flag=True, help="Give the last drafted token a row of its own.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="Sample from the K most likely tokens; 0 from all.")
@click.option("--top-p", type=float, default=1.0, help="Sample from the smallest set with this probability.")
@click.option("--min-p", type=float, default=0.0, help="Drop tokens less likely than this share of the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 makes used tokens less likely.")
@click.option("--seed", type=int, help="Makes sampling repeatable; implies --fixed-draft.")
@click.option("--provider", "providers", multiple=True, help="Execution provider: cpu, cuda, or onnxruntime's name.")
@click.option("--threads", type=int, help="Threads.  [default: all usable cores]")
@click.option("--verify", is_flag=True, help="Check the sha256 of every file first.")
@click.option("--json", "as_json", is_flag=True, help="Print text, token ids and statistics as JSON.")
def generate(
    bundle: str,
    prompt: str,
    strategy: Strategy | None,
    compare: bool,
    max_new_tokens: int,
    raw: bool,
    system: str | None,
    stop: tuple[str, ...],
    exit_layer: int | None,
    draft_tokens: int,
    confidence: float,
    fixed_draft: bool,
    bonus: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    providers: tuple[str, ...],
    threads: int | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Continue PROMPT (- reads it from standard input) with the model in BUNDLE."""
    if compare and strategy is not None:
        raise RequestError("--compare runs every strategy", remedy="drop --strategy")
    if not compare and strategy != "self-speculative":
        _refuse_given(_DRAFT_OPTIONS, "plain decoding drafts nothing", "add --strategy self-speculative or --compare")
    if temperature == 0:
        _refuse_given(_SAMPLING_OPTIONS, "a temperature of 0 is greedy", "add --temperature T with T above 0")
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    # One row emits one token, as a plain step does: an adaptive rule would never choose it.
    is_adaptive = not fixed_draft and not sampling.is_repeatable and draft_tokens + bonus > 1
    draft = DraftPolicy(draft_tokens, confidence, is_adaptive=is_adaptive, has_bonus=bonus)
    model = load(bundle, providers=providers or None, threads=threads, verify_hashes=verify)
    text = sys.stdin.read() if prompt == "-" else prompt
    start = partial(
        model.stream,
        _as_prompt(model, text, raw, system),
        max_new_tokens=max_new_tokens,
        exit_layer=exit_layer,
        draft=draft,
        sampling=sampling,
        stop=stop,
    )
    shown: list[Shown] = []
    for name in _STRATEGIES if compare else (strategy or "plain",):
        shown.append(show_stream(name, start(strategy=name), is_quiet=as_json, has_title=compare))
        if shown[-1].is_cancelled:
            break
    is_complete = not shown[-1].is_cancelled
    if as_json:
        results = [one.to_json() for one in shown]
        click.echo(json.dumps(results if compare else results[0]))
    elif compare and is_complete:
        print_comparison(shown, is_greedy=sampling.is_greedy)
    else:
        print_summary(shown[-1])
    if not is_complete:
        sys.exit(_INTERRUPTED)
    if compare and sampling.is_greedy and len({one.token_ids for one in shown}) > 1:
        sys.exit(1)


def _refuse_given(options: tuple[str, ...], reason: str, remedy: str) -> None:
    """Refuse options that were given on the command line and would do nothing."""
    context = click.get_current_context()
    given = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise RequestError(f"{flags} would have no effect: {reason}", remedy=remedy)


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
