"""Reads the header of a GGUF file: its metadata, and where each tensor lies.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format. ``gguf.GGUFReader`` reads it too, but
builds a NumPy view per vocabulary entry (5 s for 49 thousand) and does not check lengths, so that a damaged file can
keep it busy for ever. Here every read is checked against the end of the file. What the tensor types mean is left to the
``gguf`` package.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from shortstack.graphs.errors import CheckpointError, UnsupportedError

_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_NESTING = 8
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies, and how it is stored.

    Attributes:
        shape: Row-major, [out, in] for a linear weight (GGUF itself lists the fastest dimension first).
        quantization: The ggml type.
        offset: First byte, from the start of the file.
        size_bytes: Length of the data.
    """

    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata of a GGUF file as Python values, and its tensors by GGUF name."""

    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]


def read_header(file: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: The file cannot be read, is not a GGUF file, is damaged, or ends before its last tensor does.
        UnsupportedError: This version does not read its GGUF version, its byte order or the type of a tensor.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(file, data).parse()
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{file} cannot be read ({error})") from None


class _Parser:
    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file = file
        self.data = data
        self.offset = 0

    def parse(self) -> Header:
        magic = self.take(4)
        if magic != b"GGUF":
            raise CheckpointError(
                f"{self.file} is not a GGUF file", found=f"it starts with {magic!r}", expected="b'GGUF'"
            )
        version = self.scalar("I")
        if version not in _VERSIONS:
            raise UnsupportedError(
                f"{self.file}: GGUF version",
                found="a big-endian file" if version & 0xFFFF == 0 else version,
                expected="little-endian, version 2 or 3",
                remedy="convert the model again with a current llama.cpp",
            )
        tensor_count, field_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, object] = {}
        for _ in range(field_count):
            key = self.string()
            if key in metadata:
                raise self.damaged(f"the field {key} occurs twice")
            metadata[key] = self.value(self.scalar("I"))
        entries = [self.tensor_entry() for _ in range(tensor_count)]
        return Header(metadata, self.place(entries, metadata))

    def place(
        self, entries: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], metadata: dict[str, object]
    ) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.offset // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, quantization, offset in entries:
            block_values, block_bytes = GGML_QUANT_SIZES[quantization]
            if not shape or shape[-1] % block_values:
                raise self.damaged(f"tensor {name} of shape {list(shape)} is not made of {block_values}-value blocks")
            if name in tensors:
                raise self.damaged(f"tensor {name} occurs twice")
            size_bytes = math.prod(shape) // block_values * block_bytes
            tensors[name] = TensorInfo(shape, quantization, start + offset, size_bytes)
        end, last = max(((info.offset + info.size_bytes, name) for name, info in tensors.items()), default=(0, ""))
        if end > len(self.data):
            raise CheckpointError(
                f"{self.file} is cut off in tensor {last}",
                found=f"{len(self.data):,} bytes",
                expected=f"{end:,}",
                remedy="download the file again",
            )
        return tensors

    def tensor_entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.string()
        dims = self.scalar("I")
        if dims > _MAX_DIMS:
            raise self.damaged(f"tensor {name} has {dims} dimensions")
        shape = tuple(reversed([self.scalar("Q") for _ in range(dims)]))
        kind, offset = self.scalar("I"), self.scalar("Q")
        try:
            return name, shape, GGMLQuantizationType(kind), offset
        except ValueError:
            raise UnsupportedError(
                f"{self.file}: tensor {name} has the unknown type {kind}",
                remedy="update the gguf package, or name a file of a common type (Q4_K_M, Q8_0, F16)",
            ) from None

    def value(self, kind: int, nesting: int = 0) -> object:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.damaged(f"a metadata value has the unknown type {kind}")
        item_kind, count = self.scalar("I"), self.scalar("Q")
        if item_kind in _SCALARS:
            code = f"<{count}{_SCALARS[item_kind]}"
            if count > len(self.data):
                raise self.damaged("a metadata array is longer than the file")
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        if item_kind == _STRING:
            return [self.string() for _ in range(count)]
        if item_kind != _ARRAY:
            raise self.damaged(f"a metadata array holds values of the unknown type {item_kind}")
        if nesting == _MAX_NESTING:
            raise self.damaged(f"metadata arrays are nested more than {_MAX_NESTING} deep")
        return [self.value(_ARRAY, nesting + 1) for _ in range(count)]

    def scalar(self, code: str) -> int:
        """Read one little-endian number; typed int, although metadata values may be floats and bools."""
        number: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return number

    def string(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{raw[:40]!r} is not UTF-8") from None

    def take(self, size_bytes: int) -> bytes:
        end = self.offset + size_bytes
        if end > len(self.data):
            raise CheckpointError(
                f"{self.file} is cut off or damaged: its header does not end before the file does",
                found=f"{len(self.data):,} bytes",
                remedy="download the file again",
            )
        raw = self.data[self.offset : end]
        self.offset = end
        return raw

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file} is damaged: {what}", remedy="download the file again")
