"""The recipe `assistant`: its training-time test, its start, and the drafter it writes, on a tiny model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.answers import assert_decoded_as_measured, write_answers
from helpers.own_assistants import LlamaAssistant
from helpers.recipe_runs import call, stopped_and_resumed
from shortstack.export.arch import ARCHITECTURES
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.drafters import ModelOfDrafter
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.layer import unit_rms
from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import RequestError, UnsupportedError
from shortstack.samples.recipes.assistant import assistant_spec, main, readable_layers
from shortstack.samples.recipes.training.assistant_drafter import AssistantDrafter
from shortstack.samples.recipes.training.assistant_files import read_assistant, write_assistant
from shortstack.samples.recipes.training.assistant_head import Assistant, AssistantSpec
from shortstack.samples.recipes.training.assistant_start import new_assistant
from shortstack.samples.recipes.training.assistant_unroll import unroll
from shortstack.samples.recipes.training.data import Example
from shortstack.samples.recipes.training.drafter_batches import drafted_rows, load_batch
from shortstack.samples.recipes.training.drafter_loss import DrafterLossSpec, drafter_loss
from shortstack.samples.recipes.training.drafter_measure import measure_drafter
from shortstack.samples.recipes.training.features import Features, extract_features

KV_LAYERS = (3, 1)
SPEC = AssistantSpec(
    model_hidden=64, vocab_size=300, kv_layers=KV_LAYERS, hidden_size=32, intermediate_size=48, heads=4, kv_heads=2,
    head_dim=16, ropes=(0, 0), windows=(0, 0), draft_vocab=200, eps=1e-6, max_positions=1024,
)  # fmt: skip
FORMULA = LlamaAssistant(kv_layers=KV_LAYERS)
SAME = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums in another order
HALF = {"rtol": 2e-2, "atol": 2e-2}  # from float16 activations

pytestmark = pytest.mark.usefixtures("one_thread")


def random_assistant(spec: AssistantSpec = SPEC, seed: int = 0) -> Assistant:
    torch.manual_seed(seed)
    assistant = Assistant(spec, torch.randperm(300)[: spec.draft_vocab].sort().values)
    with torch.no_grad():
        for value in assistant.parameters():
            value.copy_(torch.rand_like(value) + 0.5 if value.ndim == 1 else torch.randn_like(value))
            value.mul_(1.0 if value.ndim == 1 else 1.5 * value.shape[1] ** -0.5)
    return assistant.eval()


def model_of_drafter(checkpoint: Path, twin: Twin) -> ModelOfDrafter:
    return ModelOfDrafter(open_checkpoint(str(checkpoint)), twin.spec, ARCHITECTURES[twin.spec.model_type])


def options(data: Path, steps: int = 6, *more: object) -> list[object]:
    sizes = ["--kv-layer", 3, "--kv-layer", 1, "--draft-vocab", 200, "--hidden-size", 32]
    return ["--data", data, "--held-out-rows", 6, "--batch-size", 8, "--lr", 3e-3, "--steps", steps, *sizes, *more]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "assistant" / "model.safetensors")


@pytest.mark.parametrize("window", [0, 3])
def test_steps_of_the_training_time_test_are_drafts_of_rounds_as_decoding_makes_them(
    checkpoint: Path, twin: Twin, features: Features, window: int
) -> None:
    assistant, numbers = random_assistant(replace(SPEC, windows=(window, window))), (4, 9, 12)
    weights = {name: value.detach() for name, value in assistant.state_dict().items()}
    reference = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    batch = load_batch([features], [(0, number) for number in numbers], (1, 3))
    with torch.no_grad():
        steps = list(unroll(assistant, twin, batch, 4))
    compared = 0
    for place, number in enumerate(numbers):
        tokens = features.tokens[int(features.starts[number]) : int(features.starts[number + 1])].tolist()
        first, count = int(batch.positions[batch.window[place, 0]]), int(batch.counts[place].sum())
        for row in range(count):
            further = min(3, count - row - 1)
            chain = FORMULA.forced(weights, reference, tokens, first + row + 2, further, window)
            for step, y in enumerate(chain):
                torch.testing.assert_close(steps[step][place, row + step], y, **HALF)
                compared += 1
    assert compared > 60


def test_a_padded_text_gives_what_it_gives_alone(twin: Twin, features: Features) -> None:
    together, alone = (load_batch([features], own, (1, 3)) for own in ([(0, 6), (0, 1)], [(0, 1)]))
    assert together.window.shape[1] > alone.window.shape[1]
    width, assistant = alone.window.shape[1], random_assistant()
    for a, b in zip(unroll(assistant, twin, together, 3), unroll(assistant, twin, alone, 3), strict=True):
        torch.testing.assert_close(a[1, :width], b[0], **SAME)


def test_every_gradient_is_a_number_and_states_are_learnt_through_the_chain(twin: Twin, features: Features) -> None:
    assistant = random_assistant()
    texts = drafted_rows([features], held_out=False)
    batch = load_batch([features], texts, (1, 3))
    assert bool((batch.positions[batch.window[:, 0]] == 1).any())  # a chain of four begins before the text
    losses = drafter_loss(AssistantDrafter(assistant), twin, batch, DrafterLossSpec(4, 1.0, 0.5, regression=1.0))
    losses[3].backward()
    for name, value in assistant.named_parameters():
        assert value.grad is not None, name
        assert bool(value.grad.isfinite().all()), name
    assert float(assistant.post_projection.weight.grad.abs().max()) > 0  # type: ignore[union-attr]


def test_it_starts_as_the_best_linear_drafter_of_its_width(twin: Twin, features: Features) -> None:
    texts, found, guessed = drafted_rows([features], held_out=False), {}, {}
    batch = load_batch([features], texts, (1, 3))
    counts = batch.counts
    for width in (64, 16, 80):
        torch.manual_seed(0)
        spec = replace(SPEC, hidden_size=width, draft_vocab=300)
        assistant = new_assistant(twin, spec, torch.arange(300), [features], texts)
        with torch.no_grad():  # what is left is linear, but for norms
            for layer in assistant.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            (y,) = unroll(assistant, twin, batch, 1)
        found[width] = float((assistant.logits(y).argmax(-1) == batch.targets)[counts].float().mean())
        guessed[width] = assistant.state(y)[counts]
    ids, states = batch.next_ids[batch.window][counts], twin.state(batch.state[counts])
    pair = torch.cat([unit_rms(part, 1e-6) for part in (twin.embedded(ids), twin.state(batch.before[counts]))], dim=-1)
    best = torch.linalg.solve(pair.T @ pair + 3.0 * torch.eye(128), pair.T @ states)
    right = (pair @ best @ twin.head_weight.T).argmax(-1) == batch.targets[counts]
    assert abs(found[64] - float(right.float().mean())) < 0.03
    assert abs(found[80] - found[64]) < 0.02
    assert 0.02 < found[16] < found[64]
    left, least = (float((states - own).detach().square().mean()) for own in (guessed[64], pair @ best))
    assert left < 1.15 * least < float(states.detach().var())


def test_the_written_assistant_drafts_in_the_runtime_what_training_measured(
    checkpoint: Path, twin: Twin, rows: list[Example], data: Path, tmp_path: Path
) -> None:
    report = call(main, checkpoint, tmp_path / "run", *options(data, 40))
    assert report["recipe"] == "assistant"
    assert [entry["step"] for entry in report["losses"]] == [10, 20, 30, 40]
    assert report["losses"][-1]["draft 1"] < report["losses"][0]["draft 1"]
    assert report["assistant"]["coverage"] > 0.5
    assert (tmp_path / "run" / "training.png").stat().st_size > 10_000
    model_of = model_of_drafter(checkpoint, twin)
    drafter = AssistantDrafter(read_assistant(tmp_path / "run" / "assistant", model_of))
    used = extract_features(twin, rows, [True] * len(rows), tmp_path / "f", (1, 3), use_bf16=False)
    drafts = measure_drafter(drafter, twin, [used], drafted_rows([used], held_out=True), 4)
    assert 0.1 < drafts.alphas[0] < 1  # both outcomes are compared
    folder = str(tmp_path / "run" / "assistant")
    bundle = export_bundle(ExportSpec(str(checkpoint), tmp_path / "bundle", drafter=folder)).folder
    assert_decoded_as_measured(bundle, rows, drafts)


def test_a_run_that_was_stopped_goes_on_to_the_same_assistant(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    given = options(data, 6, "--save-every", 2, "--measure-every", 3)
    whole, stopped = stopped_and_resumed(main, checkpoint, tmp_path, 4, *given)
    for name, value in tensors(tmp_path / "whole").items():
        assert torch.equal(value, tensors(tmp_path / "stopped")[name]), name
    assert stopped["assistant"] == whole["assistant"]
    assert stopped["measures"] == whole["measures"]
    words = refusal(checkpoint, tmp_path / "stopped", *given, "--step-decay", 0.5)
    assert "step_decay = 0.8" in words
    assert "step_decay = 0.5" in words


def test_an_assistant_is_continued_with_further_answers(
    checkpoint: Path, rows: list[Example], data: Path, tmp_path: Path
) -> None:
    call(main, checkpoint, tmp_path / "first", *options(data, 10))
    more = write_answers(rows, tmp_path / "more.jsonl")
    given = ["--data", data, "--more-data", more, "--held-out-rows", 6, "--batch-size", 8, "--init"]
    given += [tmp_path / "first" / "assistant", "--epochs", 1, "--lr", 1e-9]
    report = call(main, checkpoint, tmp_path / "second", *given)
    assert report["measures"][-1]["step"] == (34 + 40) // 8
    old, new = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    for name, value in old.items():
        torch.testing.assert_close(new[name].float(), value.float(), rtol=0, atol=2e-3)


def test_an_assistant_is_written_and_read_whole(checkpoint: Path, twin: Twin, tmp_path: Path) -> None:
    model = model_of_drafter(checkpoint, twin)
    other = replace(SPEC, kv_layers=(5, 5, 2), ropes=(0,) * 3, windows=(0, 7, 7), heads=6, hidden_size=24)
    for spec in (SPEC, other):
        assistant = random_assistant(spec)
        write_assistant(assistant, tmp_path / "assistant")
        read = read_assistant(tmp_path / "assistant", model)
        assert asdict(read.spec) == asdict(replace(spec, max_positions=read.spec.max_positions))
        assert torch.equal(read.ids, assistant.ids)
        for name, value in assistant.state_dict().items():
            torch.testing.assert_close(read.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["assistant"]


def refusal(checkpoint: Path, out: Path, *given: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in (checkpoint, out, *given)], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_what_cannot_be_continued_is_one_line(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "assistant", tmp_path / "out"
    given = ["--data", data, "--held-out-rows", 6, "--init", folder]

    def broken(**changes: Any) -> str:
        write_assistant(random_assistant(), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return refusal(checkpoint, out, *given)

    text = json.loads(json.dumps(SPEC.to_json()))["text_config"]
    assert "state_size is 65" in broken(backbone_hidden_size=65)
    assert "kv_layers" in broken(kv_layers=[3, 6])
    assert "tensor lm_head.weight is [200, 32], not [200, 33]" in broken(text_config=text | {"hidden_size": 33})
    assert "hidden_act" in broken(text_config=text | {"hidden_act": "gelu"})
    assert "drafter of another kind" in broken(text_config=text | {"model_type": "llama"})
    write_assistant(random_assistant(), folder)
    found = load_file(folder / "model.safetensors")
    save_file(found | {"d2t": found["d2t"] + 300}, folder / "model.safetensors")
    assert "d2t names token id" in refusal(checkpoint, out, *given)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    assert "model.safetensors" in refusal(checkpoint, out, *given)
    assert "--kv-layer, --heads" in refusal(checkpoint, out, *given, "--heads", 2, "--kv-layer", 2)
    assert not out.exists()


def test_a_bad_request_is_one_line(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    short, foreign = tmp_path / "short.jsonl", tmp_path / "foreign.jsonl"
    short.write_text('{"p": [5], "o": [6]}\n' * 12)
    foreign.write_text('{"p": [5], "o": [6, 300]}\n')
    common = ["--data", data, "--held-out-rows", 6]
    for given, words in (
        (["--kv-layer", 6], "found 6, expected one of 1, 2, 3, 4, 5"),
        (["--kv-layer", 0], "found 0, expected one of 1, 2, 3, 4, 5"),
        (["--kv-layer", 1, "--kv-layer", 2, "--layers", 3], "one for each of --layers 3"),
        (["--heads", 5], "a multiple of the 2"),
        (["--draft-vocab", 301], "at most the 300 token ids"),
        (["--held-out-rows", 30], "too small to hold 30 rows out"),
        (["--data", foreign], "token ids below 300"),
        (["--data", short], "two tokens or more"),
        (["--more-data", data], "different names"),
        (["--from-scratch"], "--from-scratch trains a stack"),
        (["--init", tmp_path / "nothing"], "nothing"),
    ):
        assert words in refusal(checkpoint, tmp_path / "out", *common, *given), words


def test_what_a_model_has_decides_what_is_read(twin: Twin) -> None:
    none: dict[str, Any] = dict.fromkeys(("layers", "hidden_size", "intermediate_size", "heads", "draft_vocab"))
    model = twin.spec
    spec = assistant_spec(model, none | {"kv_layers": ()})
    assert (spec.kv_layers, spec.hidden_size, spec.intermediate_size, spec.draft_vocab) == ((5, 5), 64, 256, 300)
    assert assistant_spec(model, none | {"kv_layers": (2,), "layers": 3}).kv_layers == (2, 2, 2)
    assert readable_layers(replace(model, kv_map=(0, 1, 1, 1, 1, 1))) == (1,)
    with pytest.raises(RequestError, match="a layer above the first"):
        assistant_spec(replace(model, kv_map=(0,) * 6), none | {"kv_layers": ()})
    # Layers 2 and 3 use keys and values of layer 4: what they read exists only once all three have run.
    assert readable_layers(replace(model, kv_map=(0, 1, 4, 4, 4, 5))) == (1, 5)
    slides = replace(model, layers=(*model.layers[:4], *(windowed(layer, 9) for layer in model.layers[4:])))
    assert assistant_spec(slides, none | {"kv_layers": ()}).kv_layers == (3, 3)
    own = assistant_spec(slides, none | {"kv_layers": (5, 3)})
    assert own.windows == (9, 0)
    assert own.to_json()["text_config"]["layer_types"] == ["sliding_attention", "full_attention"]
    ends = replace(model.ends, final_norm=replace(model.ends.final_norm, kind="layer", has_bias=True))
    with pytest.raises(UnsupportedError, match=r"final norm has a bias.*recipes\.eagle"):
        assistant_spec(replace(model, ends=ends), none | {"kv_layers": ()})


def windowed(layer: Any, window: int) -> Any:
    return replace(layer, attention=replace(layer.attention, window=window))
