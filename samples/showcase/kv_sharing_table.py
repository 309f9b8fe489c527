r"""What sharing keys and values costs and gives: small models from scratch, equal but for their K,V map, in one table.

::

    python -m shortstack.samples.showcase.kv_sharing_table OUT --data train.jsonl

Trains the plain model and four placements (:mod:`shortstack.graphs.kv_map`) with half of its K,V layers: pizza-bottom,
lasagna-bottom (CLA), sandwich-middle and sandwich-top (LCKV), each with several seeds, on the same text for as many
steps. The same command continues where it stopped; what is trained stays, times are measured again. OUT/table.md,
OUT/table.png and OUT/table.json afterwards hold, by map:

    perplexity      on held-out rows, of all tokens, mean and standard deviation over seeds; and of the exit
    recall, copy    part of the texts, and of the tokens, completed right: :mod:`shortstack.samples.showcase.recall`,
                    drawn with another seed than those trained on
    K,V             bytes per token, measured in the buffers that a bundle has bound
    prefill, decode times of the first seed's float32 bundle at short and long prompts
    drafts          self-speculation from the exit against plain decoding, on held-out prompts

and, for maps that are KV-complete at half depth, the same costs of bundles that are cut there, the plain model's among
them: :mod:`shortstack.samples.showcase.kv_complete_exits`.

Recall takes many more steps to learn than the task does: look at the plain model's before comparing. The comparison is
at one number of layers; maps with fewer K,V layers have fewer parameters, as the table says.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer

from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_map import check_boundaries
from shortstack.samples.bench.report import machine, progress
from shortstack.samples.command import run_command
from shortstack.samples.recipes.training.precision import pick_device
from shortstack.samples.showcase.kv_complete_exits import measure_complete_exits
from shortstack.samples.showcase.kv_sharing_plot import draw_table
from shortstack.samples.showcase.kv_sharing_runs import PLAIN, RunsSpec, prepare, questions, run_all, write_json
from shortstack.samples.showcase.kv_sharing_speed import SpeedSpec, measure_speed


def measure_bundles(
    out: Path, spec: RunsSpec, speed: SpeedSpec, text: list[int], asked: list[str]
) -> dict[str, dict[str, Any]]:
    """Export the first seed's models and time them, prompts cut from ``text`` and drafts for ``asked``."""
    bundles = {name: out / "bundles" / name for name in spec.maps()}
    for name, bundle in bundles.items():
        export_bundle(ExportSpec(str(out / "models" / f"{name}-0"), bundle, (spec.exit_layer,), overwrite=True))
    return measure_speed(bundles, text, asked, speed, PLAIN)


def as_markdown(table: Mapping[str, Any]) -> str:
    """Return the table as two of Markdown: what models are worth, and what they cost."""
    maps: Mapping[str, Any] = table["maps"]
    head = ["map", "parameters", "perplexity", "at the exit", "recall", "copy: texts", "copy: tokens", "training"]
    worth = []
    for name, entry in maps.items():
        of = entry["quality"]
        perplexities = (_mean([q[key] for q in of], "{:.2f}") for key in ("perplexity", "exit_perplexity"))
        probes = (("recall", "texts"), ("copy", "texts"), ("copy", "tokens"))
        shares = (_mean([100 * q[kind][part] for q in of], "{:.0f}%") for kind, part in probes)
        minutes = _mean([q["training_s"] / 60 for q in of], "{:.1f} min")
        worth.append([name, f"{of[0]['parameters']:,}", *perplexities, *shares, minutes])
    shown = {name: f"{name} `{','.join(map(str, entry['kv_map']))}`" for name, entry in maps.items()}
    complete = []
    for depth, measured in table["complete_exits"].items():
        agree = ", ".join(f"{100 * of['agreement']:.0f}% ({name})" for name, of in measured.items())
        complete += [
            f"Cut after {depth} layers, where the maps below the plain one are KV-complete, with a linear exit fitted "
            f"in closed form, which agrees with the whole model on {agree} of held-out tokens:\n",
            _costs({shown[name]: of for name, of in measured.items()}),
        ]
    machine_facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in table["machine"].items())
    return "\n".join(
        [
            _markdown(head, worth),
            f"Cut after {table['settings']['exit_layer']} layers, at the exit that was trained with the model:\n",
            _costs({shown[name]: entry["speed"] for name, entry in maps.items()}),
            *complete,
            f"{table['seeds']} seeds, mean ± standard deviation. Times: medians in ms (a token, when decoding) of "
            f"{table['speed']['rounds']} interleaved rounds, and how many times the plain model's.\n",
            f"Settings: {', '.join(f'{name} {value!r}' for name, value in table['settings'].items())}.\n",
            f"Machine: {machine_facts}.\n",
        ]
    )


def _costs(measured: Mapping[str, Mapping[str, Any]]) -> str:
    lengths = list(next(iter(measured.values()))["prefill"])
    columns = [f"{kind}, {length} tokens" for kind in ("prefill", "decode after") for length in lengths]
    rows = []
    for name, speed in measured.items():
        times = [_time(speed[kind][length]) for kind in ("prefill", "decode") for length in lengths]
        drafts = speed["self_speculation"]
        rows.append([
            name, f"{speed['kv_bytes_per_token']:.0f}", *times, f"{100 * drafts['alpha']:.0f}%",
            f"{drafts['speed_up']:.2f}x", f"{drafts['same_output']} of {drafts['questions']}",
        ])  # fmt: skip
    return _markdown(
        ["map", "K,V bytes per token", *columns, "alpha (accepted / judged)", "speed-up", "same output"], rows
    )


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def _mean(values: list[float], form: str) -> str:
    shown = form.format(statistics.mean(values))
    return shown if len(values) < 2 else f"{shown} ± {form.format(statistics.stdev(values))}"


def _time(entry: Mapping[str, Any]) -> str:
    return f"{1000 * entry['median_s']:.2f} ({entry['times_reference']:.2f}x)"


def _check(spec: RunsSpec) -> None:
    """Refuse a shape that cannot be made, before anything is trained."""
    if spec.hidden % spec.heads or (spec.hidden // spec.heads) % 2 or spec.heads % spec.kv_heads:
        raise RequestError(
            "--hidden, --heads and --kv-heads do not fit",
            found=f"{spec.hidden}, {spec.heads}, {spec.kv_heads}",
            expected="hidden / heads even, and kv heads a divisor of heads",
        )
    if spec.exit_layer >= spec.layers:
        raise RequestError("--exit-layer", found=spec.exit_layer, expected=f"below the {spec.layers} layers")
    for kv_map in spec.maps().values():
        check_boundaries(kv_map, [spec.exit_layer])


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSON lines of a task.")
@click.option("--prompt", default="{utterance}\\n", help="Template of a prompt over a row's fields.")
@click.option("--completion", default="{parse}", help="Template of what follows; both are learnt.")
@click.option("--held-out-rows", type=click.IntRange(1), default=300, help="Rows at the end to measure on.")
@click.option("--recall-rows", type=click.IntRange(0), default=24_000, help="Texts to recall among the training text.")
@click.option("--probe-rows", type=click.IntRange(1), default=500, help="Texts of each kind to probe with.")
@click.option("--layers", type=click.IntRange(4), default=8, help="Layers.")
@click.option("--kv-layers", type=click.IntRange(1), default=4, help="Layers with K,V of their own where they share.")
@click.option("--hidden", type=click.IntRange(16), default=128, help="Width.")
@click.option("--heads", type=click.IntRange(1), default=4, help="Query heads.")
@click.option("--kv-heads", type=click.IntRange(1), default=2, help="Key/value heads.")
@click.option("--vocab", type=click.IntRange(300), default=1024, help="Tokens.")
@click.option("--context", type=click.IntRange(16), default=4096, help="Longest text a model takes, in tokens.")
@click.option(
    "--initializer-range", type=click.FloatRange(0, min_open=True), default=0.06, help="Of the weights drawn."
)
@click.option("--exit-layer", type=click.IntRange(1), default=2, help="The exit that is trained and drafts.")
@click.option("--steps", type=click.IntRange(1), default=3000, help="Optimizer steps.")
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Texts in one batch.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=1.5e-3, help="Peak rate.")
@click.option("--seeds", type=click.IntRange(1), default=3, help="Runs of each map; may be raised later.")
@click.option("--prompt-length", "prompt_lengths", type=click.IntRange(1), multiple=True, default=(16, 512, 2048))
@click.option("--decode-tokens", type=click.IntRange(1), default=32, help="Decoded after each prompt.")
@click.option("--rounds", type=click.IntRange(1), default=15, help="Interleaved rounds of timing.")
@click.option("--questions", "count", type=click.IntRange(1), default=60, help="Held-out prompts for drafts.")
@click.option("--device", default="cpu", help="Where to train: cpu, cuda, ...; the rest is on the CPU.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of each training and of the bundles.")
@click.option("--jobs", type=click.IntRange(1), default=1, help="Models to train at once.")
def main(
    out: Path, data: Path, seeds: int, prompt_lengths: tuple[int, ...], decode_tokens: int, rounds: int, count: int,
    threads: int, jobs: int, device: str, **options: Any,
) -> None:  # fmt: skip
    """Compare K,V maps; write table.md, table.png and table.json to OUT."""
    for name in ("prompt", "completion"):
        options[name] = options[name].replace("\\n", "\n")
    spec = RunsSpec(data=data.name, **options)
    speed = SpeedSpec(prompt_lengths, decode_tokens, rounds, threads=threads)
    _check(spec)
    if max(prompt_lengths) + decode_tokens >= spec.context:
        raise RequestError(
            "--prompt-length and --decode-tokens", found=max(prompt_lengths) + decode_tokens, expected="below --context"
        )
    prepare(out, data, spec)
    quality = run_all(out, spec, seeds, pick_device(device), jobs, threads)
    tokenizer = Tokenizer.from_file(str(out / "start" / names.TOKENIZER_FILE))
    text, asked = tokenizer.encode("".join(questions(out, spec.held_out_rows))).ids, questions(out, count)
    progress("speed")
    measured = measure_bundles(out, spec, speed, text, asked)
    progress("speed with KV-complete exits")
    complete = measure_complete_exits(out, spec, speed, text, asked)
    maps = {
        name: {"kv_map": list(kv_map), "quality": quality[name], "speed": measured[name]}
        for name, kv_map in spec.maps().items()
    }
    table = {
        "settings": {name: getattr(spec, name) for name in RunsSpec.__slots__},
        "seeds": seeds,
        "speed": {name: getattr(speed, name) for name in SpeedSpec.__slots__},
        "maps": maps,
        "complete_exits": complete,
        "machine": {**machine(), "torch": torch.__version__},
    }
    write_json(out / "table.json", table)
    partial = out / "table.partial"
    partial.write_text(shown := as_markdown(table), encoding="utf-8")
    os.replace(partial, out / "table.md")
    draw_table(table, out / "table.png")
    click.echo(shown)


if __name__ == "__main__":
    run_command(main, when_interrupted="stopped; the same command continues")
