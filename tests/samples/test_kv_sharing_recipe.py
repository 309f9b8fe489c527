"""The recipe that makes layers share keys and values: what it converts, that it learns, resumes, and is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from helpers.families import MadeFamily
from helpers.family_rows import ROWS, FamilyRow
from helpers.kv_twins import kv_spec, random_ids, random_twin
from helpers.recipe_runs import TRAINED_LOGITS, WORDS, assert_resumes, call, options, write_words
from helpers.tiny_models import BASE, TinyBundles
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.exits import load_exits
from shortstack.export.twin.folder import load_twin, save_twin
from shortstack.export.twin.model import Passes, Twin
from shortstack.export.twin.sequential import sequential
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_map import identity_kv_map, parse_kv_map
from shortstack.runtime import load
from shortstack.samples.recipes import kv_sharing, new_model
from shortstack.samples.recipes.training.kv_convert import parse_sharing, share_keys_values

SAME = 1e-5
"""One model computed twice in float32, whose logits are around 1 to 10."""


@pytest.fixture(autouse=True)
def quick(one_torch_thread: Callable[[], None]) -> None:
    one_torch_thread()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("data"))


def weight(twin: Twin, layer: int, part: str, kind: str = "weight") -> torch.Tensor:
    return twin.state_dict()[f"model.layers.{layer}.self_attn.{part}.{kind}"]


@pytest.fixture
def plain() -> Twin:
    return random_twin(kv_spec((0, 1, 2, 3, 4), qkv_bias=True))


def test_the_target_keeps_the_producers_own_weights(plain: Twin) -> None:
    shared = share_keys_values(plain, (0, 3, 3, 3, 4), "target")
    before = plain.state_dict()
    for name, value in shared.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_the_mean_is_over_all_layers_that_attend(plain: Twin, part: str, kind: str) -> None:
    shared = share_keys_values(plain, (0, 3, 3, 3, 0), "mean")
    for producer, users in ((3, (1, 2, 3)), (0, (0, 4))):
        expected = sum(weight(plain, user, part, kind) for user in users) / len(users)
        assert torch.allclose(weight(shared, producer, part, kind), expected, rtol=0, atol=1e-6)
    for name, value in shared.state_dict().items():
        if "k_proj" not in name and "v_proj" not in name:
            assert torch.equal(value, plain.state_dict()[name]), name


def test_consumers_have_no_keys_and_values_of_their_own(plain: Twin) -> None:
    plain.passes = Passes(3, 1)
    shared = share_keys_values(plain, (0, 3, 3, 3, 4))
    owners = {int(name.split(".")[2]) for name in shared.state_dict() if "k_proj" in name or "v_proj" in name}
    assert owners == {0, 3, 4}
    assert shared.spec.kv_map == (0, 3, 3, 3, 4)
    assert shared.passes == Passes(3, 1)
    assert plain.spec.kv_map == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("keys_values", ["mean", "target"])
def test_a_map_without_sharing_changes_nothing(plain: Twin, keys_values: Any) -> None:
    ids = random_ids()
    same = share_keys_values(plain, parse_kv_map("none", 5), keys_values)
    with torch.no_grad():
        assert torch.equal(same(ids), plain(ids))


def test_identical_layers_share_without_loss(plain: Twin) -> None:
    """Layers 2 and 3 see the same stream if layer 2 adds nothing, and then the same weights make the same K,V."""
    with torch.no_grad():
        plain.model.layers[2].self_attn.o_proj.weight.zero_()
        plain.model.layers[2].mlp.down_proj.weight.zero_()
        plain.model.layers[3].input_layernorm.load_state_dict(plain.model.layers[2].input_layernorm.state_dict())
        for part in ("k_proj", "v_proj"):
            getattr(plain.model.layers[3].self_attn, part).load_state_dict(
                getattr(plain.model.layers[2].self_attn, part).state_dict()
            )
        ids = random_ids()
        found = share_keys_values(plain, (0, 1, 2, 2, 4))(ids)
        assert (found - plain(ids)).abs().max() < SAME


def test_a_model_that_shares_is_refused(plain: Twin) -> None:
    shared = share_keys_values(plain, (0, 0, 2, 2, 4))
    with pytest.raises(RequestError, match=r"share keys and values already: found kv_map \[0, 0, 2, 2, 4\]"):
        share_keys_values(shared, (0, 1, 2, 3, 4))


@pytest.mark.parametrize(
    ("text", "window", "kv_map", "windows"),
    [
        ("yoco", 7, (0, 1, 2, 3, 3, 3), (7, 7, 7, 0, 0, 0)),
        ("YOCO ", 1, (0, 1, 2, 3, 3, 3), (1, 1, 1, 0, 0, 0)),
        ("yoco", None, (0, 1, 2, 3, 3, 3), ()),
        ("0s_1s_2_2_2s_2", 7, (0, 1, 2, 2, 2, 2), (7, 7, 0, 0, 7, 0)),
        ("0s,3,3,3s,4,5", 7, (0, 3, 3, 3, 4, 5), (7, 0, 0, 7, 0, 0)),
        ("0_0_2_2_4_4", None, (0, 0, 2, 2, 4, 4), ()),
    ],
)
def test_maps_come_with_the_windows_that_are_asked_for(
    text: str, window: int | None, kv_map: tuple[int, ...], windows: tuple[int, ...]
) -> None:
    assert parse_sharing(text, window, 6) == (kv_map, windows)


def test_windows_change_what_layers_see_and_no_weight(plain: Twin) -> None:
    ids, same = random_ids(), identity_kv_map(5)
    slides = share_keys_values(plain, same, windows=(2, 2, 2, 0, 0))
    assert slides.spec.windows == (2, 2, 2, 0, 0)
    assert share_keys_values(slides, same).spec.windows == (2, 2, 2, 0, 0)  # kept unless others are asked for
    for name, value in slides.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    with torch.no_grad():
        assert (slides(ids)[:, :2] - plain(ids)[:, :2]).abs().max() < SAME
        assert (slides(ids)[:, 2:] - plain(ids)[:, 2:]).abs().max() > 100 * SAME


@pytest.mark.parametrize("kv_map", ["yoco", "0s_1s_2_2", "0s_2s_2_3s"])
def test_a_model_with_windows_is_trained_and_exported(
    tiny_bundles: TinyBundles, data: Path, tmp_path: Path, kv_map: str
) -> None:
    run = tmp_path / "run"
    sliding = ["--kv-map", kv_map, "--sliding-window", 3]
    report = call(kv_sharing.main, tiny_bundles.checkpoint(BASE), run, *sliding, *options(data, 10))
    windows = [3, 3, 0, 3] if kv_map.endswith("s") else [3, 3, 0, 0]
    assert report["windows"] == report["settings"]["windows"] == windows
    assert report["settings"]["sliding_window"] == 3
    assert report["held_out_after"]["4"]["perplexity"] < report["held_out_converted"]["4"]["perplexity"]
    trained = load_twin(str(run / "model")).eval()
    assert trained.spec.windows == tuple(windows)
    export_bundle(ExportSpec(str(run / "model"), tmp_path / "bundle"))
    model = load(tmp_path / "bundle")
    ids = np.random.randint(3, BASE.vocab, 20).tolist()
    found = model.activations(ids).heads[BASE.layers]
    without = Twin(trained.spec.with_windows(())).eval()
    without.load_state_dict(trained.state_dict())
    with torch.no_grad():
        expected, other = (sequential(twin, torch.tensor([ids])).logits[0].numpy() for twin in (trained, without))
    assert np.abs(found - expected).max() < TRAINED_LOGITS
    assert np.abs(found - other).max() > 100 * TRAINED_LOGITS


@pytest.mark.parametrize("kv_map", ["pizza-bottom:2", "sandwich-top:3"])
def test_uptraining_lowers_the_loss_and_is_exported(
    tiny_bundles: TinyBundles, data: Path, tmp_path: Path, kv_map: str
) -> None:
    checkpoint, run = tiny_bundles.checkpoint(BASE), tmp_path / "run"
    exits = ["--exit-layer", 1, "--scale", "equal"]
    report = call(kv_sharing.main, checkpoint, run, "--kv-map", kv_map, *exits, *options(data, 40))
    before, converted, after = (report[f"held_out_{when}"] for when in ("before", "converted", "after"))
    assert before["4"] != converted["4"]
    for depth in ("1", "4"):
        assert after[depth]["perplexity"] < 0.5 * converted[depth]["perplexity"], depth
    of_one = 2 * BASE.kv_heads * BASE.head_dim * 4
    owners = int(kv_map[-1])
    assert report["kv_bytes_per_token"] == {"before": 4 * of_one, "after": owners * of_one}
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")

    trained = load_twin(str(run / "model")).eval()
    assert trained.spec.kv_map == parse_kv_map(kv_map, 4)
    assert [node.exit_spec.exit_layer for node in load_exits(run / "model", trained.spec)] == [1]
    export_bundle(ExportSpec(str(run / "model"), tmp_path / "bundle", exits=run / "model"))
    model = load(tmp_path / "bundle")
    ids = np.random.randint(3, BASE.vocab, 20).tolist()
    with torch.no_grad():
        expected = sequential(trained, torch.tensor([ids])).logits[0].numpy()
    assert np.abs(model.activations(ids).heads[BASE.layers] - expected).max() < TRAINED_LOGITS
    plain = model.generate("red stone\n", max_new_tokens=12)
    assert plain.tokens
    assert model.generate("red stone\n", max_new_tokens=12, strategy="self-speculative").tokens == plain.tokens


def test_keys_and_values_of_an_iterated_group_are_trained(
    tiny_bundles: TinyBundles, data: Path, tmp_path: Path
) -> None:
    """Passes without gradient come first, and must not leave weights behind that no gradient reaches."""
    keys = ["--keys-values", "target", "--passes-without-gradient", 3]
    checkpoint = tiny_bundles.checkpoint(BASE)
    call(kv_sharing.main, checkpoint, tmp_path / "run", "--kv-map", "0,2,2,3", *keys, *options(data, 2))
    original, trained = load_twin(str(checkpoint)), load_twin(str(tmp_path / "run" / "model"))
    assert trained.passes == Passes(3, 2)
    for layer in (0, 2, 3):
        for part in ("k_proj", "v_proj"):
            assert not torch.equal(weight(trained, layer, part), weight(original, layer, part)), (layer, part)


def test_a_stopped_run_continues_to_the_same_weights(tiny_bundles: TinyBundles, data: Path, tmp_path: Path) -> None:
    arguments = ["--kv-map", "lckv:2", "--save-every", 2, *options(data, 4)]
    assert_resumes(kv_sharing.main, tiny_bundles.checkpoint(BASE), tmp_path, 2, *arguments)


def test_from_scratch_a_random_model_shares(data: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(json.dumps({"prompt": f"{a} {b} {i}", "completion": f"{b}{a}{i * i}"}) + "\n" for i in range(40)
                for a in WORDS for b in WORDS), encoding="utf-8",
    )  # fmt: skip
    shape = ["--vocab", 320, "--layers", 4, "--hidden", 32, "--heads", 2, "--kv-heads", 1]
    made = CliRunner().invoke(new_model.main, [str(a) for a in (tmp_path / "new", "--data", many, *shape)])
    assert made.exit_code == 0, made.output
    report = call(
        kv_sharing.main, tmp_path / "new", tmp_path / "run", "--from-scratch", "--kv-map", "cla:2", "--data", many,
        "--steps", 30, "--lr", 3e-3, "--held-out-rows", 20, "--warmup-steps", 2,
    )  # fmt: skip
    assert report["settings"]["keys_values"] == "target"
    assert report["held_out_converted"]["4"]["perplexity"] > 250  # nothing is known of 320 tokens
    assert report["held_out_after"]["4"]["perplexity"] < 150


def test_loss_weights_are_those_of_layerskip_or_of_ee_llm() -> None:
    kv_map = (0, 1, 1, 1)
    assert kv_sharing.KVSharingSpec(kv_map).loss_weights() == {4: 1.0}
    of_ee_llm = kv_sharing.KVSharingSpec(kv_map, exit_layers=(1, 2), exit_weights=(0.25, 0.5))
    assert of_ee_llm.loss_weights() == {1: 0.25, 2: 0.5, 4: 1.0}
    equal = kv_sharing.KVSharingSpec(kv_map, exit_layers=(1, 2), scale="equal")
    assert equal.loss_weights() == {1: 0.25, 2: 0.25, 4: 0.5}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kv-map", "sandwich-top:3", "--exit-layer", 2], "at most 1 or at least 3 layers"),
        (["--kv-map", "calzone:2"], "K,V map 'calzone:2' is not known"),
        (["--kv-map", "0,0,1,3"], "layer 1 owns no K,V itself"),
        (["--kv-map", "0,0"], "2 entries for 4 layers"),
        (["--kv-map", "pizza-bottom:9"], "expected 1..4"),
        (["--kv-map", "yoco", "--exit-layer", 4], "below the 4 layers"),
        (["--kv-map", "0s_1s_2_2"], "--sliding-window is missing: found layers marked s"),
        (["--kv-map", "0s_1s_2", "--sliding-window", 4], "3 entries for 4 layers"),
        (["--kv-map", "0s_1x_2_2", "--sliding-window", 4], "not a list of layers"),
        (["--kv-map", "cla:2", "--sliding-window", 4], "--sliding-window 4 applies to no layer of --kv-map cla:2"),
        (["--kv-map", "0_1_2_2", "--sliding-window", 4], "layers marked s such as 0s_1s_2_2"),
        (["--kv-map", "yoco", "--sliding-window", 0], "--sliding-window"),
        (["--kv-map", "yoco", "--exit-layer", 2, "--exit-weight", 1, "--exit-weight", 2], "one for each of 1 exits"),
    ],
)
def test_a_wrong_request_names_what_to_change(
    tiny_bundles: TinyBundles, data: Path, tmp_path: Path, arguments: list[object], says: str
) -> None:
    line = (tiny_bundles.checkpoint(BASE), tmp_path / "run", *options(data, 2), *arguments)
    result = CliRunner().invoke(kv_sharing.main, [str(a) for a in line])
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_shares_is_refused(tiny_bundles: TinyBundles, data: Path, tmp_path: Path) -> None:
    checkpoint = tiny_bundles.checkpoint(BASE)
    shared = share_keys_values(load_twin(str(checkpoint)), (0, 0, 2, 2))
    save_twin(shared, tmp_path / "shared", open_checkpoint(str(checkpoint)).files())
    line = (tmp_path / "shared", tmp_path / "run", "--kv-map", "none", *options(data, 2))
    result = CliRunner().invoke(kv_sharing.main, [str(a) for a in line])
    assert result.exit_code == 2
    assert "share keys and values already" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["gemma3_text", "cohere2", "exaone4"])
def test_windows_are_refused_before_training_where_they_also_say_how_layers_are_rotated(
    family: str, data: Path, tmp_path: Path
) -> None:
    row = next(row for row in ROWS if row.model_type == family)
    checkpoint = MadeFamily(row, tmp_path).checkpoint
    marked = "_".join(f"{layer}s" if layer % 2 else f"{layer}" for layer in range(row.fields["num_hidden_layers"]))
    arguments = [str(checkpoint), str(tmp_path / "run"), *options(data, 2), "--kv-map", marked, "--sliding-window", "3"]
    result = CliRunner().invoke(kv_sharing.main, [str(a) for a in arguments])
    assert result.exit_code == 2
    assert f"no config of {family} can say how these layers share" in result.output
    assert "Leave --sliding-window and the marks of sliding layers out." in result.output
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt2", "phi3"])
def test_windows_and_layers_that_look_up_are_trained_in_other_families(family: str, data: Path, tmp_path: Path) -> None:
    made = MadeFamily(next(row for row in ROWS if row.model_type == family), tmp_path)
    run = tmp_path / "run"
    call(kv_sharing.main, made.checkpoint, run, "--kv-map", "0s_2s_2_3s", "--sliding-window", 3, *options(data, 2))
    trained = load_twin(str(run / "model")).eval()
    assert trained.spec.kv_map == (0, 2, 2, 3)
    assert trained.spec.windows == (3, 3, 0, 3)
    export_bundle(ExportSpec(str(run / "model"), tmp_path / "out", (1,)))
    model, ids = load(tmp_path / "out"), made.text(20)
    with torch.no_grad():
        expected = sequential(trained, torch.tensor([ids])).logits[0].numpy()
    assert np.abs(model.activations(ids).heads[4] - expected).max() < TRAINED_LOGITS
    settings: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    plain = model.generate(ids[:9], **settings)
    assert model.generate(ids[:9], strategy="self-speculative", **settings).tokens == plain.tokens


def test_layers_with_different_rotary_embeddings_cannot_share(data: Path, tmp_path: Path) -> None:
    checkpoint = MadeFamily(FamilyRow("smollm3", "SmolLM3"), tmp_path).checkpoint  # its fourth layer has none
    arguments = [str(checkpoint), str(tmp_path / "run"), *options(data), "--kv-map", "cla:2", "--steps", "2"]
    result = CliRunner().invoke(kv_sharing.main, arguments)
    assert result.exit_code == 2
    assert "cannot share keys and values like this: kv_map[3] = 2" in result.output
