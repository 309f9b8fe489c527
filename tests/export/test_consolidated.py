"""Mistral's own layout, params.json and consolidated.safetensors: the bundle is that of transformers' layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from helpers.bad_input import Refused, edit_json, left_behind
from helpers.consolidated import consolidated
from helpers.families import MadeFamily
from helpers.family_rows import ROWS
from helpers.tiny_models import BASE, END, TURN_END, TURN_START, TinyBundles
from helpers.vocabularies import byte_tokens, tekken_file
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.graphs.bundle import open_bundle
from shortstack.runtime import load

SLIDES = next(row for row in ROWS if row.model_type == "mistral")
OTHER_BASE = {"rope_type": "default", "rope_theta": 1e6}
SIZES = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size")
VARIANTS = {
    "sliding": SLIDES,
    "without a window": replace(SLIDES, fields={"head_dim": 16, "sliding_window": None}),
    "tied": replace(SLIDES, fields={"head_dim": 16, "sliding_window": None, "tie_word_embeddings": True}),
    "another base": replace(SLIDES, fields={"head_dim": 24, "sliding_window": 6, "rope_parameters": OTHER_BASE}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MadeFamily:
    return MadeFamily(VARIANTS[request.param], tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> MadeFamily:
    return MadeFamily(SLIDES, tmp_path_factory.mktemp("mistral"))


@pytest.fixture
def folder(one: MadeFamily, tmp_path: Path) -> Path:
    """A folder to damage."""
    return consolidated(one.checkpoint, tmp_path / "checkpoint")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_bundle_is_that_of_the_same_model_in_transformers_layout(
    made: MadeFamily, tmp_path: Path, shards: int
) -> None:
    source = consolidated(made.checkpoint, tmp_path / "native", shards=shards)
    bundle = export_bundle(ExportSpec(str(source), tmp_path / "out", (1, 2)))
    for file in ("weights.data", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (made.bundle / file).read_bytes(), file
    assert bundle.manifest.spec == open_bundle(made.bundle).manifest.spec
    prompt = made.text(9, seed=3)
    ours, theirs = (load(path).generate(prompt, max_new_tokens=8) for path in (bundle.folder, made.bundle))
    assert ours.tokens == theirs.tokens


def test_parity_compares_a_bundle_with_the_layout(one: MadeFamily, folder: Path) -> None:
    (folder.parent / "texts").write_text("the hat\n", encoding="utf-8")
    options = ["--text", str(folder.parent / "texts"), "--greedy-tokens", "4"]
    assert run(["parity", str(folder), str(one.bundle), *options]) == 0


def test_queries_and_keys_are_rotated_by_neighbours_in_the_layout_and_by_halves_here(
    one: MadeFamily, folder: Path
) -> None:
    """The scores are those of Mistral's formula: pairs of neighbouring columns are complex numbers that are turned."""
    stored, ours = load_file(folder / "consolidated.safetensors"), open_checkpoint(str(folder))
    heads, kv_heads, dim = 4, 2, 32
    x = torch.randn(7, 64, dtype=torch.float64)
    angles = torch.outer(torch.arange(7.0), 10000.0 ** (-torch.arange(0, dim, 2) / dim)).double()

    def turned(weight: torch.Tensor, count: int) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ weight.double().T).unflatten(-1, (count, dim // 2, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    def halves(weight: np.ndarray, count: int) -> torch.Tensor:
        low, high = (x @ torch.from_numpy(weight).double().T).unflatten(-1, (count, dim)).chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    q, k = (turned(stored[f"layers.1.attention.w{role}.weight"], n) for role, n in (("q", heads), ("k", kv_heads)))
    name = "model.layers.1.self_attn.{}_proj.weight"
    own_q, own_k = (halves(ours.tensor(name.format(role)), n) for role, n in (("q", heads), ("k", kv_heads)))
    theirs = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1))
    torch.testing.assert_close(torch.einsum("qhd,khd->hqk", own_q, own_k.repeat_interleave(2, 1)), theirs)


def test_the_layout_of_transformers_wins_where_both_are_in_a_folder(
    one: MadeFamily, folder: Path, tmp_path: Path
) -> None:
    both = Path(shutil.copytree(one.checkpoint, tmp_path / "both"))
    (folder / "params.json").rename(both / "params.json")
    edit_json(both / "params.json", dim=7)
    stored = load_file(folder / "consolidated.safetensors")
    save_file({name: value + 1 for name, value in stored.items()}, both / "consolidated.safetensors")
    assert open_checkpoint(str(both)).digest() == open_checkpoint(str(one.checkpoint)).digest()
    (both / "model.safetensors").unlink()  # as where only Mistral's files were downloaded
    edit_json(both / "params.json", dim=64)
    assert "model.norm.weight" in open_checkpoint(str(both)).names()


def test_a_config_next_to_params_leaves_them_what_they_are(one: MadeFamily, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "other"}', encoding="utf-8")
    bundle = export_bundle(ExportSpec(str(folder), tmp_path / "out", (1, 2)))
    assert bundle.manifest.spec == open_bundle(one.bundle).manifest.spec


@pytest.mark.parametrize(("window", "expected"), [("6", 6), (6, 6), (None, 0)])
def test_the_window_may_be_a_number_a_text_or_absent(
    one: MadeFamily, tmp_path: Path, window: object, expected: int
) -> None:
    source = consolidated(one.checkpoint, tmp_path / "native", sliding_window=window)
    spec = export_bundle(ExportSpec(str(source), tmp_path / "out")).manifest.spec
    assert {layer.attention.window for layer in spec.layers} == {expected}


def test_the_context_is_that_of_transformers_converter_if_params_do_not_say_it(one: MadeFamily, tmp_path: Path) -> None:
    source = consolidated(one.checkpoint, tmp_path / "native", max_seq_len=None)
    assert export_bundle(ExportSpec(str(source), tmp_path / "out")).manifest.max_length == 32768
    other = consolidated(one.checkpoint, tmp_path / "other", max_seq_len=None, max_position_embeddings=99)
    assert export_bundle(ExportSpec(str(other), tmp_path / "second")).manifest.max_length == 99


def test_a_tekken_file_becomes_the_tokenizer_and_says_what_ends_a_text(
    one: MadeFamily, tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    backend = Backend.from_file(str(tiny_bundles.checkpoint(BASE) / "tokenizer.json"))
    tokens = byte_tokens(backend.get_vocab(), (END, TURN_START, TURN_END))
    folder = consolidated(one.checkpoint, tmp_path / "native")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    (folder / "tekken.json").write_bytes(tekken_file(tokens, ("<unk>", "<s>", "</s>")))
    bundle = export_bundle(ExportSpec(str(folder), tmp_path / "out"))
    model = load(bundle.folder)
    assert model.tokenizer.decode(model.encode("the hat")) == "the hat"
    said = json.loads((bundle.folder / "generation_config.json").read_text(encoding="utf-8"))
    assert said == {"eos_token_id": 2}
    assert 2 in model.tokenizer.eos_token_ids


PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"no {name}": ({name: None}, f"params.json: {name} is missing")
        for name in (*SIZES, "norm_eps", "rope_theta")
    },
    "a text for a number": ({"dim": "64"}, "params.json: dim: found '64', expected an integer"),
    "a size of 0": ({"n_layers": 0}, "params.json: n_layers: found 0, expected a positive integer"),
    "an absurd size": ({"n_layers": 10**15}, "params.json: n_layers"),
    "more layers than any model": ({"n_layers": 5000}, "num_hidden_layers: found 5000, expected at most 4096"),
    "heads that do not divide": ({"n_kv_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
    "an odd head": ({"head_dim": 33}, "head_dim: found 33"),
    "an eps of 0": ({"norm_eps": 0}, "rms_norm_eps: found 0"),
    "a base that is no number": ({"rope_theta": "1e6"}, "params.json: rope_theta: found '1e6', expected a number"),
    "a list of windows": ({"sliding_window": [4, 6]}, "params.json: sliding_window: found [4, 6]"),
    "a negative window": ({"sliding_window": -1}, "params.json: sliding_window: found -1"),
    "experts": ({"moe": {"num_experts": 8}}, "params.json: moe: found what may change what the model computes"),
    "images": ({"vision_encoder": {"hidden_size": 8}}, "params.json: vision_encoder"),
    "a scaled rope": ({"yarn": {"factor": 16}, "llama_4_scaling": {"beta": 0.1}}, "params.json: yarn, llama_4_scaling"),
    "another kind": ({"model_type": "mamba"}, "params.json: model_type: found 'mamba', expected transformer"),
    "other tensors": ({"n_layers": 3}, "does not hold the tensors that its config describes: 9 extra"),
    "other shapes": ({"hidden_dim": 95}, "12 misshapen"),
    "a head of its own": ({"tied_embeddings": True}, "tie_word_embeddings is true, but lm_head.weight differs"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARAMS)
def test_params_that_are_wrong_or_missing_are_refused_by_name(
    folder: Path, tmp_path: Path, refused: Refused, case: str
) -> None:
    fields, says = PARAMS[case]
    params = json.loads((folder / "params.json").read_text(encoding="utf-8")) | fields
    (folder / "params.json").write_text(
        json.dumps({name: value for name, value in params.items() if value is not None}), encoding="utf-8"
    )
    refused(["export", folder, tmp_path / "out"], says)
    assert left_behind(tmp_path) == ["checkpoint"]


def test_weights_without_params_are_named(folder: Path, tmp_path: Path, refused: Refused) -> None:
    (folder / "params.json").unlink()
    refused(["export", folder, tmp_path / "out"], "has no params.json")


def test_shards_without_their_index_are_not_guessed(one: MadeFamily, tmp_path: Path, refused: Refused) -> None:
    folder = consolidated(one.checkpoint, tmp_path / "native", shards=2)
    (folder / "consolidated.safetensors.index.json").unlink()
    refused(["export", folder, tmp_path / "out"], "holds 2 safetensors files", "consolidated.safetensors.index.json")


def test_half_of_the_shards_are_counted(one: MadeFamily, tmp_path: Path, refused: Refused) -> None:
    folder = consolidated(one.checkpoint, tmp_path / "native", shards=4)
    for file in sorted(folder.glob("*.safetensors"))[::2]:
        file.unlink()
    refused(["export", folder, tmp_path / "out"], "lacks 2 of 4 files that consolidated.safetensors.index.json names")


def test_one_tensor_under_two_names_is_refused(folder: Path, tmp_path: Path, refused: Refused) -> None:
    state = load_file(folder / "consolidated.safetensors")
    save_file({**state, "model.norm.weight": state["norm.weight"].clone()}, folder / "consolidated.safetensors")
    refused(["export", folder, tmp_path / "out"], "1 tensors under two names, such as model.norm.weight")


def test_a_link_out_of_the_folder_is_followed_only_if_asked_for(folder: Path, tmp_path: Path, refused: Refused) -> None:
    (folder / "params.json").rename(tmp_path / "params.json")
    (folder / "params.json").symlink_to(tmp_path / "params.json")
    refused(["export", folder, tmp_path / "out"], "params.json is a link that leads out of the folder")
    assert run(["export", str(folder), str(tmp_path / "out"), "--follow-links"]) == 0


def test_the_files_of_a_hub_id_are_fetched_where_there_are_none_of_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    empty = Path(shutil.copytree(folder, folder.parent / "empty"))
    (empty / "consolidated.safetensors").unlink()

    def fetch(repo_id: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(folder if "params.json" in options["allow_patterns"] else empty)

    monkeypatch.setattr("shortstack.export.checkpoint.hub.snapshot_download", fetch)
    assert "model.norm.weight" in open_checkpoint("org/name").names()
    assert [("params.json" in patterns) for patterns in asked] == [False, True]
