"""The bundles under comparison, made from one checkpoint when they are absent, and the folder of the rivals' models.

They are kept in folders named after the checkpoint, and bundles also after the sources that make them, so a changed
exporter makes new ones; those it replaces are removed::

    bundles-<hash>/exit-8               exported: the hash covers the checkpoint, graphs/ and export/
    quantized-<hash>/exit-8-int4        quantized from the one above, by preset: quant/ as well
    genai-<hash>/int4                   onnxruntime-genai's own: the checkpoint only
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from shortstack.graphs.errors import ShortstackError

Precision = Literal["fp32", "int4", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "int4", "int8")

_EXPORTERS = ("graphs/**/*.py", "export/**/*.py")
_QUANTIZERS = ("quant/**/*.py", "graphs/texts/*.jsonl", "graphs/texts/*.txt")  # the texts calibrate


@dataclass(frozen=True, slots=True)
class Artifacts:
    """Makes models, each at most once.

    Attributes:
        checkpoint: What they are made from.
        folder: Where fp32 bundles are kept.
        quantized_folder: Where quantized bundles are kept.
        genai_folder: Where onnxruntime-genai's models are kept.
        precision: What is compared.
        preset: How a bundle becomes one of that precision, a name that ``shortstack quantize`` knows; unused in fp32.
        method: How weights are rounded, likewise; None leaves it to the preset. It changes no speed and no size.
    """

    checkpoint: Path
    folder: Path
    quantized_folder: Path
    genai_folder: Path
    precision: Precision = "fp32"
    preset: str = ""
    method: str | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the bundles under comparison are quantized."""
        return self.precision != "fp32"

    @property
    def description(self) -> str:
        """The precision; preset and method where they are not the ones that it has by itself."""
        named = f", preset {self.preset}" if self.preset not in ("", self.precision) else ""
        return f"{self.precision}{named}" + (f", rounded by {self.method}" if self.method else "")

    def bundle(self, exit_layer: int | None, draft_vocab: int | None = None) -> Path:
        """Return a bundle of the precision under comparison: uncut, or cut once, with a full or a trimmed exit head."""
        name = "uncut" if exit_layer is None else f"exit-{exit_layer}"
        if draft_vocab is not None:
            name += f"-vocab-{draft_vocab}"
        if not self.is_quantized:
            return self._exported(name, exit_layer, draft_vocab)
        out = self.quantized_folder / "-".join((name, self.preset, *([self.method] if self.method else ())))
        if not out.is_dir():
            source = self._exported(name, exit_layer, draft_vocab)
            options = ["--preset", self.preset, *(["--method", self.method] if self.method else ()), "--no-report"]
            make([*_SHORTSTACK, "quantize", str(source), str(out), *options], f"bundle {out.name}")
        return out

    def _exported(self, name: str, exit_layer: int | None, draft_vocab: int | None) -> Path:
        out = self.folder / name
        if not out.is_dir():
            options = [] if exit_layer is None else ["--exit-layer", str(exit_layer)]
            if draft_vocab is not None:
                options += ["--draft-vocab", str(draft_vocab)]
            make([*_SHORTSTACK, "export", str(self.checkpoint), str(out), *options], f"bundle {name}")
        return out


_SHORTSTACK = (sys.executable, "-m", "shortstack")


def open_artifacts(
    checkpoint: Path,
    cache: Path,
    precision: Precision = "fp32",
    preset: str | None = None,
    method: str | None = None,
) -> Artifacts:
    """Return the models of a checkpoint, in folders of their own inside ``cache``; drop bundles of older sources.

    Args:
        checkpoint: A file or folder that ``shortstack export`` reads.
        cache: Where models of any checkpoint are kept.
        precision: What is to be compared.
        preset: How to quantize; None takes the preset named like the precision.
        method: How to round; None takes the preset's.
    """
    digest = hashlib.sha256(f"{checkpoint.resolve()} {checkpoint.stat().st_size}".encode())
    genai_folder = cache / f"genai-{digest.hexdigest()[:12]}"
    _add_sources(digest, _EXPORTERS)
    folder = cache / f"bundles-{digest.hexdigest()[:12]}"
    _add_sources(digest, _QUANTIZERS)
    quantized_folder = cache / f"quantized-{digest.hexdigest()[:12]}"
    for old in (*cache.glob("bundles-*"), *cache.glob("quantized-*")):
        if old not in (folder, quantized_folder):
            shutil.rmtree(old)
    for needed in (folder, quantized_folder, genai_folder):
        needed.mkdir(parents=True, exist_ok=True)
    return Artifacts(checkpoint, folder, quantized_folder, genai_folder, precision, preset or precision, method)


def stored_bytes(model: Path) -> int:
    """Return the bytes of a model: of one file, or of all files of a folder."""
    files = model.rglob("*") if model.is_dir() else (model,)
    return sum(path.stat().st_size for path in files if path.is_file())


def make(command: Sequence[str], what: str) -> None:
    """Run a command that makes a model.

    Raises:
        ShortstackError: It failed; with the end of what it said.
    """
    click.echo(f"making {what} ...", err=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == ShortstackError.exit_code and done.stdout.strip():  # its last line says what to do
        said = done.stdout.strip().splitlines()[-1].removeprefix("error: ")
        raise ShortstackError(f"making {what} failed: {said}")
    if done.returncode:
        raise ShortstackError(f"making {what} failed ({' '.join(command)}):\n{done.stdout[-2000:]}")


def _add_sources(digest: hashlib._Hash, patterns: Sequence[str]) -> None:
    root = Path(__file__).resolve().parents[2]
    for source in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(source.read_bytes())
