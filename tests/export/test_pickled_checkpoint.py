"""Checkpoints that torch.save wrote: with --allow-pickle they give the bundle of the same model in safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from helpers.bad_input import Refused
from helpers.pickles import state_of, write_pickled_shards
from helpers.recipe_runs import write_words
from helpers.tiny_models import BASE, SWITCHES, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec

TIED = next(tiny for tiny in SWITCHES if tiny.name == "tied")
HALF = replace(BASE, name="stored in bfloat16", dtype="bfloat16")
State = dict[str, torch.Tensor]


def _whole(folder: Path, state: State) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def _sharded(folder: Path, state: State) -> Path:
    write_pickled_shards(folder, state, 3)
    return folder


def _lone(folder: Path, state: State) -> Path:
    torch.save(state, folder / "weights.pt")
    torch.save({"lr": 1e-3}, folder / "training_args.bin")  # what transformers' Trainer leaves beside a model
    torch.save({"step": 3}, folder / "optimizer.pt")
    return folder


def _named(folder: Path, state: State) -> Path:
    torch.save({name: torch.zeros(1) for name in state}, folder / "other.pt")
    torch.save(state, folder / "chosen.pth")
    return folder / "chosen.pth"


def _wrapped(wrapper: str) -> Callable[[Path, State], Path]:
    def write(folder: Path, state: State) -> Path:
        beside = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}}, "note": "best", "loss": 0.5}
        torch.save({wrapper: state, **beside}, folder / "pytorch_model.bin")
        return folder

    return write


def _with_parameters(folder: Path, state: State) -> Path:
    torch.save({name: torch.nn.Parameter(value) for name, value in state.items()}, folder / "model.ckpt")
    return folder


def _with_views(folder: Path, state: State) -> Path:
    """Matrices that are stored transposed, as training code with Conv1D leaves them."""
    turned = {name: value.T.contiguous().T if value.ndim == 2 else value for name, value in state.items()}
    torch.save(turned, folder / "pytorch_model.bin")
    return folder


WAYS: dict[str, Callable[[Path, State], Path]] = {
    "pytorch_model.bin": _whole,
    "shards with an index": _sharded,
    "the one file of a folder": _lone,
    "a file by its name": _named,
    "under model": _wrapped("model"),
    "under state_dict": _wrapped("state_dict"),
    "parameters": _with_parameters,
    "matrices stored transposed": _with_views,
}


def pickled(tiny: TinyModel, tiny_bundles: TinyBundles, tmp_path: Path, way: str) -> Path:
    folder = Path(shutil.copytree(tiny_bundles.checkpoint(tiny), tmp_path / "pickled"))
    return WAYS[way](folder, state_of(folder))


@pytest.mark.parametrize("way", WAYS)
def test_a_bundle_of_pickles_has_the_weights_of_one_of_safetensors(
    tiny_bundles: TinyBundles, tmp_path: Path, way: str
) -> None:
    source = pickled(BASE, tiny_bundles, tmp_path, way)
    assert run(["export", str(source), str(tmp_path / "out"), "-e", "2", "--allow-pickle"]) == 0
    wanted = tiny_bundles.bundle(BASE, 2)
    for file in ("weights.data", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (wanted / file).read_bytes(), file


@pytest.mark.parametrize("tiny", [TIED, HALF], ids=lambda tiny: str(tiny.name))
@pytest.mark.parametrize("way", ["pytorch_model.bin", "shards with an index"])
def test_tied_heads_and_bfloat16_are_read_as_from_safetensors(
    tiny_bundles: TinyBundles, tmp_path: Path, way: str, tiny: TinyModel
) -> None:
    source = pickled(tiny, tiny_bundles, tmp_path, way)
    bundle = export_bundle(ExportSpec(str(source), tmp_path / "out", (2,), allow_pickle=True)).folder
    assert (bundle / "weights.data").read_bytes() == (tiny_bundles.bundle(tiny, 2) / "weights.data").read_bytes()


def test_a_tied_head_may_be_stored_under_both_names(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundles.checkpoint(TIED), tmp_path / "pickled"))
    state = state_of(folder)
    _whole(folder, {**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    bundle = export_bundle(ExportSpec(str(folder), tmp_path / "out", (2,), allow_pickle=True)).folder
    assert (bundle / "weights.data").read_bytes() == (tiny_bundles.bundle(TIED, 2) / "weights.data").read_bytes()


@pytest.mark.parametrize("way", ["shards with an index", "a file by its name", "under model"])
def test_parity_compares_a_bundle_with_pickles(tiny_bundles: TinyBundles, tmp_path: Path, way: str) -> None:
    source = pickled(BASE, tiny_bundles, tmp_path, way)
    bundle = tiny_bundles.bundle(BASE, 2)
    options = ["--allow-pickle", "--prompts", "1", "--greedy-tokens", "4"]
    assert run(["parity", str(source), str(bundle), *options]) == 0


def test_parity_finds_that_pickles_are_of_another_model(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "pickled"))
    state = state_of(folder)
    state["model.layers.1.mlp.up_proj.weight"] += 0.1
    _whole(folder, state)
    options = ["--allow-pickle", "--prompts", "1", "--greedy-tokens", "0"]
    assert run(["parity", str(folder), str(tiny_bundles.bundle(BASE, 2)), *options]) == 1


def test_a_recipe_trains_from_pickles_if_that_is_asked_for(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    from shortstack.samples.recipes import layerskip

    folder = pickled(BASE, tiny_bundles, tmp_path, "pytorch_model.bin")
    words = write_words(tmp_path)
    templates = ["--prompt", "{say}\\n", "--completion", "{said}", "--held-out-rows", "4", "--batch-size", "4"]
    arguments = [
        str(folder),
        str(tmp_path / "run"),
        "--data",
        str(words),
        *templates,
        "--steps",
        "1",
        "--exit-layer",
        "1",
    ]
    refused = CliRunner().invoke(layerskip.main, arguments)
    assert refused.exit_code == 2
    assert "--allow-pickle" in refused.output
    done = CliRunner().invoke(layerskip.main, [*arguments, "--allow-pickle"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["settings"]
    assert "allow_pickle" not in settings


def test_safetensors_win_over_pickles(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "both"))
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert open_checkpoint(str(folder), allow_pickle=True).digest() == open_checkpoint(str(folder)).digest()


def test_the_digest_covers_all_pickles(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    folder = pickled(BASE, tiny_bundles, tmp_path, "shards with an index")
    before = open_checkpoint(str(folder), allow_pickle=True).digest()
    state = torch.load(folder / "pytorch_model-00002-of-00003.bin", weights_only=True)
    next(iter(state.values())).view(-1)[0] += 1
    torch.save(state, folder / "pytorch_model-00002-of-00003.bin")
    assert open_checkpoint(str(folder), allow_pickle=True).digest() != before


@pytest.mark.parametrize("command", ["export", "parity"])
@pytest.mark.parametrize("way", ["pytorch_model.bin", "shards with an index", "a file by its name"])
def test_without_the_option_the_error_names_it_and_the_better_way(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused, way: str, command: str
) -> None:
    source = pickled(BASE, tiny_bundles, tmp_path, way)
    bundle = tmp_path / "out" if command == "export" else tiny_bundles.bundle(BASE, 2)
    refused([command, source, bundle], str(source), "safe_serialization=True", "--allow-pickle")


def test_pickles_of_a_hub_id_are_fetched_only_if_they_may_be_read(
    tiny_bundles: TinyBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pickled(BASE, tiny_bundles, tmp_path, "pytorch_model.bin")
    asked: list[list[str]] = []

    def fetch(repo_id: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(folder)

    monkeypatch.setattr("shortstack.export.checkpoint.hub.snapshot_download", fetch)
    open_checkpoint("org/name", allow_pickle=True)
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, False, True]
