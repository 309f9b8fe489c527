"""The other engines: which there are, whether they are installed, and their models of the checkpoint under comparison.

==================  ==========================================  ==========================
engine              its model                                   compared in
==================  ==========================================  ==========================
onnxruntime-genai   built by its own builder, same precision    every precision
llama-cpp-python    the checkpoint itself, which must be GGUF   int4 and int8
==================  ==========================================  ==========================

Each lives under an interpreter that may be another than ours, so none of them is imported here.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from shortstack.graphs.errors import DependencyError
from shortstack.samples.bench.artifacts import Artifacts
from shortstack.samples.bench.genai_model import build_genai
from shortstack.samples.bench.pipe import WorkerProcess, script_worker

GENAI = "onnxruntime-genai"
LLAMA = "llama-cpp-python"


@dataclass(frozen=True, slots=True)
class Rival:
    """An engine to compare with.

    Attributes:
        name: Its package.
        version: Of the package.
        python: An interpreter that has it.
        script: Its worker, a file next to this module, or a whole path.
        model: Its model: a folder, or a file.
    """

    name: str
    version: str
    python: str
    script: str
    model: Path

    def start(self, threads: int) -> WorkerProcess:
        """Start a worker."""
        return script_worker(self.python, self.script, self.model, threads)


def rival_names(models: Artifacts) -> tuple[str, ...]:
    """Return the engines that a precision is compared with, whether or not they are installed."""
    return (GENAI, LLAMA) if models.is_quantized else (GENAI,)


def find_rivals(models: Artifacts, genai_python: str, llama_python: str) -> list[Rival]:
    """Return the engines that are there, their models built if need be; print on stderr how to get the others."""
    finders: dict[str, Callable[[], Rival]] = {
        GENAI: lambda: _find_genai(models, genai_python),
        LLAMA: lambda: _find_llama(models, llama_python),
    }
    found = []
    for name in rival_names(models):
        try:
            found.append(finders[name]())
        except DependencyError as error:
            click.echo(f"{name} is left out: {error}", err=True)
    return found


def _find_genai(models: Artifacts, python: str) -> Rival:
    version = check_genai(python)
    model = build_genai(models.checkpoint, models.genai_folder, models.precision, python)
    return Rival(GENAI, version, python, "genai_worker.py", model)


def _find_llama(models: Artifacts, python: str) -> Rival:
    if models.checkpoint.suffix != ".gguf":
        raise DependencyError(f"it runs GGUF files only, not {models.checkpoint}", remedy="name a GGUF checkpoint")
    return Rival(LLAMA, check_llama(python), python, "llama_worker.py", models.checkpoint)


def check_genai(python: str) -> str:
    """Return the version of onnxruntime-genai under an interpreter.

    Raises:
        DependencyError: It, or what its builder needs, is not installed there.
    """
    script = (
        "import importlib.util as u, onnxruntime_genai as g\n"
        "assert all(u.find_spec(m) for m in ('torch', 'transformers', 'onnx_ir'))\n"
        "print(g.__version__)"
    )
    version = _answer(python, script)
    if version is None:
        raise DependencyError(
            f"{python} has no onnxruntime-genai with its model builder",
            remedy=f"run: {python} -m pip install onnxruntime-genai torch transformers onnx-ir "
            "(or name another interpreter with --genai-python)",
        )
    return version


def check_llama(python: str) -> str:
    """Return the version of llama-cpp-python under an interpreter.

    Raises:
        DependencyError: It is not installed there.
    """
    version = _answer(python, "import llama_cpp\nprint(llama_cpp.__version__)")
    if version is None:
        raise DependencyError(
            f"{python} has no llama-cpp-python",
            remedy=f"run: {python} -m pip install llama-cpp-python (or name another interpreter with --llama-python)",
        )
    return version


def _answer(python: str, script: str) -> str | None:
    """Return the last line that a script prints; None where it fails."""
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip().splitlines()[-1]
