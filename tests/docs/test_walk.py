"""The commands of README, docs and samples run as they are printed, page by page, in a folder like a fresh clone.

Slow: ``make test-all``, or one page with ``pytest tests/docs/test_walk.py -m slow -k quantization``. What needs a hub,
another machine or hours is skipped, and SKIPPED says why. The hub id of the default model stands for its GGUF here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.documents import Page, pages

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 3600
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# (pages, command) -> why it is not run here; both are regular expressions, found anywhere.
SKIPPED = {
    (r"", r"^(pip|env/bin/\w+|make) "): "sets up an environment; .ci/run does that",
    (
        r"^README",
        r"smollm2-135m-commands-exit-f5",
    ): "a bundle that `make demo` makes; tests/samples runs the demo's showings",
    (r"", r"ee-llm/"): "needs a checkpoint of EE-LLM; tests/export/test_megatron_checkpoint.py makes one",
    (r"", r"-m shortstack\.samples\.(bench|showcase)"): "a measurement; tests/samples runs each in small",
    (r"docs/benchmarks", r"\b(made|headed)/"): "needs a checkpoint or a head that a measurement makes",
    (r"docs/training", r"\blora/|\bout-lora/"): "trains for hours",
    (r"docs/(quantization|benchmarks)", r"--max-kl"): "searches for ten minutes and more",
    (
        r"^samples/",
        r"-m shortstack\.samples\.recipes",
    ): "how something was made, with data that is not shipped as a whole",
    (r"^samples/recipes", r"shortstack (export|generate) (run|bundle)"): "needs what the recipe before it made",
}


def why_skipped(page: str, command: str) -> str | None:
    for (of_page, of_command), reason in SKIPPED.items():
        if re.search(of_page, page) and re.search(of_command, command):
            return reason
    return None


def name_of(page: Page) -> str:
    return page.path.relative_to(REPOSITORY).as_posix()


RUNNABLE = {
    name_of(page): commands
    for page in pages(REPOSITORY)
    if page.path.name not in ("cli.md",)
    and (commands := [line for line in page.commands if why_skipped(name_of(page), line) is None])
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a fresh clone: links to what lies in the checkout, without what tools made."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for entry in REPOSITORY.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("build", "dist"):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def environment(tmp_path: Path, smollm2_gguf: Path) -> dict[str, str]:
    """The environment of a reader: `shortstack` and `python` are on the PATH, the default model has been fetched."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, arguments in (("shortstack", " -m shortstack"), ("python", "")):
        program = bin_folder / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{arguments} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    home = tmp_path / "home"
    model = home / ".cache" / "shortstack" / smollm2_gguf.name
    model.parent.mkdir(parents=True)
    model.symlink_to(smollm2_gguf)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {
        "HOME": str(home),
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
        "HF_HUB_OFFLINE": "1",
        "DEFAULT_MODEL": str(model),
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_the_commands_of_the_page_run_as_printed(page: str, clone: Path, environment: dict[str, str]) -> None:
    try:
        for command in RUNNABLE[page]:
            done = subprocess.run(
                ["bash", "-c", command.replace(HUB_ID, environment["DEFAULT_MODEL"])],
                cwd=clone,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
            assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}"
    finally:
        shutil.rmtree(clone, ignore_errors=True)  # bundles are large


@pytest.mark.parametrize("skip", SKIPPED, ids=lambda skip: skip[1])
def test_every_reason_to_skip_is_one_that_some_command_has(skip: tuple[str, str]) -> None:
    of_page, of_command = skip
    commands = [(name_of(page), line) for page in pages(REPOSITORY) for line in page.commands]
    assert any(re.search(of_page, page) and re.search(of_command, line) for page, line in commands)


def test_the_pages_that_show_commands_are_walked() -> None:
    assert RUNNABLE.keys() >= {
        "README.md",
        "docs/quantization.md",
        "docs/early-exit.md",
        "docs/kv-sharing.md",
        "docs/faq.md",
    }
