"""The benchmark of `export --preset` measures what it says, on a checkpoint that it makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shortstack.export.arch import resolve
from shortstack.export.checkpoint import open_checkpoint
from shortstack.graphs.kv_map import parse_kv_map
from shortstack.samples.bench import straight
from shortstack.samples.bench.made_model import SHAPES, Shape, write_model

TINY = Shape(2, 64, 96, 4, 2, 16, 5000, is_tied=False)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_made_checkpoint_has_the_shapes_of_its_config(tmp_path: Path, is_tied: bool) -> None:
    write_model(tmp_path, Shape(3, 64, 96, 4, 2, 16, 5000, is_tied))
    checkpoint = open_checkpoint(str(tmp_path))
    _, spec = resolve(checkpoint)  # which refuses tensors that do not fit
    assert (spec.num_hidden_layers, spec.vocab_size, spec.tie_word_embeddings) == (3, 5000, is_tied)
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    assert np.isclose(embedding.std(), 0.02, rtol=0.05)
    assert len(np.unique(embedding[4096:, 0])) > 1  # slices are not copies


def test_layers_of_a_made_checkpoint_may_share_keys_and_values(tmp_path: Path) -> None:
    write_model(tmp_path, Shape(4, 64, 96, 4, 2, 16, 300, is_tied=True, kv_map=parse_kv_map("pizza-bottom:2", 4)))
    checkpoint = open_checkpoint(str(tmp_path))
    _, spec = resolve(checkpoint)
    assert spec.kv_map == (0, 1, 1, 1)
    assert "model.layers.2.self_attn.k_proj.weight" not in checkpoint.names()


def test_shapes_have_as_many_weights_as_the_models_they_are_named_after() -> None:
    for name, billions in (("1b", 1.24), ("8b", 8.03)):
        count = sum(int(np.prod(shape)) for shard in SHAPES[name].shards() for shape in shard.values())
        assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_it_measures_a_quantization_and_loads_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight, "SHAPES", {"tiny": TINY})
    found = straight.measure("tiny", None, tmp_path, ("--method", "rtn", "--kv-cache", "float"), loads=True)
    assert found.layers == 2
    assert 0 < found.weights_mb < found.checkpoint_mb
    assert found.cpu_s > 0
    assert 20 < found.anonymous_mb < 2000  # an interpreter with numpy takes so much
    assert 20 < found.decoded_anonymous_mb <= found.decoded_rss_mb


def test_memory_of_a_process_that_has_ended_is_nothing() -> None:
    assert straight.anonymous_bytes(2**30) == 0
