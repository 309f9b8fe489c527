"""``export --adapter``: the merged model equals peft's, whatever type the base is stored in."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import gguf_files, tolerances
from helpers.adapters import A, edit_tensors, lora
from helpers.bad_input import edit_json
from helpers.families import MadeFamily
from helpers.family_rows import FamilyRow
from helpers.tiny_models import BASE, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.adapter_config import matching_pattern
from shortstack.export.arch import resolve
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.kept_blocks import choose_blocks
from shortstack.export.parity.compare import compare
from shortstack.export.parity.reference import Reference
from shortstack.export.sources import matrix_sources
from shortstack.export.spec import ExportSpec
from shortstack.export.tensors import ModelTensors
from shortstack.export.twin.folder import load_twin
from shortstack.graphs import names
from shortstack.runtime import load

QUANTIZABLE = replace(BASE, name="adapter-gguf", layers=2, attention_bias=False)
SUM_ROUNDING = 2e-6
"""Largest difference from peft's sums: numpy and torch may add float32 products in different orders. Measured: 0."""


STACKED = {  # projections of several at once, and matrices [in, out]
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "lm_head"],
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
}


def merged_by_peft(checkpoint: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        return PeftModel.from_pretrained(model, folder).merge_and_unload()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few modules": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "with the head": {"target_modules": ["v_proj", "lm_head"]},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {
        # The first pattern that matches holds. peft saves patterns sorted, and cannot read its own file otherwise.
        "rank_pattern": {"layers.1.mlp.down_proj": 7, r"layers\.[23]\..*_proj": 3, "q_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 40, "proj": 99, "up_proj": 1, "v_proj": 5},
    },
    "patterns, rank-stabilized": {"use_rslora": True, "rank_pattern": {"o_proj": 9}, "alpha_pattern": {"k_proj": 3}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_equals_the_one_that_peft_merges(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = lora(tmp_path / "adapter", base, **KINDS[kind])
    expected = merged_by_peft(base, adapter).state_dict()
    plain = open_checkpoint(str(base))
    checkpoint = AdaptedCheckpoint(plain, adapter)
    assert checkpoint.names() == expected.keys() == plain.names()
    assert checkpoint.touched
    for name in sorted(checkpoint.names()):
        found = checkpoint.tensor(name)
        assert found.flags.c_contiguous
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[name].numpy(), rtol=0, atol=SUM_ROUNDING)
        is_changed = bool((found != plain.tensor(name)).any())
        assert is_changed == (name in checkpoint.touched), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_factors_may_be_stored_in_half_precision(base: Path, adapter: Path, dtype: str) -> None:
    import ml_dtypes

    before = AdaptedCheckpoint(open_checkpoint(str(base)), adapter)
    file = adapter / "adapter_model.safetensors"
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    save_file({name: value.astype(kind) for name, value in load_file(file).items()}, file)
    after = AdaptedCheckpoint(open_checkpoint(str(base)), adapter)
    for name in before.touched:
        np.testing.assert_allclose(after.delta(name), before.delta(name), atol=0.01)


def test_a_pattern_matches_a_name_or_its_end_after_a_dot() -> None:
    from peft.utils.other import get_pattern_key

    module = "model.layers.11.mlp.down_proj"
    for patterns in (["proj"], ["down_proj"], ["1.mlp.down_proj"], ["layers.1", ".*proj"], ["mlp", "^model.*", module]):
        expected = get_pattern_key(patterns, module)
        found = matching_pattern(dict.fromkeys(patterns, 1), module)
        assert (found or module) == expected, patterns


def test_a_bundle_with_an_adapter_computes_what_peft_merges(
    base: Path, adapter: Path, tmp_path: Path, one_torch_thread: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert run(["export", str(base), str(out), "-e", "2", "--adapter", str(adapter)]) == 0
    merged_by_peft(base, adapter).save_pretrained(tmp_path / "merged")
    reference = Reference(str(tmp_path / "merged"))
    one_torch_thread()
    model = load(out)
    text = np.random.randint(0, BASE.vocab, 40).tolist()
    report = compare(model, reference, [text], greedy_tokens=16)
    report.tolerance = tolerances.TINY
    assert not report.problems()
    capsys.readouterr()

    arguments = ["parity", str(base), str(out), "--prompts", "1", "--greedy-tokens", "4"]
    assert run([*arguments, "--adapter", str(adapter)]) == 0
    assert run(arguments) == 1, "without the adapter it is a different model"


def test_an_adapter_trained_on_the_twin_merges_to_what_the_twin_computed(base: Path, tmp_path: Path) -> None:
    from shortstack.export.twin.folder import twin_of
    from shortstack.samples.recipes.training.low_rank import adapter_tensors, add_lora, save_adapter

    twin = load_twin(str(base)).eval()
    config = add_lora(twin, rank=2, lower_rank=5, lower_layers=1)
    with torch.no_grad():
        for tensor in adapter_tensors(twin).values():
            tensor.normal_(0.0, 0.1)
        save_adapter(tmp_path / "adapter", config, twin, "tiny", torch.float32)
        merged = twin_of(AdaptedCheckpoint(open_checkpoint(str(base)), tmp_path / "adapter")).eval()
        ids = torch.randint(0, BASE.vocab, (1, 30))
        expected, plain = twin(ids), load_twin(str(base)).eval()(ids)
        torch.testing.assert_close(merged(ids), expected, rtol=0, atol=tolerances.TINY.max_abs)
    assert (expected - plain).abs().max() > 100 * tolerances.TINY.max_abs


def test_a_bundle_names_base_and_adapter_but_no_folders(base: Path, adapter: Path, tmp_path: Path) -> None:
    manifest = export_bundle(ExportSpec(str(base), tmp_path / "out", adapter=adapter)).manifest
    assert manifest.source_name == f"{base.name} + {adapter.name}"
    assert manifest.source_sha256 == AdaptedCheckpoint(open_checkpoint(str(base)), adapter).digest()


def test_the_digest_covers_the_base_and_both_files(base: Path, adapter: Path, tiny_bundles: TinyBundles) -> None:
    def digest(checkpoint: Path = base) -> str:
        return AdaptedCheckpoint(open_checkpoint(str(checkpoint)), adapter).digest()

    seen = [open_checkpoint(str(base)).digest(), digest(), digest(tiny_bundles.checkpoint(replace(BASE, name="other")))]
    edit_json(adapter / "adapter_config.json", lora_alpha=7)
    seen.append(digest())
    edit_tensors(adapter, lambda t: t.update({A: t[A] + 1}))
    seen.append(digest())
    assert len(set(seen)) == len(seen)


def gguf_base(tiny: TinyModel, tiny_bundles: TinyBundles, file: Path, kind: str) -> Path:
    def edit(writer: gguf_files.gguf.GGUFWriter) -> None:
        gguf_files.byte_level(writer)
        writer.add_vocab_size(tiny.vocab)  # otherwise transformers uses the number of tokens

    tensors = gguf_files.of_checkpoint(tiny_bundles.checkpoint(tiny), tiny.layers)
    return gguf_files.write(file, tensors, edit=edit, quantization=gguf_files.Kind[kind], tiny=tiny)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_a_gguf_base_is_dequantized_and_then_merged(tiny_bundles: TinyBundles, tmp_path: Path, kind: str) -> None:
    adapter = lora(tmp_path / "adapter", tiny_bundles.checkpoint(QUANTIZABLE), target_modules=["q_proj", "down_proj"])
    base = open_checkpoint(str(gguf_base(QUANTIZABLE, tiny_bundles, tmp_path / "m.gguf", kind)))
    checkpoint = AdaptedCheckpoint(base, adapter)
    scale = np.float32(6 / 4)
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in checkpoint.touched:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        delta = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"] * scale
        np.testing.assert_allclose(checkpoint.tensor(name), base.tensor(name) + delta, rtol=0, atol=SUM_ROUNDING)
    assert checkpoint.files() == base.files()


def test_parity_of_a_gguf_base_with_an_adapter(
    tiny_bundles: TinyBundles, tmp_path: Path, one_torch_thread: Callable[[], None]
) -> None:
    adapter = lora(tmp_path / "adapter", tiny_bundles.checkpoint(QUANTIZABLE))
    file = gguf_base(QUANTIZABLE, tiny_bundles, tmp_path / "m.gguf", "Q8_0")
    export_bundle(ExportSpec(str(file), tmp_path / "out", (1,), adapter=adapter))
    reference = Reference(str(file), adapter=adapter)
    one_torch_thread()
    report = compare(load(tmp_path / "out"), reference, [list(range(3, 40))], greedy_tokens=8)
    report.tolerance = tolerances.TINY
    assert not report.problems()


def test_only_the_blocks_that_the_adapter_does_not_change_are_kept(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_bundles.checkpoint(QUANTIZABLE)
    adapter = lora(tmp_path / "adapter", checkpoint, target_modules=["k_proj", "down_proj"], layers_to_transform=[1])
    file = gguf_base(QUANTIZABLE, tiny_bundles, tmp_path / "m.gguf", "Q8_0")
    arguments = ["export", str(file), str(tmp_path / "out"), "--keep-blocks", "--adapter", str(adapter), "--json"]
    assert run(arguments) == 0
    out, error = capsys.readouterr()
    down, qkv = (names.layer_weight(1, part) for part in ("mlp.down_proj.weight", "attn.qkv_proj.weight"))
    assert json.loads(out)["requantized"] == {"Q8_0+Q8_0 with adapter": [qkv], "Q8_0 with adapter": [down]}
    assert "requantized 1 matrix rounded (Q8_0 with adapter as int8, blocks of 32): up to 0." in error
    assert error.count(f"% off the float weights: {down}\n") == 1

    merged = AdaptedCheckpoint(open_checkpoint(str(file)), adapter)
    arch, spec = resolve(merged)
    tensors = ModelTensors(merged, arch, spec, choose_blocks(merged, matrix_sources(arch, spec)))
    matrix = tensors.matrix(down)
    assert not isinstance(matrix, np.ndarray)
    wanted = merged.tensor("model.layers.1.mlp.down_proj.weight")
    assert np.abs(matrix.dequantize() - wanted).max() <= np.abs(wanted).max() / 127


@pytest.mark.parametrize("says", [True, False])  # peft goes by the module, whatever the config says
@pytest.mark.parametrize("family", STACKED)
def test_stacked_and_transposed_projections_are_merged_as_peft_merges_them(
    family: str, says: bool, tmp_path: Path
) -> None:
    checkpoint = MadeFamily(FamilyRow(family, family), tmp_path).checkpoint
    adapter = lora(tmp_path / "adapter", checkpoint, target_modules=STACKED[family])
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=says)
    expected = merged_by_peft(checkpoint, adapter)
    adapted = AdaptedCheckpoint(open_checkpoint(str(checkpoint)), adapter)
    assert adapted.touched
    for name in sorted(adapted.names()):
        is_head = name == "embed_out.weight"  # transformers 5 calls it lm_head
        merged = expected.get_output_embeddings().weight if is_head else expected.get_parameter(name)
        np.testing.assert_allclose(adapted.tensor(name), merged.detach().numpy(), rtol=0, atol=SUM_ROUNDING)
    assert Reference(str(checkpoint), adapter=adapter)


def test_an_adapter_for_transformers_model_fits_a_file_without_its_prefix(tmp_path: Path) -> None:
    made = MadeFamily(FamilyRow("gpt2", "GPT-2"), tmp_path)
    checkpoint, file = made.checkpoint, made.checkpoint / "model.safetensors"
    adapter = lora(tmp_path / "adapter", checkpoint, target_modules=STACKED["gpt2"])
    expected = Reference(str(checkpoint), adapter=adapter).run_text(made.text(), (4,)).heads[4]
    assert np.abs(expected - made.reference.run_text(made.text(), (4,)).heads[4]).max() > 0.1
    save_file({name.removeprefix("transformer."): x for name, x in load_file(file).items()}, file, {"format": "pt"})
    export_bundle(ExportSpec(str(checkpoint), tmp_path / "bundle", (2,), adapter=adapter))
    reference = Reference(str(checkpoint), adapter=adapter)
    np.testing.assert_array_equal(reference.run_text(made.text(), (4,)).heads[4], expected)
    report = compare(load(tmp_path / "bundle"), reference, [made.text(20)], greedy_tokens=8)
    report.tolerance = tolerances.TINY
    assert not report.problems()


@pytest.mark.parametrize("family", ["qwen3", "cohere2", "glm4", "stablelm", "phi3", "gpt2", "gpt_neox", "starcoder2"])
def test_an_adapter_that_a_recipe_trains_is_merged_into_each_family(family: str, tmp_path: Path) -> None:
    """Names, rows and shapes of the twin are not those of the checkpoint: stacked, rotated in pairs, [in, out]."""
    from shortstack.samples.recipes.training.low_rank import adapter_tensors, add_lora, save_adapter

    made = MadeFamily(FamilyRow(family, family), tmp_path)
    twin = load_twin(str(made.checkpoint))
    config = add_lora(twin, 3, 5, 2)
    with torch.no_grad():
        for tensor in adapter_tensors(twin).values():
            tensor.normal_(0.0, 0.1)
        expected = twin.eval()(torch.tensor([made.text()]))[0].numpy()
    save_adapter(tmp_path / "adapter", config, twin, family, torch.float32)
    found = Reference(str(made.checkpoint), adapter=tmp_path / "adapter").run_text(made.text(), (4,)).heads[4]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.TINY.max_abs)
    model = AutoModelForCausalLM.from_pretrained(made.checkpoint, dtype=torch.float32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        by_peft = PeftModel.from_pretrained(model, tmp_path / "adapter")(torch.tensor([made.text()])).logits[0]
    np.testing.assert_allclose(by_peft.numpy(), expected, rtol=0, atol=tolerances.TINY.max_abs)
