"""``export --adapter``: the merged model is peft's, whatever the base is stored in; what cannot be merged is named."""

from __future__ import annotations

import json
import os
import pickle
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import gguf_files, tolerances
from helpers.bad_input import Refused, edit_json, left_behind
from helpers.tiny_models import BASE, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.adapter_config import matching_pattern
from shortstack.export.arch import resolve
from shortstack.export.assemble import export_bundle
from shortstack.export.block_plan import plan_blocks
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.parity import compare
from shortstack.export.parity_reference import Reference
from shortstack.export.sources import matrix_sources
from shortstack.export.spec import ExportSpec
from shortstack.export.tensors import ModelTensors
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.runtime import load

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TIED = replace(BASE, name="adapter-tied", layers=2, is_tied=True)
QUANTIZABLE = replace(BASE, name="adapter-gguf", layers=2, attention_bias=False)
SUM_ROUNDING = 2e-6
"""Largest difference to peft's sums: numpy and torch may add float32 products in another order. Measured: none."""


def lora(folder: Path, checkpoint: Path, **options: Any) -> Path:
    """An adapter with random factors, saved by peft."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": list(ALL_LINEAR)} | options
    saving = {"save_embedding_layers": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice, such as on rsLoRA with patterns
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(0.0, 0.1)
        adapted.save_pretrained(folder, **saving)
    return folder


def merged_by_peft(checkpoint: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        return PeftModel.from_pretrained(model, folder).merge_and_unload()


@pytest.fixture(scope="module")
def base(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.checkpoint(BASE)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A sound adapter of every linear layer, to damage."""
    return lora(tmp_path / "adapter", base)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few modules": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "with the head": {"target_modules": ["v_proj", "lm_head"]},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {
        # Of several that fit the first holds, and peft saves them sorted: in another order it cannot read its own file.
        "rank_pattern": {"layers.1.mlp.down_proj": 7, r"layers\.[23]\..*_proj": 3, "q_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 40, "proj": 99, "up_proj": 1, "v_proj": 5},
    },
    "patterns, rank-stabilized": {"use_rslora": True, "rank_pattern": {"o_proj": 9}, "alpha_pattern": {"k_proj": 3}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_one_that_peft_merges(base: Path, tmp_path: Path, kind: str) -> None:
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


def test_a_pattern_fits_a_name_or_its_end_from_a_dot_on() -> None:
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
    assert run(arguments) == 1, "without the adapter it is another model"


def test_an_adapter_trained_on_the_twin_merges_into_what_the_twin_computed(base: Path, tmp_path: Path) -> None:
    from shortstack.export.twin.folder import load_twin, twin_of
    from shortstack.samples.recipes.training.low_rank import adapter_tensors, add_lora, save_adapter

    twin = load_twin(str(base)).eval()
    config = add_lora(twin, rank=2, lower_rank=5, lower_layers=1)
    with torch.no_grad():
        for tensor in adapter_tensors(twin).values():
            tensor.normal_(0.0, 0.1)
        save_adapter(tmp_path / "adapter", config, adapter_tensors(twin), "tiny", torch.float32)
        merged = twin_of(AdaptedCheckpoint(open_checkpoint(str(base)), tmp_path / "adapter")).eval()
        ids = torch.randint(0, BASE.vocab, (1, 30))
        expected, plain = twin(ids), load_twin(str(base)).eval()(ids)
        torch.testing.assert_close(merged(ids), expected, rtol=0, atol=tolerances.TINY.max_abs)
    assert (expected - plain).abs().max() > 100 * tolerances.TINY.max_abs


def test_a_bundle_names_both_and_no_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
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
        writer.add_vocab_size(tiny.vocab)  # transformers would take the number of tokens

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


def test_kept_blocks_are_those_that_the_adapter_leaves_alone(
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
    assert f"requantized 1 matrix to int8: Q8_0 with adapter ({down})" in error

    merged = AdaptedCheckpoint(open_checkpoint(str(file)), adapter)
    arch, spec = resolve(merged)
    tensors = ModelTensors(merged, arch, spec, plan_blocks(merged, matrix_sources(arch, spec)))
    matrix = tensors.matrix(down)
    assert not isinstance(matrix, np.ndarray)
    wanted = merged.tensor("model.layers.1.mlp.down_proj.weight")
    assert np.abs(matrix.dequantize() - wanted).max() <= np.abs(wanted).max() / 127


# --- what is refused -------------------------------------------------------------------------------------------------

STEM = "base_model.model.model.layers.2.self_attn.q_proj"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


def edit_tensors(adapter: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)


def nonsense(value: float) -> Callable[[dict[str, np.ndarray]], object]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[A][1, 2] = value

    return edit


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "DoRA": ({"use_dora": True}, ("use_dora: found True, expected nothing, or false", "merge_and_unload")),
    "biases": ({"bias": "lora_only"}, ("bias: found 'lora_only', expected 'none'", "merge_and_unload")),
    "lora_bias": ({"lora_bias": True}, ("lora_bias: found True", "merge_and_unload")),
    "whole modules": ({"modules_to_save": ["lm_head"]}, ("modules_to_save: found ['lm_head']",)),
    "tokens": ({"trainable_token_indices": [1]}, ("trainable_token_indices: found [1]",)),
    "transposed": ({"fan_in_fan_out": True}, ("fan_in_fan_out: found True", "Set it to false")),
    "another kind": ({"peft_type": "IA3"}, ("adapter_config.json: peft_type: found 'IA3', expected 'LORA'",)),
    "no kind": ({"peft_type": None}, ("peft_type is missing",)),
    "a start that moves weights": ({"init_lora_weights": "pissa_niter_4"}, ("'pissa_niter_4'", "weight_conversion")),
    "activated": ({"alora_invocation_tokens": [5]}, ("alora_invocation_tokens: found [5]", "Train a plain LoRA")),
    "replicated layers": ({"layer_replication": [[0, 2]]}, ("layer_replication",)),
    "parameters": ({"target_parameters": ["x"]}, ("target_parameters",)),
    "of the future": ({"use_magic": 3}, ("use_magic: found 3",)),
    "several at once": ({"use_dora": True, "bias": "all"}, ("use_dora", "bias: found 'all'")),
    "no rank": ({"r": None}, ("adapter_config.json: r is missing", "an integer")),
    "rank of another type": ({"r": "4"}, ("r: found '4', expected an integer",)),
    "rank zero": ({"r": 0}, ("r: found 0, expected a positive integer",)),
    "rank minus one, by pattern": ({"rank_pattern": {"q_proj": -1}}, ("rank_pattern.q_proj: found -1",)),
    "alpha no number": ({"lora_alpha": float("nan")}, ("lora_alpha: found nan, expected a finite number",)),
    "alpha by pattern": ({"alpha_pattern": {"q_proj": "8"}}, ("alpha_pattern.q_proj: found '8'",)),
    "rank too small": ({"r": 3}, ("lora_A, lora_B found [[4, 64], [64, 4]], expected [[3, 64], [64, 3]] for rank 3",)),
    "rank by pattern": ({"rank_pattern": {"layers.2.self_attn.q_proj": 5}}, ("layers.2.self_attn.q_proj", "rank 5")),
    "no pattern": ({"rank_pattern": {"q_proj(": 4}}, ("the pattern 'q_proj('", "no regular expression")),
    "patterns no object": ({"rank_pattern": [4]}, ("rank_pattern: found [4], expected an object",)),
    "too many patterns": ({"alpha_pattern": {f"x{i}": 1 for i in range(5000)}}, ("5000 patterns", "at most 4096")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_merged_names_file_and_field(
    base: Path, adapter: Path, tmp_path: Path, refused: Refused, case: str
) -> None:
    fields, says = CONFIGS[case]
    edit_json(adapter / "adapter_config.json", **fields)
    refused(["export", base, tmp_path / "out", "--adapter", adapter], str(adapter), *says)
    assert left_behind(tmp_path) == ["adapter"]


TENSORS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], tuple[str, ...]]] = {
    "no A": (lambda t: t.pop(A), ("layers.2.self_attn.q_proj lacks lora_A", "trained on")),
    "no B": (lambda t: t.pop(B), ("layers.2.self_attn.q_proj lacks lora_B",)),
    "nothing": (lambda t: t.clear(), ("holds no tensors",)),
    "A too narrow": (lambda t: t.update({A: t[A][:, 1:]}), ("found [[4, 63], [64, 4]], expected [[4, 64], [64, 4]]",)),
    "B turned": (lambda t: t.update({B: t[B].T}), ("found [[4, 64], [4, 64]]",)),
    "A flat": (lambda t: t.update({A: t[A].reshape(-1)}), ("found [[256], [64, 4]]",)),
    "NaN": (nonsense(np.nan), (f"{A} is not finite",)),
    "infinity": (nonsense(-np.inf), (f"{A} is not finite",)),
    "integers": (lambda t: t.update({A: t[A].astype(np.int8)}), (f"tensor {A}: found type I8, expected one of F64",)),
    "another layer": (
        lambda t: t.update({A.replace("layers.2", "layers.9"): t[A], B.replace("layers.2", "layers.9"): t[B]}),
        ("layers.9.self_attn.q_proj is no linear layer of", "Name the checkpoint that the adapter was trained on"),
    ),
    "a norm": (
        lambda t: t.update({"base_model.model.model.norm.lora_A.weight": t[A]}),
        ("model.norm is no linear layer of",),
    ),
    "an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[A]}),
        ("embed_tokens.lora_embedding_A", "without the embedding in target_modules"),
    ),
    "an embedding as a matrix": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_A.weight": t[A]}),
        ("model.embed_tokens is no linear layer of",),
    ),
    "a saved embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": t[A]}),
        ("embed_tokens.weight", "save_embedding_layers=False"),
    ),
    "magnitudes": (
        lambda t: t.update({f"{STEM}.lora_magnitude_vector": t[A][0]}),
        ("lora_magnitude_vector", "merge_and_unload"),
    ),
    "a bias": (lambda t: t.update({f"{STEM}.lora_B.bias": t[A][0]}), ("lora_B.bias", "merge_and_unload")),
    "another prefix": (lambda t: t.update({"q_proj.lora_A.weight": t.pop(A)}), ("found q_proj.lora_A.weight",)),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(
    base: Path, adapter: Path, tmp_path: Path, refused: Refused, case: str
) -> None:
    edit, says = TENSORS[case]
    edit_tensors(adapter, edit)
    refused(["export", base, tmp_path / "out", "--adapter", adapter], "adapter_model.safetensors", *says)
    assert left_behind(tmp_path) == ["adapter"]


def test_a_tied_head_belongs_to_the_embedding(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    checkpoint = tiny_bundles.checkpoint(TIED)
    adapter = lora(tmp_path / "adapter", checkpoint, target_modules=["q_proj", "lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head is no linear layer of .*tied LM head is part of the embedding"):
        AdaptedCheckpoint(open_checkpoint(str(checkpoint)), adapter)


def test_a_sum_that_is_not_finite_is_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda t: t.update({A: t[A] * 0 + 1e30, B: t[B] * 0 + 1e30}))
    checkpoint = AdaptedCheckpoint(open_checkpoint(str(base)), adapter)
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.q_proj\.weight is not finite when merged"):
        checkpoint.tensor("model.layers.2.self_attn.q_proj.weight")


class Trap:
    """Says so when a pickle is opened."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return pytest.fail, ("the pickle was opened",)


def test_a_pickle_is_never_opened(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UnsupportedError, match=r"only as a pickle.*save it with save_pretrained"):
        AdaptedCheckpoint(open_checkpoint(str(base)), adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_missing_or_elsewhere_or_cut_is_named(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    plain = open_checkpoint(str(base))
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        AdaptedCheckpoint(plain, adapter)
    (adapter / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        AdaptedCheckpoint(plain, adapter)
    (tmp_path / "elsewhere").write_bytes(content)
    os.symlink(tmp_path / "elsewhere", adapter / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a link that leads out of the folder"):
        AdaptedCheckpoint(plain, adapter)


def test_what_is_no_folder_is_refused(base: Path, tmp_path: Path, refused: Refused) -> None:
    refused(["export", base, tmp_path / "out", "--adapter", tmp_path / "none"], "none is not a folder")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "pattern", ["(.+)+x", "(.*)*", "(a|aa)(b|bb)(c|cc)(d|dd)(e|ee)(f|ff)", ".*.*.*.*.*.*x", "y" * 300]
)
def test_a_pattern_that_could_run_for_ever_is_not_tried(base: Path, adapter: Path, pattern: str) -> None:
    edit_json(adapter / "adapter_config.json", alpha_pattern={pattern: 2})
    started = time.monotonic()
    with pytest.raises(UnsupportedError, match=r"alpha_pattern: found the pattern .*write the modules' names|Write"):
        AdaptedCheckpoint(open_checkpoint(str(base)), adapter)
    assert time.monotonic() - started < 5


def test_a_huge_config_is_not_read(base: Path, adapter: Path) -> None:
    with (adapter / "adapter_config.json").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match=r"1073741824 bytes, expected at most"):
        AdaptedCheckpoint(open_checkpoint(str(base)), adapter)
