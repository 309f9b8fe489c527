"""The id map of a trimmed exit head, when the file is not one."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest

from helpers.inspect_bundles import tiny_spec, write_bundle
from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle, open_bundle
from shortstack.graphs.errors import BundleError
from shortstack.graphs.plan import ExitSpec
from shortstack.runtime.engine.draft_vocab import read_draft_vocab

EXIT = ExitSpec(2, draft_vocab=10)


def bundle_with(folder: Path, content: bytes) -> Bundle:
    bundle = open_bundle(write_bundle(folder / "bundle", tiny_spec(), EXIT))
    (bundle.folder / names.draft_vocab_file(2)).write_bytes(content)
    return bundle


def npy(header: str, version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode("latin1")


def test_ascending_ids_are_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.arange(0, 20, 2))
    found = read_draft_vocab(bundle_with(tmp_path, file.getvalue()), EXIT)
    assert found is not None
    assert found.tolist() == list(range(0, 20, 2))


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000000000000000,), }\n"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10,), }" + " " * 12_000 + "\n"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }\n"),
        npy("(" * 9_000 + "\n"),
        npy("{'descr': [('a', '<i8')] * 3\n"),
        npy("'\n", version=2),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (10,), }\n"),
        b"\x93NUMPY\x01\x00",
        b"PK\x03\x04" + bytes(60),
        bytes(10**6),
        b"",
    ],
    ids=[
        "1e12 ids",
        "1e25 ids",
        "spaces",
        "negative",
        "deep",
        "code",
        "quote",
        "objects",
        "cut",
        "zip",
        "long",
        "empty",
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BundleError, match=r"draft-vocab-02\.npy") as caught:
        read_draft_vocab(bundle_with(tmp_path, content), EXIT)
    assert "\n" not in str(caught.value)
