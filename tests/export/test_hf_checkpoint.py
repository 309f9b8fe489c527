"""Hugging Face folders, valid and hostile."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors
from safetensors.numpy import save_file

from helpers.hf_folders import (
    CONFIG,
    EMBEDDING,
    HEAD,
    HIDDEN,
    SHAPES,
    edit_index,
    tensors,
    write,
    write_sharded,
    write_shards,
)
from shortstack.export.arch import resolve
from shortstack.export.checkpoint import open_checkpoint
from shortstack.graphs.errors import CheckpointError, UnsupportedError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "m")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_every_stored_type_reads_as_float32(tmp_path: Path, dtype: Any) -> None:
    weights = tensors(dtype)
    checkpoint = open_checkpoint(str(write(tmp_path / "m", weights)))
    assert checkpoint.names() == frozenset(SHAPES)
    for name, value in weights.items():
        read = checkpoint.tensor(name)
        assert read.dtype == np.float32
        assert read.flags.c_contiguous
        assert checkpoint.shape(name) == read.shape == SHAPES[name]
        np.testing.assert_array_equal(read, value.astype(np.float32))


def test_shards_that_transformers_saved_are_read_the_same(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(str(tmp_path))
    _, spec = resolve(checkpoint)
    attention = spec.layers[0].attention
    assert (attention.kv_heads, attention.head_dim, spec.tie_word_embeddings) == (
        2,
        4,
        True,
    )
    state = model.state_dict()
    for name in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.tensor(name), state[name].float().numpy())


def test_a_missing_generation_config_is_built_from_the_config(tmp_path: Path) -> None:
    files = open_checkpoint(str(write(tmp_path / "m", tensors()))).files()
    assert set(files) == {"generation_config.json"}
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": [2, 3]}


def test_tokenizer_files_are_copied_and_the_chat_template_becomes_a_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tensors())
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ x }}é"}]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    files = open_checkpoint(str(folder)).files()
    assert files["chat_template.jinja"].decode() == "{{ x }}é"
    assert files["generation_config.json"] == b'{"eos_token_id": 7}'
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    (folder / "chat_template.jinja").write_text("mine")
    assert open_checkpoint(str(folder)).files()["chat_template.jinja"] == b"mine"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{"),
        ("generation_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": ""}]}'),
    ],
)
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    folder = write(tmp_path / "m", tensors())
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(str(folder)).files()


def test_the_digest_changes_with_weights_and_config_and_reports_progress(tmp_path: Path) -> None:
    weights = tensors()
    steps: list[tuple[int, int]] = []
    first = open_checkpoint(str(write(tmp_path / "m", weights))).digest(lambda done, total: steps.append((done, total)))
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert steps[-1][0] == steps[-1][1] > 0
    assert open_checkpoint(str(write(tmp_path / "copy", weights))).digest() == first
    assert open_checkpoint(str(write(tmp_path / "m", weights, rms_norm_eps=1e-6))).digest() != first
    weights["model.norm.weight"][0] += 1
    assert open_checkpoint(str(write(tmp_path / "n", weights))).digest() != first


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_truncated_weights_name_the_file(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path / "m", tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        open_checkpoint(str(tmp_path / "m"))


def test_an_index_that_names_missing_files_lists_them(sharded: Path) -> None:
    (sharded / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 files .*b\.safetensors"):
        open_checkpoint(str(sharded))


def test_an_index_that_lists_tensors_its_shards_lack_is_refused(sharded: Path) -> None:
    edit_index(sharded, "model.other.weight", "a.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*model\.other\.weight"):
        open_checkpoint(str(sharded))


def test_an_index_without_a_weight_map_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map is missing"):
        open_checkpoint(str(sharded))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    names = list(SHAPES)
    shards = {"a.safetensors": names, "b.safetensors": names[:1]}
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(str(write_shards(tmp_path / "m", tensors(), shards)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_not_opened_and_the_error_names_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UnsupportedError, match=f"pickles \\({name}\\).*safe_serialization"):
        open_checkpoint(str(tmp_path))


def test_a_folder_without_weights_or_with_unrelated_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(str(tmp_path))
    save_file(tensors(), tmp_path / "only.safetensors")
    assert open_checkpoint(str(tmp_path)).names() == frozenset(SHAPES)
    save_file(tensors(), tmp_path / "second.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\udcff"])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "m", tensors())
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(folder))


def test_a_type_that_is_not_floating_point_is_refused(tmp_path: Path) -> None:
    weights = tensors()
    weights["model.norm.weight"] = np.ones(HIDDEN, np.int8)
    checkpoint = open_checkpoint(str(write(tmp_path / "m", weights)))
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight: found type I8"):
        checkpoint.tensor("model.norm.weight")


def test_an_unknown_tensor_raises_a_checkpoint_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write(tmp_path / "m", tensors())))
    with pytest.raises(CheckpointError, match=r"has no tensor nope"):
        checkpoint.tensor("nope")
    with pytest.raises(CheckpointError, match=r"has no tensor nope"):
        checkpoint.shape("nope")


def test_all_differences_from_the_config_come_in_one_message(tmp_path: Path) -> None:
    weights = tensors()
    del weights["model.norm.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(HIDDEN, np.float32)
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, HIDDEN), np.float32)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    with pytest.raises(CheckpointError) as caught:
        resolve(open_checkpoint(str(write(tmp_path / "m", weights))))
    message = str(caught.value)
    assert "1 missing (model.norm.weight)" in message
    assert "1 extra (model.layers.0.self_attn.q_proj.bias)" in message
    assert "1 misshapen (model.layers.0.mlp.up_proj.weight is [3, 16], not [24, 16])" in message
    assert "\n" not in message


def test_long_lists_of_differences_are_shortened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"18 missing \(.*and 8 more\)"):
        resolve(open_checkpoint(str(write(tmp_path / "m", tensors(), num_hidden_layers=3))))


def test_an_untied_model_needs_a_head(tmp_path: Path) -> None:
    weights = tensors()
    folder = write(tmp_path / "m", weights, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight may be absent only if tie_word_embeddings is true"):
        resolve(open_checkpoint(str(folder)))
    weights[HEAD] = weights[EMBEDDING].copy()
    _, spec = resolve(open_checkpoint(str(write(tmp_path / "m", weights, tie_word_embeddings=False))))
    assert not spec.tie_word_embeddings


def test_a_tied_model_may_store_its_head_but_no_different_one(tmp_path: Path) -> None:
    weights = tensors()
    weights[HEAD] = weights[EMBEDDING].copy()
    resolve(open_checkpoint(str(write(tmp_path / "m", weights))))
    weights[HEAD][0, 0] += 1
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        resolve(open_checkpoint(str(write(tmp_path / "m", weights))))


@pytest.mark.parametrize(
    "source",
    [
        "/no/such/folder",
        "./nothing",
        "a/b/c",
        "model.gguf",
        "org/file.gguf",
        "",
        "org/na me",
        "x" * 5000,
        "~nobody-here/x",
        "a\0b",
    ],
)
def test_a_source_that_is_neither_on_disk_nor_a_hub_id_is_refused_offline(
    source: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        open_checkpoint(source)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match=r"is a file: expected a \.gguf file or a folder"):
        open_checkpoint(str(file))


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # their constructors want a live HTTP response
    Exception.__init__(error, "first line\nsecond line")
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(hub_errors.GatedRepoError), "gated .*hf auth login"),
        (http_error(hub_errors.RepositoryNotFoundError), "nor a model on the hub"),
        (http_error(hub_errors.RevisionNotFoundError), "no revision 'v1'"),
        (hub_errors.HFValidationError("bad name"), "not a valid hub id"),
        (hub_errors.LocalEntryNotFoundError("offline"), "hub cannot be reached"),
        (ConnectionError("refused"), "cannot be fetched .*refused"),
        (http_error(hub_errors.HfHubHTTPError), "cannot be fetched"),
    ],
)
def test_failures_of_the_hub_become_one_line_errors(error: Exception, says: str, monkeypatch: Any) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("shortstack.export.checkpoint.hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint("org/name", revision="v1")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_fetched_without_pickles_and_keeps_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(write(tmp_path / "m", tensors()))

    monkeypatch.setattr("shortstack.export.checkpoint.hub.snapshot_download", fetch)
    checkpoint = open_checkpoint("org/name", revision="v1")
    assert (checkpoint.source, checkpoint.folder_or_file) == ("org/name", tmp_path / "m")
    assert (asked["repo_id"], asked["revision"]) == ("org/name", "v1")
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])
