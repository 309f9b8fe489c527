"""A part of a matrix that is read alone is that part of the whole matrix, whatever the checkpoint is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.adapters import lora
from helpers.gguf_files import Kind, byte_level, of_checkpoint, write
from helpers.tiny_models import BASE, SWITCHES, TinyBundles
from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.checkpoint import Checkpoint, open_checkpoint
from shortstack.export.checkpoint.checkpoint import read_part, reads_parts

TINY = {tiny.name: tiny for tiny in SWITCHES}
PARTS = [(slice(0, 5), slice(None)), (slice(None), slice(32, 64)), (slice(7, 40), slice(3, 11))]
EMBEDDING, QUERIES = "model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.weight"


def check(checkpoint: Checkpoint, name: str) -> None:
    whole = checkpoint.tensor(name)
    for rows, columns in PARTS:
        found = read_part(checkpoint, name, rows, columns)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, whole[rows, columns])


@pytest.mark.parametrize("name", ["base", "stored-bfloat16", "stored-float16", "sharded"])
def test_of_a_folder(tiny_bundles: TinyBundles, name: str) -> None:
    checkpoint = open_checkpoint(str(tiny_bundles.checkpoint(TINY[name])))
    for tensor in (EMBEDDING, QUERIES):
        assert reads_parts(checkpoint, tensor)
        check(checkpoint, tensor)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_of_a_gguf_file(tiny_bundles: TinyBundles, tmp_path: Path, kind: str) -> None:
    tensors = of_checkpoint(tiny_bundles.checkpoint(BASE), BASE.layers)
    file = write(tmp_path / "m.gguf", tensors, edit=byte_level, quantization=Kind[kind], tiny=BASE)
    checkpoint = open_checkpoint(str(file))
    assert reads_parts(checkpoint, EMBEDDING)
    assert reads_parts(checkpoint, QUERIES)  # whose rows llama.cpp's converter has moved
    for tensor in (EMBEDDING, QUERIES):
        check(checkpoint, tensor)


def test_of_a_checkpoint_with_an_adapter(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    folder = tiny_bundles.checkpoint(BASE)
    checkpoint = AdaptedCheckpoint(open_checkpoint(str(folder)), lora(tmp_path / "adapter", folder))
    assert reads_parts(checkpoint, EMBEDDING)
    assert not reads_parts(checkpoint, QUERIES)
    for tensor in (EMBEDDING, QUERIES):
        check(checkpoint, tensor)
