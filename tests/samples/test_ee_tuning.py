"""EE-Tuning and draft heads: loss arithmetic by hand, drafts as decoding makes them, and the recipe on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from helpers.kv_twins import kv_spec, random_twin
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.export.twin.exits import ExitNode, load_exits, states_before
from shortstack.export.twin.layer import unit_rms
from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec
from shortstack.samples.recipes.draft_head_curve import curve
from shortstack.samples.recipes.ee_tuning import main
from shortstack.samples.recipes.training.closed_form import fit_linear, low_rank_factors
from shortstack.samples.recipes.training.data import Example
from shortstack.samples.recipes.training.draft_cost import Costs, Drafts, Policy, draft_cost, play, read_row_costs
from shortstack.samples.recipes.training.draft_measure import measure_drafts
from shortstack.samples.recipes.training.exit_batches import RowOrder, load_spans
from shortstack.samples.recipes.training.exit_loss import ExitLossSpec, exit_loss, gate_loss, rows_of
from shortstack.samples.recipes.training.exit_start import copy_from_model, new_exit
from shortstack.samples.recipes.training.exit_tuning import ExitWeights, draft_ids
from shortstack.samples.recipes.training.features import Features, _next_tokens, extract_features

DEPTHS = (1, 3)
STATE_EXIT = ExitSpec(1, 64, branch="linear", linear_mlp=8, sees_token=True, sees_state=True)

pytestmark = pytest.mark.usefixtures("one_thread")


def answered(twin: Twin, prompt: list[int], length: int) -> Example:
    """The tiny model's own greedy answer."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(twin(torch.tensor([ids]))[0, -1].argmax()))
    return Example(tuple(ids), len(prompt))


@pytest.fixture(scope="module")
def rows(twin: Twin) -> list[Example]:
    random = np.random.default_rng(0)
    return [answered(twin, random.integers(3, 300, 3 + i % 4).tolist(), 6 + i % 5) for i in range(20)]


@pytest.fixture(scope="module")
def held(rows: list[Example]) -> list[bool]:
    return [index % 10 == 0 for index in range(len(rows))]


@pytest.fixture(scope="module")
def features(twin: Twin, rows: list[Example], held: list[bool], tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("features") / "f"
    return extract_features(twin, rows, held, folder, DEPTHS, middles=(3,), use_bf16=False)


def test_features_are_what_the_model_computes(twin: Twin, rows: list[Example], features: Features) -> None:
    found = twin.boundaries(torch.tensor([rows[4].ids]), (1, 3, 6))
    span = slice(int(features.starts[4]), int(features.starts[5]))
    state = unit_rms(found[6].hidden[0], twin.spec.norm_eps)
    np.testing.assert_allclose(features.hidden[3][span], found[3].hidden[0], rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(features.middle[3][span], found[3].middle[0], rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(features.state[span], state, rtol=2e-3, atol=1e-3)
    answer = np.arange(features.answer_starts[4], features.starts[5] - 1)
    np.testing.assert_array_equal(features.targets[answer], features.tokens[answer + 1])


def test_bfloat16_only_proposes_the_most_likely_token(twin: Twin) -> None:
    hidden = torch.randn(50, twin.spec.hidden_size)
    np.testing.assert_array_equal(_next_tokens(twin, hidden, True), _next_tokens(twin, hidden, False))


def test_features_continue_where_they_stopped(
    twin: Twin, rows: list[Example], held: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, module = tmp_path / "f", "shortstack.samples.recipes.training.features"
    whole = extract_features(twin, rows, held, tmp_path / "whole", (1,), batch_tokens=30)
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.SAVE_EVERY", 2)
        done = 0

        def advance(_: float) -> None:
            nonlocal done
            done += 1
            if done == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            extract_features(twin, rows, held, folder, (1,), batch_tokens=30, advance=advance)
    assert json.loads((folder / "meta.json").read_text())["done_batches"] == 4
    resumed = extract_features(twin, rows, held, folder, (1,), batch_tokens=30)
    np.testing.assert_array_equal(resumed.hidden[1], whole.hidden[1])
    np.testing.assert_array_equal(resumed.state, whole.state)
    with pytest.raises(RequestError, match="holds the features of something else: depths differ"):
        extract_features(twin, rows, held, folder, (2,), batch_tokens=30)


def test_spans_are_answers_with_the_states_before_them(rows: list[Example], features: Features) -> None:
    batch = load_spans(features, [4, 5], DEPTHS, whole_rows=False)
    whole = load_spans(features, [4, 5], DEPTHS, whole_rows=True)
    length = len(rows[4].ids) - rows[4].start
    assert batch.ids[0, :length].tolist() == list(rows[4].ids[rows[4].start :])
    assert int(batch.counts[0].sum()) == int(whole.counts[0].sum()) == length - 1
    assert not batch.counts[0, length - 1]  # nothing is drafted behind the end of an answer
    torch.testing.assert_close(batch.state_before[batch.counts], whole.state_before[whole.counts])
    torch.testing.assert_close(whole.state_before[whole.counts], states_before(whole.state)[whole.counts])


def test_row_order_takes_every_row_once_an_epoch() -> None:
    order = RowOrder(list(range(10, 20)), 5, seed=3)
    assert sorted(order[0] + order[1]) == list(range(10, 20))
    assert order[0] == RowOrder(list(range(10, 20)), 5, seed=3)[0]
    assert order[2] + order[3] != order[0] + order[1]


def test_the_closed_form_is_least_squares(twin: Twin, features: Features) -> None:
    node = ExitNode(twin.spec, ExitSpec(3, branch="linear", sees_token=True))
    trained = [row for row in range(20) if row % 10]
    fit_linear(node, twin, features, trained, ridge=1e-3)
    batch = load_spans(features, trained, (3,), whole_rows=False)
    u = node.linear_input(batch.boundaries[3].hidden, twin.embedded(batch.ids), None)[batch.counts]
    u = torch.cat([u, torch.ones(len(u), 1)], -1)
    fitted = torch.cat([node.linear.weight.T, node.linear.bias[None]]).detach()
    residual = batch.state[batch.counts] - u @ fitted
    # The gradient of a least squares fit is 0, but for the ridge.
    assert float((u.T @ residual).abs().max()) < 0.02


def test_a_low_rank_head_is_exact_where_the_inputs_have_that_rank() -> None:
    basis, weight = torch.randn(3, 16), torch.randn(40, 16)
    inputs = torch.randn(500, 3) @ basis
    down, up = low_rank_factors(weight, inputs, 3)
    torch.testing.assert_close(inputs @ down.T @ up.T, inputs @ weight.T, atol=0.05, rtol=0.01)


def test_the_loss_of_one_position_is_the_divergence_by_hand(twin: Twin, features: Features) -> None:
    node = ExitNode(twin.spec, ExitSpec(1, branch="none", norm="none"))
    batch = load_spans(features, [3], (1,), whole_rows=False)
    hidden, head = batch.boundaries[1].hidden[0], twin.head_weight
    said = (hidden @ head.T).log_softmax(-1)
    wanted = (twin.state(batch.state[0]) @ head.T).log_softmax(-1)
    divergence = (wanted.exp() * (wanted - said)).sum(-1)
    found = exit_loss(node, twin, batch, ExitLossSpec())
    torch.testing.assert_close(found.loss, divergence[:-1].mean())
    weighted = exit_loss(node, twin, batch, ExitLossSpec(is_token_weighted=True))
    torch.testing.assert_close(weighted.loss, (divergence * said.exp().amax(-1))[:-1].mean())
    text = exit_loss(node, twin, batch, ExitLossSpec(target="text"))
    following = batch.ids[0, 1:]
    nats = -said[:-1].gather(-1, following[:, None])
    torch.testing.assert_close(text.loss, nats.mean())


def test_an_exit_is_unrolled_on_its_own_guesses(twin: Twin, features: Features) -> None:
    node = new_exit(twin, replace(STATE_EXIT, draft_vocab=None), None, features, range(1, 10), "copy")
    batch = load_spans(features, [3, 4], (1,), whole_rows=False)
    spec = ExitLossSpec(unroll=2, regression=0.0)
    one = exit_loss(node, twin, batch, replace(spec, unroll=1))
    both = exit_loss(node, twin, batch, spec).loss
    found = node(batch.boundaries[1], twin.embedded(batch.ids), batch.state_before, twin)
    accepted = (found.logits.argmax(-1) == rows_of(node, batch.targets)) & batch.counts
    assert one.agreement == pytest.approx(float(accepted.sum() / batch.counts.sum()))
    behind = torch.nn.functional.pad(accepted, (1, 0))[:, :-1] & batch.counts
    assert behind.any()
    fed_back = replace(batch, state_before=states_before(found.state), counts=behind)
    share = float(behind.sum() / batch.counts.sum())
    torch.testing.assert_close(both - one.loss, share * exit_loss(node, twin, fed_back, replace(spec, unroll=1)).loss)


def test_the_gate_loss_balances_the_classes(twin: Twin) -> None:
    node = ExitNode(twin.spec, ExitSpec(1, has_gate=True))
    with torch.no_grad():
        node.gate.weight.zero_()
        node.gate.bias.fill_(2.0)
    right = torch.tensor([True] * 9 + [False])
    yes = torch.tensor(2.0).sigmoid()
    expected = (-yes.log() - (1 - yes).log()) / 2
    torch.testing.assert_close(gate_loss(node, torch.randn(10, twin.spec.hidden_size), right), expected)


def test_loss_weights_warm_up_and_decay() -> None:
    weights = ExitWeights((1.0, 0.5), start=0.0, warmup_steps=10, style="linear")
    assert [weights.at(step) for step in (0, 5, 10, 99)] == [(0, 0), (0.5, 0.25), (1, 0.5), (1, 0.5)]
    decay = ExitWeights((1.0,), start=3.0, warmup_steps=4, style="cosine")
    assert [round(decay.at(step)[0], 6) for step in (0, 2, 4)] == [3.0, 2.0, 1.0]


def test_copies_start_where_the_model_is(twin: Twin, features: Features) -> None:
    def started(spec: ExitSpec) -> dict[str, torch.Tensor]:
        return new_exit(twin, spec, None, features, [1, 2, 3], "copy").state_dict()

    layers, norm = twin.model.layers, twin.model.norm.weight
    mlp = started(ExitSpec(3, branch="mlp", norm="own", head="own"))
    torch.testing.assert_close(mlp["mlp.up_proj.weight"], layers[2].mlp.up_proj.weight)
    torch.testing.assert_close(mlp["norm.weight"], norm)
    torch.testing.assert_close(mlp["head.weight"], twin.head_weight)
    block = started(ExitSpec(3, branch="block", norm="own"))
    torch.testing.assert_close(block["block.self_attn.q_proj.weight"], layers[-1].self_attn.q_proj.weight)
    full = started(ExitSpec(1, head="low_rank", head_rank=twin.spec.hidden_size))
    product = full["head.up.weight"] @ full["head.down.weight"]
    torch.testing.assert_close(product, twin.head_weight, atol=1e-3, rtol=1e-3)


def test_drafts_are_those_of_decoding_one_by_one(
    twin: Twin, rows: list[Example], held: list[bool], features: Features
) -> None:
    node = new_exit(twin, STATE_EXIT, draft_ids(rows, held, 64, 300), features, range(1, 10), "copy")
    drafts = measure_drafts(node, twin, features, drafts=3)
    position = 0
    for row in (0, 10):
        example, base = rows[row], int(features.starts[row])
        found = twin.boundaries(torch.tensor([example.ids]), (1,))[1]
        for start in range(example.start, len(example.ids) - 1):
            state = torch.from_numpy(features.state[base + start - 1]).float()
            for draft in range(3):
                at = start + draft
                if at >= len(example.ids) - 1 or not drafts.is_usable[position, draft]:
                    break
                here = torch.tensor([[example.ids[at]]])
                part = type(found)(found.hidden[:, at : at + 1], found.middle[:, at : at + 1])
                out = node(part, twin.embedded(here), state[None, None], twin)
                assert node.ids is not None
                token = int(node.ids[int(out.logits[0, 0].argmax())])
                assert drafts.is_right[position, draft] == (token == features.targets[base + at])
                assert out.state is not None
                state = out.state[0, 0]
            position += 1
    assert position == len(drafts.is_right) == drafts.answer_ends[-1]


def test_a_round_is_played_from_where_the_last_one_ended() -> None:
    right = np.array([[1, 1], [0, 0], [1, 0], [1, 1], [0, 1]], dtype=bool)
    sure = np.array([[0.9, 0.9], [0.9, 0.9], [0.9, 0.2], [0.1, 0.9], [0.9, 0.9]], dtype=np.float32)
    drafts = Drafts(right, sure, np.ones_like(right), np.array([5]))
    costs = Costs({1: 1.0, 2: 1.5, 3: 1.75})
    both = play(drafts, Policy(2), 0.25, costs)  # three tokens from 0, two from 3
    assert (both.tokens_per_round, both.acceptance) == (2.5, 3 / 4)
    assert both.speed_up == pytest.approx(5 / (2 * (0.5 + 1.75)))
    careful = play(drafts, Policy(2, 0.5), 0.25, costs)  # from 3 the first draft is thrown away; then one round at 4
    assert careful.tokens_per_round == pytest.approx(5 / 3)
    assert careful.speed_up == pytest.approx(5 / ((0.5 + 1.75) + (0.25 + 1.0) + (0.5 + 1.75)))
    assert drafts.alphas == [3 / 5, 2 / 3]


def test_the_cost_of_a_draft_is_the_weights_it_reads(twin: Twin) -> None:
    costs = Costs({1: 1.0})
    layer = 64 * 16 * 2 * 6 + 3 * 64 * 96
    whole = 6 * layer + 300 * 64
    assert draft_cost(twin.spec, ExitSpec(3), costs) == pytest.approx((3 * layer + 300 * 64) / whole)
    branch = 192 * 64 + 8 * (2 * 192 + 64)
    assert draft_cost(twin.spec, STATE_EXIT, costs) == pytest.approx((layer + branch + 64 * 64) / whole)
    assert Costs({1: 1.0, 2: 1.2, 4: 1.6}).judging(3) == pytest.approx(1.4)
    assert Costs({1: 1.0, 2: 1.2, 4: 1.6}).judging(6) == pytest.approx(2.0)
    assert read_row_costs("1:1,2:1.06") == {1: 1.0, 2: 1.06}
    for bad in ("", "2:1.1", "1:1,x", "1:1,2:nan"):
        with pytest.raises(RequestError, match="--row-costs"):
            read_row_costs(bad)


def test_a_block_starts_as_the_last_layer_that_has_keys_and_values_of_its_own() -> None:
    spec = replace(kv_spec((0, 1, 2, 3, 4), qkv_bias=True), kv_map=(0, 1, 2, 2, 1))
    twin, node = random_twin(spec), ExitNode(spec, ExitSpec(1, branch="block"))
    copy_from_model(node, twin)
    expected = twin.model.layers[2].state_dict()
    assert node.block.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in node.block.state_dict().items())


def test_a_block_like_no_other_layer_is_refused_by_name() -> None:
    spec = kv_spec((0, 1, 2, 3, 4))
    wide = replace(spec.layers[0], mlp=replace(spec.layers[0].mlp, width=8))
    twin = random_twin(replace(spec, layers=(wide, *spec.layers[1:]), kv_map=(1, 1, 2, 3, 4)))
    with pytest.raises(RequestError, match=r"no layer of the model has the weights.*--start random"):
        copy_from_model(ExitNode(twin.spec, ExitSpec(1, branch="block")), twin)


@pytest.fixture
def data(rows: list[Example], tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    lines = [json.dumps({"p": row.ids[: row.start], "o": row.ids[row.start :]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


KINDS = {
    "draft-head": "--exit-layer 1 --kind linear --linear-mlp 16 --sees-token --sees-state --draft-vocab 64 --gate",
    "ee-llm-mlp": "--exit-layer 1 --exit-layer 3 --kind mlp --head own --target text --token-weighted",
    "ee-llm-block": "--exit-layer 3 --kind block --exit-weight 0.5 --weight-start 0 --weight-steps 4",
    "ee-llm-norm": "--exit-layer 3 --kind norm --head low-rank --head-rank 8",
    "closed-form": "--exit-layer 3 --kind linear --sees-token --closed-form",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_runs(kind: str, tiny_bundles: TinyBundles, twin: Twin, data: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", str(tiny_bundles.checkpoint(SPECULATOR))
    arguments = [checkpoint, str(out), "--data", str(data), "--steps", "6", "--batch-size", "4", "--json"]
    result = CliRunner().invoke(main, [*arguments, *KINDS[kind].split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text())
    for node, found in zip(load_exits(out, twin.spec), report["exits"], strict=True):
        assert found["spec"]["exit_layer"] == node.exit_spec.exit_layer
        assert len(found["alphas"]) == 4
        assert found["with_threshold"]["speed_up"] >= found["fixed_length"]["speed_up"]
    (out / "training.png").stat()


def test_the_curve_includes_the_exits_that_were_trained(tiny_bundles: TinyBundles, data: Path, tmp_path: Path) -> None:
    checkpoint, trained, out = str(tiny_bundles.checkpoint(SPECULATOR)), tmp_path / "trained", tmp_path / "curve"
    common = ["--data", str(data), "--features", str(tmp_path / "features")]
    depths = ["--exit-layer", "1", "--exit-layer", "3"]
    run = CliRunner().invoke
    options = [*common, *depths, "--sees-state", "--steps", "2", "--json"]
    assert run(main, [checkpoint, str(trained), *options], catch_exceptions=False).exit_code == 0
    one = [*common, "--draft-vocab", "0", "--draft-vocab", "64", "--trained", str(trained), "--json"]
    result = run(curve, [checkpoint, str(out), *one, *depths[:2]], catch_exceptions=False)  # features of fewer depths
    assert result.exit_code == 0, result.output
    entries = json.loads(result.stdout)
    assert [entry["kind"] for entry in entries[-2:]] == ["trained, hidden + state"] * 2
    assert len(entries) == 4 * 2 + 2
    assert json.loads((out / "curve.json").read_text())["entries"] == entries
    (out / "curve.png").stat()


def test_a_bad_request_is_one_line(tiny_bundles: TinyBundles, data: Path, tmp_path: Path) -> None:
    checkpoint = str(tiny_bundles.checkpoint(SPECULATOR))
    for options, words in (
        ("", "--exit-layer"),
        ("--exit-layer 6", "below the 6 layers"),
        ("--exit-layer 1 --kind mlp --sees-state", "only a linear branch"),
        ("--exit-layer 1 --exit-weight 1 --exit-weight 2", "one for each of 1 exits"),
        ("--exit-layer 1 --draft-vocab 301", "--draft-vocab"),
    ):
        result = CliRunner().invoke(main, [checkpoint, str(tmp_path / "o"), "--data", str(data), *options.split()])
        assert result.exit_code == 2, result.output
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
