"""The recipes that train a stack, on tiny models: they learn, they resume, and what they write is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from helpers.recipe_runs import TRAINED_LOGITS, WORDS, assert_resumes, call, options, write_words
from helpers.tiny_models import BASE, TinyBundles
from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.exits import load_exits
from shortstack.export.twin.folder import load_twin, twin_of
from shortstack.runtime import load
from shortstack.samples.recipes import ee_llm, layerskip, new_model
from shortstack.samples.recipes.training import loop
from shortstack.samples.recipes.training.command import EE_LLM_KINDS
from shortstack.samples.recipes.training.source import open_source


@pytest.fixture(autouse=True)
def quick(one_torch_thread: Callable[[], None]) -> None:
    one_torch_thread()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("data"))


def test_layerskip_lowers_the_loss_at_exits_and_on_top(tiny_bundles: TinyBundles, data: Path, tmp_path: Path) -> None:
    checkpoint = tiny_bundles.checkpoint(BASE)
    report = call(
        layerskip.main, checkpoint, tmp_path / "run", "--exit-layer", 1, "--exit-layer", 2, *options(data, 40)
    )
    before, after = report["held_out_before"], report["held_out_after"]
    for depth in ("1", "2", "4"):
        assert after[depth]["perplexity"] < 0.7 * before[depth]["perplexity"], depth
    assert after["4"]["agreement"] == 1.0
    assert report["tokens"] > 0
    assert (tmp_path / "run" / "training.png").read_bytes().startswith(b"\x89PNG")
    export_bundle(ExportSpec(str(tmp_path / "run" / "model"), tmp_path / "bundle", (2,)))
    ids = np.random.randint(3, BASE.vocab, 20).tolist()
    with torch.no_grad():
        expected = load_twin(str(tmp_path / "run" / "model")).eval()(torch.tensor([ids]))[0].numpy()
    assert np.abs(load(tmp_path / "bundle").activations(ids).heads[BASE.layers] - expected).max() < TRAINED_LOGITS


def test_a_stopped_run_continues_to_the_same_weights(tiny_bundles: TinyBundles, data: Path, tmp_path: Path) -> None:
    arguments = ["--exit-layer", 2, "--p-max", 0.3, "--save-every", 2, *options(data, 6)]
    assert_resumes(layerskip.main, tiny_bundles.checkpoint(BASE), tmp_path, 4, *arguments)


def test_other_settings_do_not_continue_a_run(tiny_bundles: TinyBundles, data: Path, tmp_path: Path) -> None:
    checkpoint = tiny_bundles.checkpoint(BASE)
    call(layerskip.main, checkpoint, tmp_path / "run", "--exit-layer", 2, *options(data, 2))
    state = (tmp_path / "run" / loop.STATE_FILE).read_bytes()
    result = CliRunner().invoke(
        layerskip.main, [str(a) for a in (checkpoint, tmp_path / "run", "--exit-layer", 1, *options(data, 2))]
    )
    assert result.exit_code == 2
    assert "exit_layers = [2]" in result.stderr
    assert "exit_layers = [1]" in result.stderr
    assert (tmp_path / "run" / loop.STATE_FILE).read_bytes() == state


def test_an_adapter_is_exported_as_it_was_trained(tiny_bundles: TinyBundles, data: Path, tmp_path: Path) -> None:
    checkpoint = tiny_bundles.checkpoint(BASE)
    lora = ["--lora-rank", 2, "--lora-rank-below", 4, "--full-depth-every", 2, "--exit-vocab", 64, "--distill", 0.5]
    report = call(layerskip.main, checkpoint, tmp_path / "run", "--exit-layer", 2, *lora, *options(data, 30))
    assert report["held_out_after"]["2"]["perplexity"] < report["held_out_before"]["2"]["perplexity"]
    adapter = tmp_path / "run" / "adapter"
    merged = twin_of(AdaptedCheckpoint(open_checkpoint(str(checkpoint)), adapter)).eval()
    original = load_twin(str(checkpoint)).state_dict()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, original[name])}
    assert len(changed) == 7 * BASE.layers
    export_bundle(ExportSpec(str(checkpoint), tmp_path / "bundle", (2,), adapter=adapter))
    ids = np.random.randint(3, BASE.vocab, 20).tolist()
    with torch.no_grad():
        expected = merged(torch.tensor([ids]))[0].numpy()
    assert np.abs(load(tmp_path / "bundle").activations(ids).heads[BASE.layers] - expected).max() < TRAINED_LOGITS


def test_without_exits_it_is_plain_fine_tuning(tiny_bundles: TinyBundles, data: Path, tmp_path: Path) -> None:
    checkpoint = tiny_bundles.checkpoint(BASE)
    report = call(layerskip.main, checkpoint, tmp_path / "run", "--report-layer", 2, "--p-max", 0, *options(data, 20))
    assert report["held_out_after"]["4"]["perplexity"] < 0.7 * report["held_out_before"]["4"]["perplexity"]
    assert report["held_out_after"]["2"].keys() == report["held_out_after"]["4"].keys()
    assert not (tmp_path / "run" / "model" / "exits.json").exists()


def test_from_scratch_starts_with_a_tokenizer_of_its_own(data: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(json.dumps({"prompt": f"{a} {b} {i}", "completion": f"{b}{a}{i * i}"}) + "\n" for i in range(40)
                for a in WORDS for b in WORDS), encoding="utf-8",
    )  # fmt: skip
    shape = ["--vocab", 320, "--layers", 3, "--hidden", 32, "--heads", 2, "--kv-heads", 1, "--initializer-range", 0.03]
    result = CliRunner().invoke(new_model.main, [str(a) for a in (tmp_path / "new", "--data", many, *shape)])
    assert result.exit_code == 0, result.output
    assert "320 tokens" in result.output
    drawn = open_source(str(tmp_path / "new"), from_scratch=True).twin.model.layers[0].mlp.gate_proj.weight
    assert drawn.std().item() == pytest.approx(0.03, rel=0.1)
    report = call(
        layerskip.main, tmp_path / "new", tmp_path / "run", "--from-scratch", "--data", many, "--exit-layer", 1,
        "--exit-layer", 2, "--steps", 40, "--lr", 3e-3, "--held-out-rows", 20, "--warmup-steps", 2,
    )  # fmt: skip
    assert report["held_out_before"]["3"]["perplexity"] > 250  # nothing is known of 320 tokens
    assert report["held_out_after"]["3"]["perplexity"] < 100
    export_bundle(ExportSpec(str(tmp_path / "run" / "model"), tmp_path / "bundle", (1,)))
    assert load(tmp_path / "bundle").generate("red blue 3\n", max_new_tokens=4).tokens


@pytest.mark.parametrize("kind", list(EE_LLM_KINDS))
@pytest.mark.parametrize("head", ["shared", "own"])
def test_ee_llm_trains_stack_and_exits_as_one(
    tiny_bundles: TinyBundles, data: Path, tmp_path: Path, kind: str, head: str
) -> None:
    checkpoint = tiny_bundles.checkpoint(BASE)
    weights = [
        "--exit-weight",
        0.25,
        "--exit-weight",
        0.5,
        "--weight-start",
        0.1,
        "--weight-steps",
        5,
        "--token-weighted",
    ]
    exits = ["--exit-layer", 1, "--exit-layer", 3, "--kind", kind, "--head", head]
    report = call(ee_llm.main, checkpoint, tmp_path / "run", *exits, *weights, "--token-weighted", *options(data, 30))
    before, after = report["held_out_before"], report["held_out_after"]
    assert after["1"]["perplexity"] < before["1"]["perplexity"]
    assert after["4"]["perplexity"] < before["4"]["perplexity"]
    nodes = load_exits(tmp_path / "run" / "model", load_twin(str(tmp_path / "run" / "model")).spec)
    assert [node.exit_spec.exit_layer for node in nodes] == [1, 3]
    model = tmp_path / "run" / "model"
    export_bundle(ExportSpec(str(model), tmp_path / "bundle", exits=model))
    assert load(tmp_path / "bundle").exit_layers == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--exit-layer", 9], "below the 4 layers"),
        (["--exit-layer", 1, "--prompt", "{nothing}"], "Name fields of the rows"),
        (["--exit-layer", 1, "--held-out-rows", 30], "Lower --held-out-rows"),
        (["--exit-layer", 1, "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_wrong_request_names_what_to_change(
    tiny_bundles: TinyBundles, data: Path, tmp_path: Path, arguments: list[object], says: str
) -> None:
    result = CliRunner().invoke(
        layerskip.main,
        [str(a) for a in (tiny_bundles.checkpoint(BASE), tmp_path / "run", *options(data, 2), *arguments)],
    )
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "run").exists()
