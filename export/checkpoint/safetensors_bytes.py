"""Reads tensors from safetensors files as bytes, for types that NumPy does not have.

https://github.com/huggingface/safetensors#format: eight bytes hold the length of a JSON header, which names the first
and the last byte of each tensor behind it. The library has checked the header when the file was opened.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

_LENGTH = struct.Struct("<Q")


def read_bytes(file: Path, name: str) -> npt.NDArray[np.uint8]:
    """Return a tensor of one byte an element, in its shape.

    Args:
        file: A file that safetensors has opened.
        name: The tensor.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has changed, or the tensor has elements of another size.
        KeyError: It has changed.
    """
    with file.open("rb") as stream:
        (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
        if not 0 < length <= file.stat().st_size:
            raise ValueError(f"a header of {length} bytes")
        entry = json.loads(stream.read(length))[name]
    first, last = entry["data_offsets"]
    return np.fromfile(file, np.uint8, last - first, offset=_LENGTH.size + length + first).reshape(entry["shape"])
