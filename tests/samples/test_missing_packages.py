"""Every command of the samples says in one line which package it lacks, and how to install it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Command, and a package that it cannot do without.
COMMANDS = {
    "bench": "tokenizers",
    "bench.batch_rivals": "tokenizers",
    "bench.batches": "onnxruntime",
    "bench.categories": "rich",
    "bench.drafter_shapes": "tokenizers",
    "bench.early_exit": "rich",
    "bench.hf_folder": "safetensors",
    "bench.kv_sharing": "torch",
    "bench.made_model": "tokenizers",
    "bench.soak": "onnxruntime",
    "bench.worker": "onnxruntime",
    "recipes.assistant": "torch",
    "recipes.draft_head_curve": "matplotlib",
    "recipes.eagle": "torch",
    "recipes.ee_llm": "torch",
    "recipes.ee_tuning": "torch",
    "recipes.kv_sharing": "torch",
    "recipes.layerskip": "peft",
    "recipes.new_model": "torch",
    "recipes.self_data": "onnxruntime",
    "showcase.answers": "onnxruntime",
    "showcase.kv_sharing_table": "matplotlib",
    "texts.make_draft_vocab_text": "onnxruntime",
    "texts.make_heldout_text": "onnxruntime",
}
# These need click alone, or start other commands.
WITHOUT_EXTRAS = {"bench.straight", "demo", "fetch_model"}
# These run by path, under an interpreter that has the engine.
OF_OTHER_INTERPRETERS = {"bench.genai_worker", "bench.llama_worker"}


def run_without(package: str, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a module with a package hidden: Python imports sitecustomize before anything else."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n", encoding="utf-8")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, env=env)


def test_every_module_that_runs_is_listed_here(package_folders: dict[str, Path]) -> None:
    root = package_folders["shortstack.samples"]
    runs = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")
        for path in root.rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert runs - {name for name in runs if name.startswith("examples.")} == {
        *COMMANDS,
        *WITHOUT_EXTRAS,
        *OF_OTHER_INTERPRETERS,
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(command: str, tmp_path: Path) -> None:
    module = f"shortstack.samples.{command}"
    done = run_without(COMMANDS[command], [module, "--help"], tmp_path)
    assert done.returncode == 2, done.stderr
    expected = f"error: `python -m {module}` needs '{COMMANDS[command]}', which is not installed. Run: "
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1
    assert " install -e " in done.stderr
    assert done.stdout == ""


def test_a_package_that_is_imported_late_is_reported_in_the_same_way(tmp_path: Path) -> None:
    arguments = ["x", str(tmp_path / "out.jsonl"), "--self-prompted", "1"]
    done = run_without("onnx_ir", ["shortstack.samples.recipes.self_data", *arguments], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: `python -m shortstack.samples.recipes.self_data` needs 'onnx_ir'")
    assert done.stderr.count("\n") == 1


def test_another_error_keeps_its_traceback(tmp_path: Path) -> None:
    done = run_without("no_such_package", ["shortstack.samples.bench.hf_folder"], tmp_path)
    assert done.returncode == 1
    assert "IndexError" in done.stderr
    assert "Traceback" in done.stderr


def test_an_import_of_the_samples_leaves_the_interpreter_as_it_was() -> None:
    script = "import sys, shortstack.samples\nassert sys.excepthook is sys.__excepthook__"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
