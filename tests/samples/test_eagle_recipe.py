"""The recipe `eagle`: rows as decoding has them, the training-time test, and the head it writes, on a tiny model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from helpers.answers import assert_decoded_as_measured, write_answers
from helpers.drafters import Eagle3
from helpers.recipe_runs import call, stopped_and_resumed
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.layer import unit_rms
from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.eagle import main
from shortstack.samples.recipes.training.data import Example
from shortstack.samples.recipes.training.drafter_batches import TextOrder, drafted_rows, load_batch
from shortstack.samples.recipes.training.drafter_loss import DrafterLossSpec, drafter_loss, weighted
from shortstack.samples.recipes.training.drafter_measure import measure_drafter
from shortstack.samples.recipes.training.drafter_training import Answers, draft_vocabulary
from shortstack.samples.recipes.training.eagle_drafter import EagleDrafter
from shortstack.samples.recipes.training.eagle_files import read_head, write_head
from shortstack.samples.recipes.training.eagle_head import EagleHead, HeadSpec, new_head
from shortstack.samples.recipes.training.eagle_unroll import unroll
from shortstack.samples.recipes.training.features import Features, extract_features

DEPTHS = (2, 3, 4)
SPEC = HeadSpec(
    model_hidden=64, vocab_size=300, features=DEPTHS, feature_norm="each", intermediate_size=96, heads=4, kv_heads=2,
    head_dim=16, draft_vocab=200, theta=10000.0, eps=1e-5, max_positions=1024, drafts=3,
)  # fmt: skip
FORMULA = Eagle3(draft_vocab=200, features=DEPTHS, options={"fc_norm": True})
SAME = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums in another order

pytestmark = pytest.mark.usefixtures("one_thread")


def random_head(twin: Twin, spec: HeadSpec = SPEC, seed: int = 0) -> EagleHead:
    torch.manual_seed(seed)
    head = new_head(twin, spec, torch.randperm(300)[: spec.draft_vocab].sort().values)
    with torch.no_grad():
        for value in head.parameters():
            value.add_(torch.randn_like(value) * (0.3 if value.ndim == 1 else value.shape[1] ** -0.5))
    return head.eval()


def options(data: Path, steps: int = 6, *more: object) -> list[object]:
    sizes = ["--depth", 2, "--depth", 3, "--depth", 4, "--draft-vocab", 200]
    return ["--data", data, "--held-out-rows", 6, "--batch-size", 8, "--lr", 3e-3, "--steps", steps, *sizes, *more]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "head" / "model.safetensors")


def test_a_row_pairs_a_state_with_the_token_after_it_and_drafts_the_one_after_that(
    rows: list[Example], features: Features
) -> None:
    batch = load_batch([features], [(0, 3), (0, 10)], DEPTHS)
    for place, number in enumerate((3, 10)):
        ids, start, begin = rows[number].ids, rows[number].start, int(features.starts[number])
        window = batch.window[place][batch.counts[place]]
        assert batch.positions[window].tolist() == list(range(start - 1, len(ids) - 2))
        assert batch.next_ids[window].tolist() == list(ids[start:-1])
        assert batch.targets[place][batch.counts[place]].tolist() == list(ids[start + 1 :])  # greedy answers
        assert bool(batch.follows[place][batch.counts[place]].all())
        where = begin + batch.positions[window].numpy()
        np.testing.assert_array_equal(batch.features[window, 1].numpy(), features.hidden[3][where])
        np.testing.assert_array_equal(batch.state[place][batch.counts[place]].numpy(), features.state[where + 1])


def test_steps_of_the_training_time_test_are_rows_of_a_chain_as_decoding_drafts_it(
    twin: Twin, features: Features
) -> None:
    head, numbers = random_head(twin), (4, 9, 12)
    weights = {name: value.detach() for name, value in head.state_dict().items()}
    batch = load_batch([features], [(0, number) for number in numbers], DEPTHS)
    with torch.no_grad():
        steps = list(unroll(head, batch, twin.model.embed_tokens.weight, 4))
    compared = 0
    for place, number in enumerate(numbers):
        span = slice(int(features.starts[number]), int(features.starts[number + 1]))
        tokens = features.tokens[span].tolist()
        states = [torch.from_numpy(features.hidden[d][span].astype(np.float32)) if d in DEPTHS else torch.empty(0)
                  for d in range(5)]  # fmt: skip
        first, count = int(batch.positions[batch.window[place, 0]]), int(batch.counts[place].sum())
        for row in range(count):
            further = min(3, count - row - 1)
            chain = FORMULA.forced(
                weights, states, tokens, first + row + 1, further, twin.model.embed_tokens.weight.detach()
            )
            for step, g in enumerate(chain):
                torch.testing.assert_close(steps[step][place, row + step], g, **SAME)
                compared += 1
    assert compared > 60


def test_a_padded_text_gives_what_it_gives_alone(twin: Twin, features: Features) -> None:
    head, embedding = random_head(twin), twin.model.embed_tokens.weight
    together, alone = (load_batch([features], own, DEPTHS) for own in ([(0, 6), (0, 1)], [(0, 1)]))
    assert together.window.shape[1] > alone.window.shape[1]
    width = alone.window.shape[1]
    for a, b in zip(unroll(head, together, embedding, 3), unroll(head, alone, embedding, 3), strict=True):
        torch.testing.assert_close(a[1, :width], b[0], **SAME)


def test_the_loss_is_cross_entropy_and_distance_over_rows_that_can_be_drafted(twin: Twin, features: Features) -> None:
    head = random_head(twin)
    batch = load_batch([features], [(0, 3), (0, 10)], DEPTHS)
    found = drafter_loss(EagleDrafter(head), twin, batch, DrafterLossSpec(2, 0.5, 0.25, regression=3.0))
    for step, g in enumerate(unroll(head, batch, twin.model.embed_tokens.weight, 2)):
        expected = []
        for text, row in batch.counts.nonzero().tolist():
            target = int(batch.targets[text, row])
            if row < step or target not in head.ids.tolist():
                continue
            own = head.logits(g[text, row]).log_softmax(-1)
            whole = twin.logits(batch.state[text, row])[head.ids].softmax(-1)
            away = (unit_rms(g[text, row], 1e-5) - batch.state[text, row]).abs()
            distance = torch.where(away < 1, away.square() / 2, away - 0.5).mean()
            expected.append(-0.25 * own[head.ids.tolist().index(target)] - 0.75 * (whole * own).sum() + 3 * distance)
        torch.testing.assert_close(found[step], torch.stack(expected).mean(), **SAME)
    torch.testing.assert_close(weighted(found, 0.5), (found[0] + 0.5 * found[1]) / 1.5)


def test_states_are_learnt_through_the_chain(twin: Twin, features: Features) -> None:
    head = random_head(twin)
    batch = load_batch([features], [(0, 3)], DEPTHS)
    list(unroll(head, batch, twin.model.embed_tokens.weight, 3))[2][:, 3:].sum().backward()
    assert float(head.fc.weight.grad.abs().max()) > 0  # type: ignore[union-attr]


def test_every_text_is_trained_on_once_an_epoch(features: Features) -> None:
    texts = drafted_rows([features], held_out=False)
    assert [row for _, row in texts] == list(range(34))
    order = TextOrder([features], texts, 8, seed=1)
    epoch = [row for index in range(order.per_epoch) for row in order[index]]
    assert len(set(epoch)) == len(epoch) == 32
    again = TextOrder([features], texts, 8, seed=1)
    assert again[order.per_epoch + 1] == order[order.per_epoch + 1]
    assert order[order.per_epoch + 1] != order[1]


def test_the_draft_vocabulary_holds_what_ends_a_text(rows: list[Example]) -> None:
    ids = draft_vocabulary([Answers("a", rows, [False] * len(rows))], 5, 300, (299, 7)).tolist()
    assert ids == sorted(ids)
    assert len(ids) == 5
    assert {7, 299} <= set(ids)


def test_the_written_head_drafts_in_the_runtime_what_training_measured(
    checkpoint: Path, twin: Twin, rows: list[Example], data: Path, tmp_path: Path
) -> None:
    report = call(main, checkpoint, tmp_path / "run", *options(data, 40, "--feature-norm", "each"))
    assert [entry["step"] for entry in report["losses"]] == [10, 20, 30, 40]
    assert report["losses"][-1]["draft 1"] < report["losses"][0]["draft 1"]
    assert report["head"]["coverage"] > 0.5
    assert (tmp_path / "run" / "training.png").stat().st_size > 10_000
    head = read_head(tmp_path / "run" / "head", twin, 3)
    used = extract_features(twin, rows, [True] * len(rows), tmp_path / "f", DEPTHS, use_bf16=False)
    drafts = measure_drafter(EagleDrafter(head), twin, [used], drafted_rows([used], held_out=True), 4)
    assert 0.1 < drafts.alphas[0] < 1  # both outcomes are compared
    drafter = str(tmp_path / "run" / "head")
    bundle = export_bundle(ExportSpec(str(checkpoint), tmp_path / "bundle", drafter=drafter)).folder
    assert_decoded_as_measured(bundle, rows, drafts)


def test_a_run_that_was_stopped_goes_on_to_the_same_head(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    given = options(data, 6, "--save-every", 2, "--measure-every", 3)
    whole, stopped = stopped_and_resumed(main, checkpoint, tmp_path, 4, *given)
    for name, value in tensors(tmp_path / "whole").items():
        assert torch.equal(value, tensors(tmp_path / "stopped")[name]), name
    assert stopped["head"] == whole["head"]
    assert stopped["measures"] == whole["measures"]
    refused = CliRunner().invoke(
        main, [str(a) for a in (checkpoint, tmp_path / "stopped", *given, "--unroll", 2)], catch_exceptions=False
    )
    assert refused.exit_code == 2
    assert "unroll = 3" in refused.stderr
    assert "unroll = 2" in refused.stderr


def test_a_head_is_continued_with_further_answers(
    checkpoint: Path, rows: list[Example], data: Path, tmp_path: Path
) -> None:
    call(main, checkpoint, tmp_path / "first", *options(data, 30, "--feature-norm", "each"))
    more = write_answers(rows, tmp_path / "more.jsonl")
    given = ["--data", data, "--more-data", more, "--held-out-rows", 6, "--batch-size", 8, "--init"]
    given += [tmp_path / "first" / "head", "--epochs", 1, "--lr", 1e-9]
    report = call(main, checkpoint, tmp_path / "second", *given)
    assert report["measures"][-1]["step"] == (34 + 40) // 8
    old, new = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    for name, value in old.items():
        torch.testing.assert_close(new[name].float(), value.float(), rtol=0, atol=2e-3)
    assert json.loads((tmp_path / "second/head/config.json").read_text())["fc_norm"] is True


def test_a_head_is_written_and_read_whole(twin: Twin, tmp_path: Path) -> None:
    for spec in (SPEC, replace(SPEC, feature_norm="none", heads=6, kv_heads=3, head_dim=8, intermediate_size=40)):
        head = random_head(twin, spec)
        write_head(head, tmp_path / "head")
        read = read_head(tmp_path / "head", twin, 3)
        assert asdict(read.spec) == asdict(spec)
        assert torch.equal(read.ids, head.ids)
        for name, value in head.state_dict().items():
            torch.testing.assert_close(read.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_a_head_that_cannot_be_continued_is_one_line(checkpoint: Path, twin: Twin, data: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    for name, change in (
        ("hidden_size is 65", {"hidden_size": 65}),
        ("tensor fc.weight is", {"eagle_aux_hidden_state_layer_ids": [2, 3]}),
        ("depths [2, 3, 6]", {"eagle_aux_hidden_state_layer_ids": [2, 3, 6]}),
        ("4 heads, 3 for keys", {"num_key_value_heads": 3}),
        ("head_dim", {"head_dim": None}),
    ):
        write_head(random_head(twin), head)
        config = json.loads((head / "config.json").read_text())
        kept = {key: value for key, value in (config | change).items() if value is not None}
        (head / "config.json").write_text(json.dumps(kept))
        assert name in refusal(checkpoint, tmp_path, data, "--init", head)
    write_head(random_head(twin), head)
    found = tensors(tmp_path)
    save_file(found | {"d2t": found["d2t"].flip(0)}, head / "model.safetensors")
    assert "ascending token ids" in refusal(checkpoint, tmp_path, data, "--init", head)
    (head / "model.safetensors").write_bytes(b"no tensors")
    assert "cannot be read" in refusal(checkpoint, tmp_path, data, "--init", head)
    assert "--heads" in refusal(checkpoint, tmp_path, data, "--init", head, "--heads", 2)
    assert not (tmp_path / "out").exists()


def refusal(checkpoint: Path, folder: Path, data: Path, *given: object) -> str:
    common = [checkpoint, folder / "out", "--data", data, "--held-out-rows", 6, *given]
    result = CliRunner().invoke(main, [str(a) for a in common], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_a_bad_request_is_one_line(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    empty, short, foreign = (tmp_path / name for name in ("empty.jsonl", "short.jsonl", "foreign.jsonl"))
    empty.write_text("")
    short.write_text('{"p": [5], "o": [6]}\n' * 12)
    foreign.write_text('{"p": [5], "o": [6, 300]}\n')
    for given, words in (
        (["--depth", 6], "2..5"),
        (["--depth", 1], "2..5"),
        (["--draft-vocab", 301], "at most the 300 token ids"),
        (["--heads", 5, "--kv-heads", 2], "5 heads, 2 for keys"),
        (["--head-dim", 15], "15 wide"),
        (["--held-out-rows", 30], "too small to hold 30 rows out"),
        (["--data", empty], "no text to learn from"),
        (["--data", foreign], "token ids below 300"),
        (["--data", short], "two tokens or more"),
        (["--more-data", data], "different names"),
        (["--init", tmp_path / "nothing"], "config.json"),
    ):
        assert words in refusal(checkpoint, tmp_path, data, *given), words
