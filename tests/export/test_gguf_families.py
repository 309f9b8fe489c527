"""GGUF files of every architecture, written as llama.cpp's converter does, against the folders they come from."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from helpers.gguf_cases import CASES, GgufCase
from helpers.gguf_files import Edit, Kind, listed
from helpers.gguf_written import TEXT, logits, written
from shortstack.export.arch import ARCHITECTURES, resolve
from shortstack.export.checkpoint import gguf as gguf_reader
from shortstack.export.checkpoint import gguf_header, open_checkpoint
from shortstack.export.checkpoint.checkpoint import read_part
from shortstack.export.checkpoint.gguf_families import FAMILIES
from shortstack.export.kept_blocks import KeptBlocks, choose_blocks
from shortstack.export.parity.reference import Reference
from shortstack.export.sources import matrix_sources
from shortstack.export.tensors import ModelTensors
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.layer_spec import RopeScaling
from shortstack.graphs.spec import ModelSpec

BY_NAME = {case.name: case for case in CASES}


def assert_same(ours: object, theirs: object, where: str = "spec") -> None:
    """Compare two values, their numbers up to the rounding of metadata to float32."""
    if dataclasses.is_dataclass(ours):
        assert type(ours) is type(theirs), where
        for part in dataclasses.fields(ours):
            assert_same(getattr(ours, part.name), getattr(theirs, part.name), f"{where}.{part.name}")
    elif isinstance(ours, tuple):
        assert isinstance(theirs, tuple)
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-6), where
    else:
        assert ours == theirs, where


def without_scaling(spec: ModelSpec) -> ModelSpec:
    return replace(spec, ropes=tuple(replace(rope, scaling=RopeScaling()) for rope in spec.ropes))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_is_the_model_that_it_was_made_from(tmp_path: Path, case: GgufCase) -> None:
    folder, file = written(case, tmp_path)
    theirs, ours = open_checkpoint(str(folder)), open_checkpoint(str(file))
    (_, expected), (_, spec) = resolve(theirs), resolve(ours)
    if case.is_exact:
        assert_same(spec, expected)
        assert ours.names() == theirs.names()
    else:
        assert_same(without_scaling(spec), without_scaling(expected))
    for name in theirs.names():
        value = ours.tensor(name)
        assert value.flags.c_contiguous
        assert ours.shape(name) == value.shape
        np.testing.assert_allclose(value, theirs.tensor(name), rtol=0, atol=1e-7, err_msg=name)  # of the norms' 1
    np.testing.assert_allclose(logits(file, tmp_path / "ours"), logits(folder, tmp_path / "theirs"), atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.in_transformers], ids=lambda case: case.name)
def test_tensors_equal_those_that_transformers_reads(tmp_path: Path, case: GgufCase) -> None:
    from transformers import AutoModelForCausalLM

    _, file = written(case, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype="float32").state_dict()
    ours = open_checkpoint(str(file))
    assert ours.names() <= theirs.keys()
    for name in ours.names():
        np.testing.assert_array_equal(ours.tensor(name), theirs[name].numpy(), err_msg=name)


@pytest.mark.parametrize("name", ["olmo3-yarn", "phi3-longrope", "stablelm"])
def test_parity_compares_with_the_model_in_transformers(tmp_path: Path, name: str) -> None:
    folder, file = written(BY_NAME[name], tmp_path)
    ours, theirs = (Reference(str(path)).run_text(TEXT, (1, 2)).heads for path in (file, folder))
    for depth in (1, 2):
        np.testing.assert_allclose(ours[depth], theirs[depth], atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["llama-biases", "granite", "gptneox", "phi3", "gemma2", "gemma4", "stablelm-heads", "olmo2", "glm4", "gpt2"],
)
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_blocks_are_kept_where_whole_rows_move(tmp_path: Path, name: str, kind: str) -> None:
    _, file = written(BY_NAME[name], tmp_path, kind=Kind[kind])
    checkpoint = open_checkpoint(str(file))
    arch, spec = resolve(checkpoint)
    blocks = choose_blocks(checkpoint, matrix_sources(arch, spec))
    read, floats = (ModelTensors(checkpoint, arch, spec, chosen) for chosen in (blocks, KeptBlocks()))
    turned = {matrix for matrix, what in blocks.requantized.items() if what == f"{kind}, turned"}
    assert turned == set(blocks.requantized)
    assert bool(turned) == (name == "gpt2")
    assert set(blocks.kept.values()) == {kind}
    for matrix in blocks.kept:
        kept = read.matrix(matrix)
        assert isinstance(kept, BlockTensor)
        np.testing.assert_array_equal(kept.dequantize(), floats.matrix(matrix), err_msg=matrix)


def test_every_architecture_has_a_family_and_a_case() -> None:
    assert {case.architecture for case in CASES} == FAMILIES.keys()
    assert FAMILIES.keys() <= set(gguf.MODEL_ARCH_NAMES.values())
    assert {family.model_type for family in FAMILIES.values()} <= ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_names_are_those_of_the_family_and_none_stands_for_two(architecture: str) -> None:
    family = FAMILIES[architecture]
    ours = [
        name if stem.endswith(".weight") else f"{name}.weight"
        for stem, name in family.names.items()
        if not name.endswith("rotary_emb")
    ]
    assert len(set(ours)) == len(ours)
    known = {source.tensor for source in ARCHITECTURES[family.model_type].sources.values()}
    assert set(ours) <= known
    theirs = {
        gguf.TENSOR_NAMES[tensor].replace("{bid}", "{layer}")
        for arch, name in gguf.MODEL_ARCH_NAMES.items()
        if name == architecture
        for tensor in gguf.MODEL_TENSORS[arch]
    }
    anywhere = {"output", "blk.{layer}.attn_rot_embd"}  # a tied model may have been untied, and old files have both
    assert {stem.removesuffix(".weight") for stem in family.names} - anywhere <= theirs


ODD: tuple[object, ...] = (
    *(0, -1, 1, 3, 2**31, 2**40, 0.0, -1.0, 0.5, 1e-40, 1e300, float("nan"), True, False),
    *("x", "linear", [], [1], [True], None),
)
SELDOM = (
    *("attention.causal", "attention.key_length", "attention.sliding_window", "attention.sliding_window_pattern"),
    *("expert_count", "rope.dimension_count", "rope.freq_base_swa", "rope.scaling.attn_factor", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.type", "rope.scaling.yarn_beta_fast"),
)


@pytest.mark.parametrize("case", [case for case in CASES if "27b" not in case.name], ids=lambda case: case.name)
def test_odd_metadata_is_read_or_refused_in_our_words(
    tmp_path: Path, case: GgufCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With None the field is left out."""
    _, file = written(case, tmp_path)
    header = gguf_header.read_header(file)
    prefix = f"{case.architecture}."
    keys = [*(key for key in header.metadata if key.startswith(prefix)), *(prefix + key for key in SELDOM)]
    for key, value in itertools.product(keys, ODD):
        metadata = {name: found for name, found in {**header.metadata, key: value}.items() if found is not None}
        changed = replace(header, metadata=metadata)
        monkeypatch.setattr(gguf_reader, "read_header", lambda file, changed=changed: changed)
        with contextlib.suppress(CheckpointError):
            resolve(open_checkpoint(str(file)))


def without(key: str) -> Edit:
    return lambda writer: writer.kv_data[0].pop(f"{writer.arch}.{key}") and None


REFUSED: tuple[tuple[str, str, Edit, str], ...] = (
    ("a number is missing", "cohere2", without("logit_scale"), r"cohere2\.logit_scale is missing: expected a number"),
    (
        "a flag is missing",
        "gptneox",
        without("use_parallel_residual"),
        r"gptneox\.use_parallel_residual is missing: expected true or false\. Convert the model again",
    ),
    (
        "a count of another type",
        "qwen2",
        lambda w: w.add_string("qwen2.block_count", "two"),
        r"m\.gguf: qwen2\.block_count: found 'two', expected an integer\. Convert the model again with",
    ),
    (
        "heads that share no keys",
        "qwen3",
        lambda w: w.add_head_count_kv(3),
        r"qwen3\.attention\.head_count_kv: found 3, expected a divisor of qwen3\.attention\.head_count, 4\. Convert",
    ),
    (
        "heads of another width",
        "starcoder2",
        lambda w: w.add_key_length(32),
        r"key_length: found 32, expected starcoder2\.embedding_length / starcoder2\.attention\.head_count, 64 / 4",
    ),
    (
        "values of another width",
        "gemma3",
        lambda w: w.add_value_length(16),
        r"gemma3\.attention\.value_length: found 16, expected the width of the keys, 32\. Export another",
    ),
    (
        "experts",
        "qwen2",
        lambda w: w.add_expert_count(4),
        r"qwen2\.expert_count: mixtures of experts cannot be exported: found 4, expected 0",
    ),
    (
        "a window that is never read",
        "qwen3",
        lambda w: w.add_sliding_window(8),
        r"qwen3\.attention\.sliding_window: models of architecture qwen3 do not have it: found 8, expected 0",
    ),
    (
        "a cap that is never read",
        "llama",
        lambda w: w.add_final_logit_softcapping(30.0),
        r"llama\.final_logit_softcapping: models of architecture llama do not have it: found 30\.0",
    ),
    (
        "more layers that predict further tokens than there are",
        "glm4",
        lambda w: w.add_nextn_predict_layers(9),
        r"glm4\.nextn_predict_layers: found 9, expected less than glm4\.block_count, \d",
    ),
    (
        "a rotary embedding of images",
        "glm4",
        lambda w: w.add_rope_dimension_sections([8, 12, 12, 0]),
        r"glm4\.rope\.dimension_sections: a rotary embedding of images",
    ),
    (
        "a model without rotary embedding",
        "granite",
        lambda w: w.add_rope_scaling_finetuned(False),
        r"granite\.rope\.scaling\.finetuned: a Granite model without rotary embedding: found False, expected True",
    ),
    (
        "a partial rotary embedding",
        "olmo2",
        lambda w: w.add_rope_dimension_count(8),
        r"olmo2\.rope\.dimension_count: partial rotary embedding: found 8, expected the head size 16",
    ),
    (
        "an odd share of a head",
        "stablelm",
        lambda w: w.add_rope_dimension_count(7),
        r"stablelm\.rope\.dimension_count: found 7, expected an even number, at most the head size 16\. Convert",
    ),
    (
        "a rotary base that is never read",
        "gemma2",
        lambda w: w.add_rope_freq_base_swa(5000.0),
        r"gemma2\.rope\.freq_base_swa: a rotary base of sliding layers: found 5000\.0, expected that of all, 10000",
    ),
    (
        "a rotary base below 1",
        "glm4",
        lambda w: w.add_rope_freq_base(0.5),
        r"glm4\.rope\.freq_base: found 0\.5, expected a number of at least 1\. Convert the model again",
    ),
    (
        "an unknown scaling",
        "qwen2",
        lambda w: w.add_string("qwen2.rope.scaling.type", "ntk"),
        r"scaling\.type: another kind of scaling: found ntk, expected none, linear, yarn or longrope",
    ),
    (
        "longrope without its factors",
        "qwen2",
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
        r"longrope needs rope_factors_short\.weight and rope_factors_long\.weight: found no such tensors\. Convert",
    ),
    (
        "a variant of yarn",
        "qwen2-yarn",
        lambda w: w.add_rope_scaling_yarn_log_mul(0.1),
        r"scaling\.yarn_log_multiplier: a variant of yarn: found 0\.1\d*, expected 0\.0",
    ),
    (
        "a negative growth",
        "ministral3",
        lambda w: w.kv_data[0].pop("mistral3.attention.temperature_scale") and w.add_attn_temperature_scale(-0.1),
        r"mistral3\.attention\.temperature_scale: found -0\.1\d*, expected a positive number\. Convert",
    ),
    (
        "a growth that is never read",
        "llama",
        lambda w: w.add_attn_temperature_scale(0.1),
        r"llama\.attention\.temperature_scale: models of architecture llama do not have it: found 0\.1\d*, expected 0",
    ),
    (
        "two scalings",
        "llama-llama3",
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        r"llama\.rope\.scaling\.type: yarn on top of rope_freqs\.weight cannot be exported",
    ),
    (
        "too few layers listed",
        "olmo3",
        lambda w: w.add_sliding_window_pattern([True, False]),
        r"sliding_window_pattern: found 2 entries, expected true or false for each of 4 layers\. Convert",
    ),
    (
        "layers listed by number",
        "olmo3",
        lambda w: w.add_sliding_window_pattern([1, 1, 1, 0]),
        r"sliding_window_pattern: found entries that are not true or false, expected true or false for each of 4",
    ),
    (
        "a negative window",
        "phi3",
        lambda w: w.add_int32("phi3.attention.sliding_window", -1),
        r"phi3\.attention\.sliding_window: found -1, expected a positive integer, or 0 for none",
    ),
    (
        "layers of different sizes",
        "qwen3",
        listed("attention.head_count_kv", [2, 4]),
        r"qwen3\.attention\.head_count_kv: layers of different sizes: found \[2, 4\], expected one number for all",
    ),
    (
        "no window where there must be one",
        "cohere2",
        without("attention.sliding_window"),
        r"cohere2\.attention\.sliding_window is missing: expected an integer",
    ),
)


@pytest.mark.parametrize(("name", "edit", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_metadata_that_says_something_else_is_named(tmp_path: Path, name: str, edit: Edit, says: str) -> None:
    _, file = written(BY_NAME[name], tmp_path, edit=edit)
    with pytest.raises(CheckpointError, match=says):
        resolve(open_checkpoint(str(file)))


def architecture_of(name: str) -> Edit:
    return lambda writer: writer.add_string("general.architecture", name)


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("qwen3moe", r"cannot export mixtures of experts: found qwen3moe, expected one of arcee, .*\. Export another"),
        ("mamba2", r"cannot export recurrent layers: found mamba2"),
        ("t5", r"cannot export models that read a text in both directions: found t5"),
        ("qwen2vl", r"cannot export inputs other than text: found qwen2vl"),
        ("gemma22", r"general\.architecture: found 'gemma22', expected one of .* \(the nearest is gemma2\)\. Export"),
    ],
)
def test_an_architecture_is_refused_by_what_is_missing(tmp_path: Path, architecture: str, says: str) -> None:
    _, file = written(BY_NAME["llama"], tmp_path, edit=architecture_of(architecture))
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(str(file))


def test_tensors_that_no_model_of_the_architecture_has_are_listed(tmp_path: Path) -> None:
    _, file = written(BY_NAME["olmo2"], tmp_path, extra={"blk.0.attn_norm.weight": np.ones(64, np.float32)})
    with pytest.raises(CheckpointError, match=r"1 extra \(blk\.0\.attn_norm\.weight\)"):
        resolve(open_checkpoint(str(file)))


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    _, file = written(BY_NAME["qwen2"], tmp_path, extra={"model.norm.weight": np.ones(64, np.float32)})
    with pytest.raises(CheckpointError, match=r"m\.gguf holds tensors twice: found output_norm\.weight\. Convert"):
        open_checkpoint(str(file))


def test_columns_of_a_permuted_matrix_have_its_rows_in_order(tmp_path: Path) -> None:
    _, file = written(BY_NAME["llama"], tmp_path, kind=Kind.Q8_0)
    checkpoint = open_checkpoint(str(file))
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(
        read_part(checkpoint, name, slice(None), slice(3, 40)), checkpoint.tensor(name)[:, 3:40]
    )
