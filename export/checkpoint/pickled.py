"""Reads the state dict of a torch.save file, as ``safe_open`` of safetensors reads a file of its own.

Such a file is a zip archive with a pickle and the raw bytes of each tensor. A pickle may call any function. So before
anything is built, its functions are listed, without calling one: only those that build tensors and dicts may be there
(:data:`_FUNCTIONS`). Then torch's restricted unpickler opens it, which allows few others itself. Tensors are
memory-mapped. The file may claim no more bytes than it holds.

::

    {"model.norm.weight": tensor, ...}                   a state dict
    {"model": {...}, "optimizer": {...}, "epoch": 3}     one in a wrapper (:data:`WRAPPERS`); the rest is not read
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shortstack.graphs.errors import CheckpointError, UnsupportedError, shortened

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Names under which training code stores a state dict next to other things."""

_MAX_PICKLE_BYTES = 64 << 20
"""The largest pickle in a file. It holds names and shapes: 200 bytes for each tensor."""

_MOST_SHARING = 2
"""How many times the bytes of a file its tensors may take together: a tied head is the embedding under another name."""

_FUNCTIONS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch (\w+Storage|Size|device|float\d+|bfloat16|u?int\d+|bool)"
    r"|torch\.storage UntypedStorage"
)
_SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_AGAIN = "download it again, and compare its size with the one at the source"
_SAVE_TENSORS = "save the tensors of a checkpoint you trust alone: torch.save(model.state_dict(), FILE)"


class PickledSlice:
    """A tensor of which nothing has been read yet.

    Args:
        value: The tensor, memory-mapped.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self._value.shape)

    def get_dtype(self) -> str:
        """Return its type by the name that safetensors has for it, or by torch's if that has none."""
        return _SAFETENSORS_TYPES.get(self._value.dtype, str(self._value.dtype).removeprefix("torch."))

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        return _array(self._value[index])


class PickledFile:
    """The state dict of one file; the methods are those of safetensors' ``safe_open`` with ``framework="np"``.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is damaged, holds no state dict, or claims more than it holds.
        UnsupportedError: It holds other things than tensors, or is in the format that torch had before 1.6.
    """

    def __init__(self, path: Path) -> None:
        self._tensors = _state_dict(path, _load(path))
        _check_claims(path, self._tensors)

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def get_slice(self, name: str) -> PickledSlice:
        """Return a tensor to read in part."""
        return PickledSlice(self._tensors[name])

    def get_tensor(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor, C-contiguous; bfloat16 as float32, which holds the same numbers."""
        return _array(self._tensors[name])


def _array(value: torch.Tensor) -> npt.NDArray[Any]:
    whole = value.float() if value.dtype == torch.bfloat16 else value
    return np.ascontiguousarray(whole.numpy()).reshape(tuple(whole.shape))


def _load(path: Path) -> object:
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile file can make torch raise nearly anything
        raise CheckpointError(
            f"{path} is not a complete torch.save file ({_first_line(error)})", remedy=_AGAIN
        ) from None


def _check_archive(path: Path) -> None:
    """Check sizes and functions before torch opens a file.

    Raises:
        CheckpointError: It is no archive, or claims to hold more than it does.
        UnsupportedError: Its pickle would call a function that builds no tensor.
    """
    try:
        size = path.stat().st_size
        if not zipfile.is_zipfile(path):
            raise UnsupportedError(
                f"{path} is not a complete torch.save file",
                expected="a zip archive, as torch 1.6 and later write",
                remedy=f"{_AGAIN}; a file of an older torch, load where you trust it and save it as safetensors",
            )
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            claimed = sum(record.file_size for record in records)
            if claimed > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise CheckpointError(
                    f"{path} claims more than it holds",
                    found=f"{claimed} bytes in {size}",
                    expected="records that are not compressed, as torch.save writes them",
                    remedy=_AGAIN,
                )
            pickles = [record for record in records if record.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path} is not a torch.save file",
                    found=f"{len(pickles)} records data.pkl of {sum(each.file_size for each in pickles)} bytes",
                    expected=f"one of at most {_MAX_PICKLE_BYTES}",
                    remedy=_AGAIN,
                )
            content = archive.read(pickles[0])
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can make zipfile raise nearly anything
        raise CheckpointError(
            f"{path} is not a complete torch.save file ({_first_line(error)})", remedy=_AGAIN
        ) from None
    if (function := _foreign_function(path, content)) is not None:
        raise UnsupportedError(
            f"{path} holds {shortened(function, 80)}, and unpickling that may run code",
            expected="tensors in a dict, and numbers and texts beside it",
            remedy=_SAVE_TENSORS,
        )


def _foreign_function(path: Path, content: bytes) -> str | None:
    """Return the first function that a pickle names and that builds no tensor or dict; nothing is called."""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "GLOBAL":
                if _FUNCTIONS.fullmatch(str(argument)) is None:
                    return str(argument).replace(" ", ".")
            elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                return f"the opcode {opcode.name}"
    except Exception as error:  # of pickletools, whose own are ValueErrors, on any bytes
        raise CheckpointError(f"{path} holds a damaged pickle ({_first_line(error)})", remedy=_AGAIN) from None
    return None


def _state_dict(path: Path, content: object) -> dict[str, torch.Tensor]:
    """Return the tensors of what a file holds, by name, out of their wrapper if they have one."""
    place = ""
    if isinstance(content, dict):
        inner = [name for name in WRAPPERS if isinstance(content.get(name), dict)]
        if len(inner) > 1:
            raise CheckpointError(f"{path} holds several state dicts ({', '.join(inner)})", remedy=_SAVE_TENSORS)
        if inner:
            place, content = f", {inner[0]}", content[inner[0]]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path}{place} holds no state dict",
            found="an empty dict" if isinstance(content, dict) else type(content).__name__,
            expected=f"tensors by name, or that under one of {', '.join(WRAPPERS)}",
            remedy=_SAVE_TENSORS,
        )
    found: dict[str, torch.Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UnsupportedError(
                f"{path}{place}: entry {shortened(repr(name), 80)}",
                found=type(value).__name__ if isinstance(name, str) else f"a name of type {type(name).__name__}",
                expected="a tensor for every name",
                remedy=_SAVE_TENSORS,
            )
        found[name] = value.detach()
    return found


def _check_claims(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Check that no tensor is larger than its stored bytes, and all together not larger than the file.

    Views may repeat stored bytes any number of times: a stride of 0 makes terabytes of four bytes.
    """
    for name, value in tensors.items():
        claimed, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if value.device.type != "cpu" or value.layout != torch.strided or claimed > stored:
            raise CheckpointError(
                f"{path}: tensor {shortened(name, 80)} claims more than is stored",
                found=f"{list(value.shape)} with strides {list(value.stride())}, {claimed} bytes",
                expected=f"at most the {stored} bytes of its storage",
                remedy=_SAVE_TENSORS,
            )
    total, size = sum(value.numel() * value.element_size() for value in tensors.values()), path.stat().st_size
    if total > _MOST_SHARING * size:
        raise CheckpointError(
            f"{path}: its {len(tensors)} tensors share their bytes and would take more than the file holds",
            found=f"{total} bytes",
            expected=f"at most {_MOST_SHARING} x {size}",
            remedy=_SAVE_TENSORS,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
