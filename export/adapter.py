"""Merges a LoRA adapter, as peft saves it, into a checkpoint while its tensors are read: W + s B A.

::

    adapter_config.json         rank, alpha, rsLoRA, patterns: read in adapter_config.py
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight [rank, in]
                                base_model.model.<module>.lora_B.weight [out, rank]

The folder is treated as untrusted. Both files must lie in it, every shape is checked against the checkpoint before
anything is computed, and pickles are never opened. Neither peft nor torch is needed. The sum is computed in float32,
whatever type the base is stored in. So a quantized base is dequantized first, and the exporter decides how the sum is
stored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from shortstack.export.adapter_config import MERGE_REMEDY, LoraSettings, read_settings
from shortstack.export.arch import ARCHITECTURES, Architecture, resolve, under_prefix
from shortstack.export.arch.architecture import LM_HEAD
from shortstack.export.checkpoint import Checkpoint, Config, Progress
from shortstack.export.checkpoint.checkpoint import (
    StoredBlocks,
    StoredExit,
    hash_files,
    notes,
    read_part,
    reads_parts,
)
from shortstack.export.checkpoint.float_types import FLOAT_TYPES
from shortstack.export.checkpoint.hf import member  # its import of ml_dtypes lets safetensors return bfloat16
from shortstack.export.sources import matrix_sources
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.spec import ModelSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_MAX_LISTED = 8
_KINDS: tuple[tuple[str, str], ...] = (
    ("lora_magnitude_vector", MERGE_REMEDY),  # DoRA
    ("lora_embedding_", "train without the embedding in target_modules, or " + MERGE_REMEDY),
    (".lora_B.bias", MERGE_REMEDY),
    ("base_layer.weight", "save it again with peft's `save_pretrained(FOLDER, save_embedding_layers=False)`"),
    ("embed_tokens.weight", "save it again with peft's `save_pretrained(FOLDER, save_embedding_layers=False)`"),
)
"""Other tensors that peft may put into the file, each by a part of its name, and the remedy for each."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix that an adapter may change: its tensor, its name in transformers' model, and whether it is [in, out]."""

    tensor: str
    parameter: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class _Factors:
    """The matrix, the names of the two tensors of it in the adapter's file, and the scale of their product."""

    matrix: _Matrix
    a: str
    b: str
    scale: float


class AdaptedCheckpoint:
    """A checkpoint with an adapter merged into it; the methods are those of ``Checkpoint``.

    Args:
        base: The checkpoint that the adapter was trained on, in any format.
        folder: The adapter's folder.

    Attributes:
        source: The name of the base and that of the adapter.
        touched: The tensor of each matrix that the adapter changes, by the name that transformers' model has for it,
            sorted.

    Raises:
        CheckpointError: A file is missing, damaged or outside the folder, or the adapter's tensors do not fit the
            checkpoint.
        UnsupportedError: The adapter is not a plain LoRA.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self.source = f"{base.source} + {folder}"
        self._base = base
        self._config_file, self._weights_file = _files(folder)
        settings = read_settings(self._config_file)
        self._tensors = _open(self._weights_file)
        self._factors = self._check(_modules(self._weights_file, self._tensors), settings)
        self.touched: Mapping[str, str] = {f.matrix.parameter: name for name, f in self._factors.items()}

    @property
    def folder_or_file(self) -> Path:
        """Where the base lies on disk."""
        return self._base.folder_or_file

    @property
    def config(self) -> Config:
        """The base's config."""
        return self._base.config

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the base is read."""
        return notes(self._base)

    def names(self) -> frozenset[str]:
        """Return the names of all tensors: those of the base."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return self._base.shape(name)

    def tensor(self, name: str) -> Floats:
        """Read one tensor, with the adapter merged, as C-contiguous float32."""
        value = self._base.tensor(name)
        if name not in self._factors:
            return value
        with np.errstate(over="ignore", invalid="ignore"):
            merged = value + self.delta(name)
        if not np.isfinite(merged).all():
            raise CheckpointError(
                f"{self.source}: {name} is not finite after merging", remedy="train the adapter again"
            )
        return merged

    def reads_parts(self, name: str) -> bool:
        """Return whether a part can be read without the rest: where the adapter changes nothing, as in the base."""
        return name not in self._factors and reads_parts(self._base, name)

    def part(self, name: str, rows: slice, columns: slice) -> Floats:
        """Read a part of a matrix that the adapter does not change."""
        return read_part(self._base, name, rows, columns)

    def delta(self, name: str) -> Floats:
        """Return what the adapter adds to the tensor of a touched matrix, in its shape."""
        factors = self._factors[name]
        with np.errstate(over="ignore", invalid="ignore"):
            delta = (self._read(factors.b) @ self._read(factors.a)) * np.float32(factors.scale)
        return np.ascontiguousarray(delta.T) if factors.matrix.transposed else delta

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return how a tensor is quantized, without reading its data; None if it is stored as floats.

        A matrix that the adapter changes has no blocks left to keep, and its kind says so.
        """
        stored = self._base.blocks(name)
        if stored is None or name not in self._factors:
            return stored
        return StoredBlocks(f"{stored.kind} with adapter", _no_blocks)

    def exits(self, spec: ModelSpec) -> tuple[StoredExit, ...]:
        """Return the base's exits."""
        return self._base.exits(spec)

    def files(self) -> dict[str, bytes]:
        """Return the content of the base's tokenizer files."""
        return self._base.files()

    def digest(self, progress: Progress | None = None) -> str:
        """Return the SHA-256 over the base's digest and that of the adapter's two files."""
        base = self._base.digest(progress)
        adapter = hash_files((self._config_file, self._weights_file), label=True)
        return hashlib.sha256(f"{base}\0{adapter}".encode()).hexdigest()

    def _check(self, modules: dict[str, dict[str, str]], settings: LoraSettings) -> dict[str, _Factors]:
        """Check all factors against the checkpoint, and return them by the name of the matrix that they change."""
        if not modules:
            raise CheckpointError(f"{self._weights_file} holds no tensors", remedy="save the adapter again")
        problems: list[str] = []
        found: dict[str, _Factors] = {}
        for module, factors in modules.items():
            matrix = self._linear_layers.get(module)
            if matrix is None:
                problems.append(f"{module} is not a linear layer of {self._base.source}")
            elif matrix.tensor in found:
                problems.append(f"{module} is a second name of {matrix.tensor}")
            elif absent := {"A", "B"} - factors.keys():
                problems.append(f"{module} lacks lora_{absent.pop()}")
            elif wrong := self._misshapen(matrix, factors, settings.rank_of(module)):
                problems.append(f"{module}: {wrong}")
            else:
                found[matrix.tensor] = _Factors(matrix, factors["A"], factors["B"], settings.scale_of(module))
                problems += [f"{f} is not finite" for f in factors.values() if not np.isfinite(self._read(f)).all()]
        if problems:
            listed = "; ".join(problems[:_MAX_LISTED])
            more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
            raise CheckpointError(
                f"{self._weights_file} does not fit: {listed}{more}",
                remedy="name the checkpoint that the adapter was trained on; a tied LM head is part of the embedding, "
                "which no adapter may change",
            )
        return found

    @cached_property
    def _linear_layers(self) -> Mapping[str, _Matrix]:
        """By module: under the checkpoint's names, and under all that transformers' models of the family have."""
        arch, spec = resolve(self._base)
        usual = ARCHITECTURES[arch.model_type]
        stored = _linear_tensors(arch, spec)
        parameters = tuple(_linear_tensors(usual, spec))
        matrices = [_Matrix(n, p, t) for (n, t), p in zip(stored.items(), parameters, strict=True)]
        spellings = [stored, *(_linear_tensors(under_prefix(usual, prefix), spec) for prefix in usual.prefixes)]
        found = {
            name.removesuffix(".weight"): matrix
            for spelling in reversed(spellings)
            for name, matrix in zip(spelling, matrices, strict=True)
        }
        if not spec.tie_word_embeddings:  # transformers 5 calls GPT-NeoX's head so, too
            found.setdefault("lm_head", found[arch.tensor_name(LM_HEAD).removesuffix(".weight")])
        return found

    def _misshapen(self, matrix: _Matrix, factors: dict[str, str], rank: int) -> str:
        rows, columns = self._base.shape(matrix.tensor)[:: -1 if matrix.transposed else 1]
        shapes = [list(self._tensors.get_slice(factors[factor]).get_shape()) for factor in "AB"]
        wanted = [[rank, columns], [rows, rank]]
        return "" if shapes == wanted else f"lora_A, lora_B found {shapes}, expected {wanted} for rank {rank}"

    def _read(self, name: str) -> Floats:
        stored = str(self._tensors.get_slice(name).get_dtype())
        if stored not in FLOAT_TYPES:
            raise UnsupportedError(
                f"{self._weights_file}: tensor {name}",
                found=f"type {stored}",
                expected=f"one of {', '.join(FLOAT_TYPES)}",
            )
        try:
            with np.errstate(over="ignore"):
                return np.asarray(self._tensors.get_tensor(name), dtype=np.float32)
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise CheckpointError(f"{self._weights_file}: tensor {name} cannot be read ({error})") from None


def _linear_tensors(arch: Architecture, spec: ModelSpec) -> dict[str, bool]:
    """Return the tensors of all matrices but the embedding, and whether each is stored as [in, out]."""
    sources = matrix_sources(arch, spec)
    pieces = [piece for name, source in sources.items() if name != names.EMBED_TOKENS for piece in source.pieces]
    return {piece.tensor: piece.transposed for piece in pieces}


def _no_blocks() -> NoReturn:
    raise AssertionError("a merged matrix has no blocks")


def _files(folder: Path) -> tuple[Path, Path]:
    """Return the paths of an adapter's config and weights."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder", expected=f"a folder with {CONFIG_FILE}", remedy="check the path"
        )
    config_file = member(folder, CONFIG_FILE)
    if config_file is None:
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}", remedy="name a folder that peft's save_pretrained has written"
        )
    weights_file = member(folder, WEIGHTS_FILE)
    if weights_file is not None:
        return config_file, weights_file
    if any(folder.glob("adapter_model.*")):
        raise UnsupportedError(
            f"{folder} holds its weights only as a pickle, which may run code",
            expected=WEIGHTS_FILE,
            remedy="load an adapter you trust with peft, and save it with save_pretrained(FOLDER)",
        )
    raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}", remedy="finish the download, or save the adapter again")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({error})", remedy="download it again, or save it again"
        ) from None


def _modules(file: Path, tensors: Any) -> dict[str, dict[str, str]]:
    """Return the tensors of each module, as {module: {"A": tensor, "B": tensor}}."""
    modules: dict[str, dict[str, str]] = {}
    others: list[str] = []
    for name in sorted(tensors.keys()):
        if match := _FACTOR.fullmatch(name):
            modules.setdefault(match["module"], {})[match["factor"]] = name
        else:
            others.append(name)
    if others:
        more = f" and {len(others) - _MAX_LISTED} more" if len(others) > _MAX_LISTED else ""
        raise UnsupportedError(
            f"{file} holds more than the factors of linear layers",
            found=", ".join(others[:_MAX_LISTED]) + more,
            expected="base_model.model.<module>.lora_A.weight and .lora_B.weight only",
            remedy=next((remedy for part, remedy in _KINDS if part in others[0]), MERGE_REMEDY),
        )
    return modules
