"""Writes files of torch.save: sound ones from a folder of safetensors, and hostile ones whose numbers are made up."""

from __future__ import annotations

import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class Code:
    """Creates a folder when it is unpickled by a reader that calls whatever a pickle names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(self.path),)


class Storage:
    """What a pickle says about a storage: the record of its bytes, and how many numbers it claims to be."""

    def __init__(self, key: str, numbers: int) -> None:
        self.pid = ("storage", torch.FloatStorage, key, "cpu", numbers)


class Claim:
    """What a pickle says about a tensor: a part of a storage, with any shape and strides."""

    def __init__(
        self, storage: Storage, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, offset: int = 0
    ) -> None:
        if strides is None:
            strides = tuple(torch.empty(shape, device="meta").stride())
        self._arguments = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self._arguments  # type: ignore[attr-defined]


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Storage) else None


def write_claims(file: Path, content: object, records: Mapping[str, bytes]) -> Path:
    """Write a file as torch.save does, whose pickle claims anything about the records."""
    stream = io.BytesIO()
    _Pickler(stream, 2).dump(content)
    writer = torch._C.PyTorchFileWriter(str(file))
    for name, record in {"data.pkl": stream.getvalue(), "byteorder": b"little"}.items():
        writer.write_record(name, record, len(record))
    for key, record in records.items():
        writer.write_record(f"data/{key}", record, len(record))
    writer.write_end_of_file()
    return file


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Take the tensors out of a folder's safetensors, which are deleted."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= {name: value.clone() for name, value in load_file(file).items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return state


def write_pickled_shards(folder: Path, state: Mapping[str, torch.Tensor], count: int) -> list[Path]:
    """Write pytorch_model-0000i-of-0000n.bin and their index."""
    files = [folder / f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin" for number in range(count)]
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files):
        names = sorted(state)[number::count]
        torch.save({name: state[name] for name in names}, file)
        weight_map |= dict.fromkeys(names, file.name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return files
