"""The models under comparison, made from one checkpoint when they are absent: bundles, and onnxruntime-genai's own.

They are kept in folders named after the checkpoint, and bundles also after the sources that make them, so a changed
exporter makes new ones; those it replaces are removed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from shortstack.graphs.errors import DependencyError, ShortstackError

_SOURCES = ("graphs", "export")
_GENAI_PRECISION = "fp32"


@dataclass(frozen=True, slots=True)
class Artifacts:
    """Makes models, each at most once.

    Attributes:
        checkpoint: What they are made from.
        folder: Where bundles are kept.
        genai_folder: Where onnxruntime-genai's model is kept.
    """

    checkpoint: Path
    folder: Path
    genai_folder: Path

    def bundle(self, exit_layer: int | None, draft_vocab: int | None = None) -> Path:
        """Return an fp32 bundle: uncut, or cut once, with a full or a trimmed exit head."""
        name = "uncut" if exit_layer is None else f"exit-{exit_layer}"
        options = [] if exit_layer is None else ["--exit-layer", str(exit_layer)]
        if draft_vocab is not None:
            name += f"-vocab-{draft_vocab}"
            options += ["--draft-vocab", str(draft_vocab)]
        out = self.folder / name
        if not out.is_dir():
            _run(
                [sys.executable, "-m", "shortstack", "export", str(self.checkpoint), str(out), *options],
                f"bundle {name}",
            )
        return out

    def genai(self, python: str) -> Path:
        """Return onnxruntime-genai's model of the same weights, built by its own builder.

        Args:
            python: An interpreter that has onnxruntime-genai, torch and transformers.
        """
        out = self.genai_folder / _GENAI_PRECISION
        if out.is_dir():
            return out
        checkpoint = self.genai_folder / "checkpoint"
        partial = self.genai_folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        _run(
            [sys.executable, "-m", "shortstack.samples.bench.hf_folder", str(self.checkpoint), str(checkpoint)],
            "weights",
        )
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(partial)]
        cache = ["-c", str(self.genai_folder / "cache"), "--extra_options", "hf_token=false"]
        _run([*builder, "-p", _GENAI_PRECISION, "-e", "cpu", *cache], "onnxruntime-genai's model")
        _never_end(partial / "genai_config.json")
        shutil.rmtree(checkpoint)
        partial.rename(out)
        return out


def open_artifacts(checkpoint: Path, cache: Path) -> Artifacts:
    """Return the models of a checkpoint, in folders of their own inside ``cache``; drop bundles of older sources."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256(f"{checkpoint.resolve()} {checkpoint.stat().st_size}".encode())
    genai_folder = cache / f"genai-{digest.hexdigest()[:12]}"
    for source in sorted(p for room in _SOURCES for p in (root / room).rglob("*.py")):
        digest.update(source.read_bytes())
    folder = cache / f"bundles-{digest.hexdigest()[:12]}"
    for old in cache.glob("bundles-*"):
        if old != folder:
            shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    genai_folder.mkdir(exist_ok=True)
    return Artifacts(checkpoint, folder, genai_folder)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files of a model."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DependencyError(
            f"{python} has no onnxruntime-genai with its model builder",
            remedy=f"run: {python} -m pip install onnxruntime-genai torch transformers onnx-ir "
            "(or name another interpreter with --genai-python)",
        )
    return done.stdout.strip().splitlines()[-1]


def _never_end(config_file: Path) -> None:
    """Let the engine go on after an end-of-sequence token, as ours does when asked: blocks must be equally long."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = config["model"]["vocab_size"] - 1
    config_file.write_text(json.dumps(config, indent=1), encoding="utf-8")


def _run(command: list[str], what: str) -> None:
    click.echo(f"making {what} ...", err=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise ShortstackError(f"making {what} failed ({' '.join(command)}):\n{done.stdout[-2000:]}")
