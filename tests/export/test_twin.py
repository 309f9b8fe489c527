"""The PyTorch twin computes what transformers computes at every depth, writes checkpoints, and skips layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import tolerances
from helpers.tiny_models import BASE, SWITCHES, TinyBundles, TinyModel
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.parity.reference import Reference
from shortstack.export.rope import FloatArray, rope_tables
from shortstack.export.twin.exits import ExitNode
from shortstack.export.twin.folder import load_twin, save_twin
from shortstack.export.twin.layer import Layer
from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import BundleError
from shortstack.graphs.layer_spec import Rope
from shortstack.graphs.plan import ExitSpec

TWIN = 1e-4
"""Twin against transformers, float32 logits with a standard deviation of 2 to 3. Measured: mostly 0, at most 3e-6."""


@pytest.fixture(autouse=True)
def quick(one_torch_thread: object) -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def ids_of(vocab: int, batch: int = 2, length: int = 100) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length))


@pytest.mark.parametrize("tiny", SWITCHES, ids=lambda tiny: tiny.name)
def test_the_twin_computes_what_transformers_computes(tiny_bundles: TinyBundles, tiny: TinyModel) -> None:
    folder = tiny_bundles.checkpoint(tiny)
    twin = load_twin(str(folder)).eval()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = ids_of(tiny.vocab)
    expected = reference(ids, output_hidden_states=True)
    assert (twin(ids) - expected.logits).abs().max() < TWIN
    found = twin.boundaries(ids, range(1, tiny.layers + 1))
    for depth in range(1, tiny.layers):  # transformers has applied the norm to its last hidden state
        assert (found[depth].hidden - expected.hidden_states[depth]).abs().max() < TWIN


def test_padding_at_the_end_changes_nothing(tiny_bundles: TinyBundles) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE))).eval()
    ids = ids_of(BASE.vocab, length=20)
    padded = torch.nn.functional.pad(ids, (0, 7))
    assert torch.equal(twin(padded)[:, :20].argmax(-1), twin(ids).argmax(-1))
    assert (twin(padded)[:, :20] - twin(ids)).abs().max() < TWIN


@pytest.mark.parametrize(
    "name", ["base", "all-biases-tied", "rope-llama3", "rope-linear", "odd-sizes", "head-dim-20-biased"]
)
def test_the_twins_checkpoint_is_read_back_and_exported(tiny_bundles: TinyBundles, tmp_path: Path, name: str) -> None:
    tiny = next(tiny for tiny in SWITCHES if tiny.name == name)
    checkpoint = open_checkpoint(str(tiny_bundles.checkpoint(tiny)))
    twin = load_twin(checkpoint.source)
    save_twin(twin, tmp_path / "written", checkpoint.files())
    again = load_twin(str(tmp_path / "written"))
    assert again.spec == twin.spec
    for key, value in twin.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    transformers_model = AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32)
    ids = ids_of(tiny.vocab)
    assert (transformers_model(ids).logits - twin(ids)).abs().max() < TWIN
    assert (tmp_path / "written" / "tokenizer.json").is_file()


def test_an_existing_folder_is_not_overwritten(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(BundleError, match="mine"):
        save_twin(twin, tmp_path / "mine", {})
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_a_layer_that_is_always_dropped_has_no_effect(tiny_bundles: TinyBundles) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE)))
    twin.layer_dropout = (0.0, 1.0, 0.0, 0.0)
    ids = ids_of(BASE.vocab)
    dropped = twin.train()(ids)
    without = Twin(replace(twin.spec, layers=twin.spec.layers[:3], kv_map=()))
    state = {name: value for name, value in twin.state_dict().items() if ".layers.1." not in name}
    moved = {name.replace("layers.2.", "layers.1.").replace("layers.3.", "layers.2."): v for name, v in state.items()}
    without.load_state_dict(moved)
    assert torch.equal(dropped, without.eval()(ids))
    assert not torch.equal(dropped, twin.eval()(ids))  # evaluation never drops


def test_a_layer_is_dropped_for_each_sample_separately(tiny_bundles: TinyBundles) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE)))
    twin.layer_dropout = (0.5, 0.0, 0.0, 0.0)
    ids = ids_of(BASE.vocab, batch=1, length=9).expand(200, -1)
    out = twin.train()(ids)[:, -1, 0]
    values, counts = out.round(decimals=3).unique(return_counts=True)
    assert len(values) == 2
    assert 60 < counts.min() <= counts.max() < 140


def test_consumers_attend_to_their_producer(tiny_bundles: TinyBundles) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE)))
    shared = Twin(replace(twin.spec, kv_map=(0, 1, 1, 1))).eval()
    lacking = shared.load_state_dict(twin.state_dict(), strict=False)
    assert not lacking.missing_keys
    assert {key.split(".")[2] for key in lacking.unexpected_keys} == {"2", "3"}
    ids = ids_of(BASE.vocab, length=11)
    rotary = shared.rotaries(ids)
    x, lent = shared.model.embed_tokens(ids), None
    for index, layer in enumerate(shared.model.layers):
        assert isinstance(layer, Layer)
        x, _, used = layer(x, rotary, lent)
        lent = used if index >= 1 else None
    assert torch.equal(shared(ids), shared.logits(x))
    assert not torch.equal(shared(ids), twin(ids))


def test_a_depth_outside_the_model_is_an_error(tiny_bundles: TinyBundles) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE)))
    for depth in (0, 5):
        with pytest.raises(ValueError, match="depths"):
            twin.boundaries(ids_of(BASE.vocab), (depth,))


def test_smollm2_computes_what_transformers_computes(smollm2_gguf: Path, smollm2_reference: Reference) -> None:
    twin = load_twin(str(smollm2_gguf)).eval()
    ids = ids_of(twin.spec.vocab_size, batch=1, length=24)
    expected = smollm2_reference.run_text(ids[0].tolist(), (8, 30)).heads
    found = twin.boundaries(ids, (8, 30))
    for depth, logits in expected.items():
        assert np.abs(twin.logits(found[depth].hidden)[0].numpy() - logits).max() <= tolerances.SMOLLM2.max_abs


def test_rotary_tables_are_made_once_and_grow_with_the_text(
    tiny_bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE))).eval()
    node = ExitNode(twin.spec, ExitSpec(2, branch="block"))
    made: list[int] = []

    def counted(
        rope: Rope, length: int, factors: FloatArray | None = None, context: int | None = None
    ) -> tuple[FloatArray, FloatArray]:
        made.append(length)
        return rope_tables(rope, length, factors, context)

    monkeypatch.setattr("shortstack.export.twin.model.rope_tables", counted)
    monkeypatch.setattr("shortstack.export.twin.exits.rope_tables", counted, raising=False)
    for length in (7, 20, 512, 600, 9):
        ids = ids_of(BASE.vocab, length=length)
        node(twin.boundaries(ids, (2,))[2], None, None, twin)
    assert made == [512, 600]
