"""The commands that are killed: each on a tiny model, in a second or a few."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import click

from helpers.recipe_runs import options, write_words
from helpers.tiny_models import BASE, SPECULATOR
from shortstack.__main__ import run
from shortstack.samples.command import run_command

RECIPES = "shortstack.samples.recipes"
_WITH_TIMES = ("state.pt", "report.json", "training.png", "curve.png", "curve.json")


@dataclass(frozen=True)
class Killed:
    """One command.

    Attributes:
        module: Of a recipe, which has ``main``; empty for ``shortstack`` itself.
        arguments: Of its first run and of every later one; paths of :class:`Inputs` are filled in.
        outputs: What it writes, by name in the working folder. Those that are folders with bundle.json are bundles.
        again: What a run after a kill needs besides, such as ``--overwrite`` to replace what a killed one may have
            finished.
        before: A command that has run to its end when the first one starts: its result is to be replaced.
        volatile: Files with times in them, which differ from run to run.
    """

    module: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    again: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    volatile: tuple[str, ...] = _WITH_TIMES

    def work(self, arguments: tuple[str, ...], inputs: Path, folder: Path) -> Callable[[], int]:
        """Return the function that runs it, in a process of its own."""
        filled = [a.replace("{inputs}", str(inputs)).replace("{out}", str(folder)) for a in arguments]

        def work() -> int:
            if not self.module:
                return run(filled)
            main = importlib.import_module(f"{RECIPES}.{self.module}").main
            sys.argv = [self.module, *filled]
            if isinstance(main, click.Command):
                run_command(main)
            else:
                main()
            return 0

        return work


def make_inputs(folder: Path) -> int:
    """Write the models and texts that the commands read; return an exit code."""
    BASE.write(folder / "checkpoint")
    SPECULATOR.write(folder / "speculator")
    write_words(folder)
    prompts = "".join(f'{{"prompt": "{word}"}}\n' for word in ("red", "green", "blue", "stone", "river"))
    (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    many = "".join(f'{{"say": "stone{n * 7} river{n}", "said": "cloud{n * n}"}}\n' for n in range(200))
    (folder / "many.jsonl").write_text(many, encoding="utf-8")
    (folder / "text.jsonl").write_text('{"text": "The stone is red, the river is blue."}\n' * 40, encoding="utf-8")
    answers = "".join(f'{{"p": [{5 + n}, 9, {30 + n}], "o": [{40 + n}, 7, 11, {20 + n}]}}\n' for n in range(20))
    (folder / "answers.jsonl").write_text(answers, encoding="utf-8")
    bundle = str(folder / "bundle")
    return run(["export", str(folder / "checkpoint"), bundle, "-e", "1"])


_EXPORT = ("export", "{inputs}/checkpoint", "{out}/bundle", "-e", "2")
_QUANTIZE = ("quantize", "{inputs}/bundle", "{out}/bundle", "--method", "gptq", "--calibration-tokens", "128")
_TRAIN = (
    "{inputs}/checkpoint",
    "{out}/run",
    *(str(o) for o in options(Path("{inputs}/words.jsonl"), 6)),
    "--save-every",
    "2",
)
_TUNE = ("{inputs}/speculator", "{out}/run", "--data", "{inputs}/answers.jsonl", "--steps", "6", "--batch-size", "4")
_CALIBRATE = ("-n", "3", "--grid", "0.9 0.5", "--delta", "0.9", "--epsilon", "0.5", "-e", "1", "--threads", "1")

COMMANDS: Mapping[str, Killed] = MappingProxyType(
    {
        "export": Killed("", _EXPORT, ("bundle",), ("--overwrite",)),
        "export --overwrite": Killed(
            "",
            (*_EXPORT, "--overwrite"),
            ("bundle",),
            before=("export", "{inputs}/checkpoint", "{out}/bundle", "-e", "1"),
        ),
        "export --preset": Killed(
            "", (*_EXPORT, "--preset", "int4", "--calibration-tokens", "128"), ("bundle",), ("--overwrite",)
        ),
        "quantize": Killed("", (*_QUANTIZE, "--no-report"), ("bundle",), ("--overwrite",)),
        "quantize, report": Killed(
            "",
            (*_QUANTIZE, "--heldout-tokens", "128", "--heldout", "{inputs}/text.jsonl"),
            ("bundle",),
            ("--overwrite",),
            volatile=("quality.json", "bundle.json"),
        ),
        "calibrate": Killed(
            "",
            (
                "calibrate",
                "{inputs}/bundle",
                "--data",
                "{inputs}/prompts.jsonl",
                "--out",
                "{out}/profile.json",
                *_CALIBRATE,
            ),
            ("profile.json",),
            volatile=("profile.json",),
        ),
        "layerskip": Killed("layerskip", (*_TRAIN, "--exit-layer", "2", "--p-max", "0.3"), ("run",)),
        "layerskip --lora": Killed("layerskip", (*_TRAIN, "--exit-layer", "2", "--lora-rank", "2"), ("run",)),
        "ee_llm": Killed("ee_llm", (*_TRAIN, "--exit-layer", "1", "--kind", "mlp", "--head", "own"), ("run",)),
        "kv_sharing": Killed("kv_sharing", (*_TRAIN, "--kv-map", "cla:2", "--exit-layer", "2"), ("run",)),
        "ee_tuning": Killed(
            "ee_tuning",
            (*_TUNE, "--exit-layer", "1", "--kind", "linear", "--linear-mlp", "16", "--save-every", "2"),
            ("run",),
        ),
        "self_data": Killed(
            "self_data",
            ("{inputs}/bundle", "{out}/own.jsonl", "--prompts", "{inputs}/prompts.jsonl", "-n", "12", "--threads", "1"),
            ("own.jsonl",),
        ),
        "new_model": Killed(
            "new_model",
            (
                "{out}/new",
                "--data",
                "{inputs}/many.jsonl",
                "--prompt",
                "{say}\\n",
                "--completion",
                "{said}",
                "--layers",
                "2",
                "--hidden",
                "32",
                "--vocab",
                "300",
            ),
            ("new",),
        ),
        "draft_head_curve": Killed(
            "draft_head_curve",
            (
                "{inputs}/speculator",
                "{out}/curve",
                "--draft-vocab",
                "64",
                "--data",
                "{inputs}/answers.jsonl",
                "--exit-layer",
                "1",
                "--exit-layer",
                "3",
            ),
            ("curve",),
        ),
    }
)
