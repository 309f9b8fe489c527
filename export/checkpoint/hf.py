"""Reads Hugging Face folders: the config, one safetensors file or shards with an index, and the tokenizer's files.

Tensors are memory-mapped and converted one at a time. The folder is treated as untrusted: shard names must be plain
file names, and links must not lead out of the folder (except into the ``blobs`` of the hub's own cache). Pickles are
opened only where that is asked for, and never run code (:mod:`shortstack.export.checkpoint.pickled`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from shortstack.export.checkpoint.checkpoint import (
    Progress,
    StoredBlocks,
    StoredExit,
    hash_files,
    unknown_tensor,
)
from shortstack.export.checkpoint.config import Config, parse_json_object
from shortstack.export.checkpoint.float_types import FLOAT_TYPES
from shortstack.export.checkpoint.resolved_tokenizer import MORE_FILES
from shortstack.export.checkpoint.safetensors_bytes import read_bytes
from shortstack.export.checkpoint.tokenizer_files import complete_files
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.links import stays_inside
from shortstack.graphs.names import TEXT_FILES
from shortstack.graphs.path_kind import is_pickle
from shortstack.graphs.read_file import read_file
from shortstack.graphs.spec import ModelSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)[\w.-]*")  # what Trainers leave


class HuggingFaceCheckpoint:
    """A folder of safetensors with a ``config.json``; the methods are those of ``Checkpoint``.

    Args:
        folder: The folder.
        source: The name that the user gave, if it is not the folder itself, such as a hub id.
        follow_links: Follow links that lead out of the folder.
        allow_pickle: Read pickles, if there are no safetensors.
        weights: The names of the file with the weights, and of the index of their shards; None finds them.
        config: The config, where it is not in ``config.json``.

    Attributes:
        is_pickled: The weights are pickles.

    Raises:
        CheckpointError: A file is missing, damaged or outside the folder.
        UnsupportedError: The weights are there only as pickles, and these may not be read or hold more than tensors.
    """

    def __init__(
        self,
        folder: Path,
        source: str | None = None,
        *,
        follow_links: bool = False,
        allow_pickle: bool = False,
        weights: tuple[str, str] | None = None,
        config: Config | None = None,
    ) -> None:
        self.source = str(folder) if source is None else source
        self.folder_or_file = folder
        self._follow_links = follow_links
        self.config = read_config(folder, follow_links=follow_links) if config is None else config
        promised = find_weight_files(folder, weights, follow_links=follow_links, allow_pickle=allow_pickle)
        self.is_pickled = allow_pickle and any(map(is_pickle, promised))
        self._shards = {file: _open_pickle(file) if self.is_pickled else _open(file) for file in promised}
        self._file_of: dict[str, Path] = {}
        for file, shard in self._shards.items():
            stored = frozenset(shard.keys())
            if absent := sorted(promised[file] - stored):
                raise CheckpointError(
                    f"{file} lacks {len(absent)} tensors that the index places there ({', '.join(absent[:10])})",
                    remedy="download the checkpoint again: its index and shards are of different versions",
                )
            if twice := sorted(stored & self._file_of.keys()):
                raise CheckpointError(
                    f"{folder} holds {len(twice)} tensors twice, such as {twice[0]} in {self._file_of[twice[0]].name} "
                    f"and {file.name}",
                    remedy="remove the file that does not belong to this model",
                )
            self._file_of |= dict.fromkeys(stored, file)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files with the weights, sorted by name."""
        return tuple(self._shards)

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return tuple(self._shard(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Read one tensor as C-contiguous float32."""
        shard = self._shard(name)
        file = self._file_of[name]
        stored = str(shard.get_slice(name).get_dtype())
        if stored not in FLOAT_TYPES:
            raise UnsupportedError(
                f"{file}: tensor {name}",
                found=f"type {stored}",
                expected=f"one of {', '.join(FLOAT_TYPES)}",
                remedy="name the checkpoint before it was quantized",
            )
        try:
            value: npt.NDArray[Any] = shard.get_tensor(name)
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read ({error})") from None
        return np.ascontiguousarray(value, dtype=np.float32).reshape(value.shape)

    def reads_parts(self, name: str) -> bool:
        """Return whether a part can be read without the rest: of any tensor that can be read."""
        return str(self._shard(name).get_slice(name).get_dtype()) in FLOAT_TYPES  # else `tensor` says what is wrong

    def part(self, name: str, rows: slice, columns: slice) -> npt.NDArray[np.float32]:
        """Read a part of a matrix as C-contiguous float32, without the rest."""
        try:
            value = self._shard(name).get_slice(name)[rows, columns]
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise CheckpointError(f"{self._file_of[name]}: tensor {name} cannot be read ({error})") from None
        return np.ascontiguousarray(value, dtype=np.float32)

    def stored_type(self, name: str) -> str:
        """Return a tensor's type by the name that safetensors has for it, such as ``I32``."""
        return str(self._shard(name).get_slice(name).get_dtype())

    def raw(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor in its stored type; 8-bit floats, which NumPy has no types for, as bytes."""
        shard, file = self._shard(name), self._file_of[name]
        try:
            if self.stored_type(name).startswith("F8_"):
                return read_bytes(file, name)
            value: npt.NDArray[Any] = shard.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError, MemoryError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read ({error})") from None
        return value

    def json_file(self, name: str) -> Config | None:
        """Return another JSON file of the folder; None if there is no such file."""
        file = member(self.folder_or_file, name, follow_links=self._follow_links)
        return None if file is None else Config(parse_json_object(_read(file), file), str(file))

    def where(self, name: str) -> str:
        """Return a tensor and its file, for messages."""
        self._shard(name)
        return f"{self._file_of[name]}: tensor {name}"

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return None: this reader accepts only tensors that are stored as floats."""
        self._shard(name)
        return None

    def exits(self, spec: ModelSpec) -> tuple[StoredExit, ...]:
        """Return an empty tuple: the exits of a transformers model lie in a separate folder."""
        return ()

    def files(self) -> dict[str, bytes]:
        """Return the content of the tokenizer's files that exist, and always a generation config."""
        found = self.stored_files()
        return complete_files(found, self.config, str(self.folder_or_file), is_resolved=False)

    def stored_files(self) -> dict[str, bytes]:
        """Return the content of the tokenizer's files as they are."""
        folder, follow = self.folder_or_file, self._follow_links
        paths = {name: member(folder, name, follow_links=follow) for name in (*TEXT_FILES, *MORE_FILES)}
        return {name: _read(path) for name, path in paths.items() if path is not None}

    def digest(self, progress: Progress | None = None) -> str:
        """Return the SHA-256 over ``config.json`` and the weight files, each preceded by its name and size."""
        return hash_files((self.folder_or_file / "config.json", *self._shards), label=True, progress=progress)

    def _shard(self, name: str) -> Any:
        if name not in self._file_of:
            raise unknown_tensor(name, self.folder_or_file)
        return self._shards[self._file_of[name]]


def read_config(folder: Path, name: str = "config.json", *, follow_links: bool = False) -> Config:
    """Read the JSON file of a folder that describes the model; errors as for the other files."""
    file = member(folder, name, follow_links=follow_links)
    if file is None:
        raise CheckpointError(
            f"{folder} has no {name}", remedy="name a folder that transformers' save_pretrained wrote, or a .gguf"
        )
    return Config(parse_json_object(_read(file), file), str(file))


def find_weight_files(
    folder: Path, usual: tuple[str, str] | None = None, *, follow_links: bool = False, allow_pickle: bool = False
) -> dict[Path, frozenset[str]]:
    """Return the weight files of a folder, sorted by name, each with the names of the tensors that an index lists.

    ``model.safetensors`` takes precedence over an index, as in transformers. A single ``*.safetensors`` of another name
    is accepted. Pickles come last, in the same order.

    Args:
        folder: The folder.
        usual: The names of the one file, and of an index of shards; None finds them.
        follow_links: Follow links that lead out of the folder.
        allow_pickle: Accept pickles.

    Raises:
        CheckpointError: The index is damaged, names a file that is missing or outside the folder, or there are no
            weights.
        UnsupportedError: There are only pickles, and they are not accepted.
    """
    find = partial(member, folder, follow_links=follow_links)
    if usual is not None and (found := _usual_files(folder, *usual, find)) is not None:
        return found
    if (found := _usual_files(folder, WEIGHTS_FILE, INDEX_FILE, find)) is not None:
        return found
    candidates = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(candidates) == 1 and (weights_file := find(candidates[0])) is not None:
        return {weights_file: frozenset()}
    if candidates:
        raise _several(folder, candidates, "safetensors files", INDEX_FILE if usual is None else usual[1])
    pickles = sorted(file.name for file in folder.glob("*") if is_pickle(file) and not _NOT_WEIGHTS.match(file.name))
    if not pickles:
        raise CheckpointError(
            f"{folder} has no weights",
            expected=f"{WEIGHTS_FILE}, or shards with {INDEX_FILE}",
            remedy="finish the download, or name the folder that holds the weights",
        )
    if not allow_pickle:
        raise only_pickles(f"{folder} holds its weights only as pickles ({', '.join(pickles[:3])})")
    if (found := _usual_files(folder, PICKLED_FILE, PICKLED_INDEX_FILE, find)) is not None:
        return found
    if len(pickles) == 1 and (weights_file := find(pickles[0])) is not None:
        return {weights_file: frozenset()}
    raise _several(folder, pickles, "pickles", PICKLED_INDEX_FILE)


def only_pickles(what: str) -> UnsupportedError:
    """Return the error for weights that are pickles, where these may not be read."""
    return UnsupportedError(
        f"{what}, which may run code",
        expected=f"{WEIGHTS_FILE}, or shards with {INDEX_FILE}",
        remedy="convert a checkpoint you trust with `AutoModelForCausalLM.from_pretrained(FOLDER)"
        ".save_pretrained(NEW_FOLDER, safe_serialization=True)` from transformers; or add --allow-pickle, which reads "
        "tensors and runs nothing",
    )


def _usual_files(
    folder: Path, whole: str, index: str, find: Callable[[str], Path | None]
) -> dict[Path, frozenset[str]] | None:
    """Return the one file, or the shards of an index, under transformers' names for them; None for neither."""
    if (weights_file := find(whole)) is not None:
        return {weights_file: frozenset()}
    return None if (index_file := find(index)) is None else _files_of_index(folder, index_file, find)


def _several(folder: Path, files: list[str], kind: str, index: str) -> CheckpointError:
    listed = ", ".join(files[:5])
    return CheckpointError(
        f"{folder} holds {len(files)} {kind} ({listed}) and no {index} that says which belong together",
        remedy=f"add {index}, or keep one file",
    )


def _files_of_index(folder: Path, index_file: Path, find: Callable[[str], Path | None]) -> dict[Path, frozenset[str]]:
    index = Config(parse_json_object(_read(index_file), index_file), str(index_file))
    weight_map = index.section("weight_map")
    if weight_map is None or not weight_map.data:
        raise CheckpointError(f"{index_file}: weight_map is missing or empty", remedy="download the file again")
    shards = sorted({weight_map.read(str, tensor) for tensor in weight_map.data})
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
            raise CheckpointError(
                f"{index_file}: weight_map",
                found=f"the shard name {shard!r}",
                expected="a plain file name in the same folder",
            )
    files = {shard: find(shard) for shard in shards}
    missing = [shard for shard, file in files.items() if file is None]
    if missing:
        listed = ", ".join(missing[:10])
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} files that {index_file.name} names ({listed})",
            remedy="finish the download",
        )
    return {
        file: frozenset(tensor for tensor, holder in weight_map.data.items() if holder == shard)
        for shard, file in files.items()
        if file is not None
    }


def member(folder: Path, name: str, *, follow_links: bool = False) -> Path | None:
    """Return the path of a file in a checkpoint folder, or None; the file must not be a link that leads out of it.

    A snapshot in the hub's cache, ``models--org--name/snapshots/<commit>/``, consists of links into
    ``models--org--name/blobs/``; those are allowed, wherever the cache itself lies.

    Args:
        folder: The folder.
        name: The file's name in it.
        follow_links: Follow links that lead out of it, too.

    Raises:
        CheckpointError: The file is a link that leads out of the folder, or cannot be accessed.
    """
    path = folder / name
    try:
        is_inside = follow_links or stays_inside(path, folder)
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle, before Python 3.13
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    if not is_inside:
        raise CheckpointError(
            f"{path} is a link that leads out of the folder, to {os.path.realpath(path)}",
            remedy="copy the file into the folder; where the folder is your own, --follow-links reads it as it is",
        )
    return path if is_file else None


def _read(file: Path) -> bytes:
    return read_file(file, CheckpointError, "download the file again")


def _open_pickle(file: Path) -> Any:
    from shortstack.export.checkpoint.pickled import PickledFile  # brings torch

    return PickledFile(file)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({error})",
            remedy="download it again, and compare its size with the one at the source",
        ) from None
