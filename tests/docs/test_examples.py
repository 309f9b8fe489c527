"""The programs in samples/examples and the Python blocks of the docs run, on a tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.documents import Block, pages

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((REPOSITORY / "samples" / "examples").glob("*.py"))
BLOCKS = [
    (str(page.path.relative_to(REPOSITORY)), block)
    for page in pages(REPOSITORY)
    for block in page.blocks
    if block.language == "python"
]
SHOWN = {  # what each example must at least have printed
    "generate.py": "drafted tokens were accepted",
    "stream.py": "ended by",
    "chat.py": "prompt tokens were in the cache",
    "early_exit.py": "same text as plain decoding: True",
    "quantize_and_compare.py": "int8: ",
    "training_data.py": "wrote train.jsonl",
}


def run(arguments: list[str], folder: Path) -> str:
    """Run Python in a folder, as strict about warnings as the tests are; return what it printed."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", *arguments],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONIOENCODING": "utf-8",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_six_short_examples() -> None:
    assert [path.name for path in EXAMPLES] == sorted(SHOWN)
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 30 for path in EXAMPLES)
    card = (REPOSITORY / "samples" / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in card for path in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.name))
def test_every_example_runs_on_a_bundle(example: Path, bundle_for_examples: Path, tmp_path: Path) -> None:
    assert SHOWN[example.name] in run([str(example), str(bundle_for_examples)], tmp_path)


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}:{block.line}" for page, block in BLOCKS])
def test_every_python_block_runs_as_printed(page: str, block: Block, bundle_for_examples: Path, tmp_path: Path) -> None:
    if "import ray\n" in block.text:
        pytest.importorskip("ray", reason="the extra [ray] is not installed")
    shutil.copytree(bundle_for_examples, tmp_path / "out")
    run(["-c", block.text], tmp_path)


def test_the_data_that_the_example_writes_is_what_recipes_read(bundle_for_examples: Path, tmp_path: Path) -> None:
    from shortstack.runtime.text.tokenizer import Tokenizer
    from shortstack.samples.recipes.training.data import read_examples

    run([str(REPOSITORY / "samples" / "examples" / "training_data.py"), str(bundle_for_examples)], tmp_path)
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(bundle_for_examples / "tokenizer.json"))
    found = read_examples(tmp_path / "train.jsonl", tokenizer, "{utterance}\n", "{parse}", (0,), 512)
    assert len(found) == 2
    ours = Tokenizer.load(bundle_for_examples)
    assert found[0].ids == (*ours.encode("play some jazz\n"), *ours.encode("[IN:PlayMusic [SL:genre jazz]]"), 0)
