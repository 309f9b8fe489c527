"""Every kind of exit in a random tiny model: the graphs compute what the PyTorch twin computes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest

from helpers import exit_nodes, gguf_files, tolerances
from helpers.bad_input import Refused
from helpers.exit_checks import MAX_ABS, USUAL_DEVIATION, bundle_of, check, check_inspect
from helpers.older_formats import as_format
from helpers.quantized import INT4, INT8, QuantizedBundles, preset, stored_tensors
from helpers.tiny_models import BASE, SPECULATOR, SWITCHES, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs import manifest as manifests
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import BundleError
from shortstack.graphs.exit_parts import MLP_NORM, exit_matrices
from shortstack.graphs.plan import ExitSpec
from shortstack.quant.quality_report import make_report
from shortstack.quant.spec import ReportSpec
from shortstack.runtime import DraftPolicy, load

TIED = next(tiny for tiny in SWITCHES if tiny.name == "all-biases-tied")
ODD = next(tiny for tiny in SWITCHES if tiny.name == "odd-sizes")

LINEAR = [
    ExitSpec(2, branch="linear", linear_mlp=inner, sees_token=token, sees_state=state)
    for inner, token, state in product((0, 40), (False, True), (False, True))
]
KINDS = [
    *(ExitSpec(2, branch=branch, norm=norm) for branch in ("none", "mlp") for norm in ("final", "own", "none")),
    *LINEAR,
    ExitSpec(2, branch="linear", norm="own", sees_token=True, sees_state=True, has_gate=True),
    ExitSpec(2, branch="linear", norm="none", sees_state=True),
    *(
        ExitSpec(2, draft_vocab, branch=branch, head=head, head_rank=rank)
        for branch in ("none", "linear", "mlp")
        for draft_vocab in (None, 50)
        for head, rank in (("shared", 0), ("own", 0), ("low_rank", 12))
        if (draft_vocab, head, branch) != (None, "shared", "none")
    ),
    ExitSpec(2, has_gate=True),
    ExitSpec(2, 50, branch="mlp", norm="own", head="low_rank", head_rank=20, has_gate=True),
]


def described(exit_spec: ExitSpec) -> str:
    parts = [exit_spec.branch, exit_spec.norm, exit_spec.head, str(exit_spec.draft_vocab or "full")]
    parts += [name for name in ("linear_mlp", "sees_token", "sees_state", "has_gate") if getattr(exit_spec, name)]
    return "-".join(parts)


@pytest.mark.parametrize("exit_spec", KINDS, ids=described)
def test_an_exit_computes_what_the_twin_computes(
    tiny_bundles: TinyBundles, tmp_path: Path, exit_spec: ExitSpec
) -> None:
    check(*bundle_of(BASE, tiny_bundles, tmp_path, exit_spec), BASE)


@pytest.mark.parametrize("tiny", [TIED, ODD, *(t for t in SWITCHES if t.name == "head-dim-24")], ids=lambda t: t.name)
def test_other_models_have_exits_and_several_exits_may_see_the_token(
    tiny_bundles: TinyBundles, tmp_path: Path, tiny: TinyModel
) -> None:
    exits = (
        ExitSpec(1, 40, branch="mlp", head="low_rank", head_rank=7),
        ExitSpec(2, branch="linear", linear_mlp=33, sees_token=True, sees_state=True, has_gate=True),
        ExitSpec(3, 40, branch="linear", sees_token=True),
    )
    check(*bundle_of(tiny, tiny_bundles, tmp_path, *exits), tiny)


# Quantized exits: drafts may differ slightly, the output must not.

MIX = (
    ExitSpec(1, 64, branch="linear", linear_mlp=32, sees_token=True, has_gate=True),
    ExitSpec(2, 64, branch="mlp", norm="own", head="low_rank", head_rank=16),
    ExitSpec(3, 64, branch="linear", head="own"),
)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_quantized_bundle_keeps_its_exits(
    tiny_bundles: TinyBundles, tmp_path: Path, quantized: QuantizedBundles, method: str
) -> None:
    twin, _, bundle = bundle_of(SPECULATOR, tiny_bundles, tmp_path, *MIX)
    rounded = quantized(bundle, preset(INT8, method=method))
    precision = open_bundle(rounded).manifest.precision
    for exit_spec in MIX:
        for part in exit_matrices(twin.spec, exit_spec):
            assert precision.weights[names.exit_weight(exit_spec.exit_layer, part)] == INT8
    tokens = np.random.randint(3, SPECULATOR.vocab, size=(1, 40))
    state = np.zeros((1, 40, SPECULATOR.hidden), np.float32)
    before, after = (exit_nodes.run_graphs(folder, tokens, 40, state) for folder in (bundle, rounded))
    for exit_spec, ours, theirs in zip(MIX, after, before, strict=False):
        error = np.std(ours[names.LOGITS] - theirs[names.LOGITS]) / np.std(theirs[names.LOGITS])
        assert error < tolerances.QUANTIZED_INT8, (exit_spec, error)
    for rows in (0, 1):
        found = exit_nodes.run_graphs(rounded, tokens, rows, state[:, :rows])
        assert [outputs[names.TOKEN].shape for outputs in found] == 4 * [(1, rows)]
    check_inspect(rounded)


def test_scaling_a_layer_does_not_change_the_norm_of_the_mlp_exit_above_it(
    tiny_bundles: TinyBundles, tmp_path: Path, quantized: QuantizedBundles
) -> None:
    *_, bundle = bundle_of(SPECULATOR, tiny_bundles, tmp_path, ExitSpec(2, branch="mlp"))
    rounded = quantized(bundle, preset(INT4, method="awq"))
    of_layer, of_exit = names.layer_weight(1, "post_attention_norm.weight"), names.exit_weight(2, MLP_NORM)
    before, after = stored_tensors(bundle), stored_tensors(rounded)
    assert not np.allclose(after[of_layer].read(rounded), before[of_layer].read(bundle), atol=1e-3)
    np.testing.assert_array_equal(after[of_exit].read(rounded), before[of_layer].read(bundle))


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}], ids=["float32", "float16"])
def test_inspect_predicts_the_bytes_of_exits(
    tiny_bundles: TinyBundles, tmp_path: Path, options: dict[str, str]
) -> None:
    exits = (*MIX[:2], ExitSpec(3, branch="linear", norm="own", sees_token=True, sees_state=True))
    *_, bundle = bundle_of(SPECULATOR, tiny_bundles, tmp_path, *exits, **options)
    check_inspect(bundle)


# Parity

OWN = (
    ExitSpec(1, 64, branch="linear", head="own", norm="none"),
    ExitSpec(3, branch="linear", norm="own", sees_token=True, sees_state=True, has_gate=True),
)


def test_parity_compares_trained_exits_with_the_twin(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, bundle = bundle_of(SPECULATOR, tiny_bundles, tmp_path, *OWN, exit_layers=(2,), draft_vocab=50)
    checkpoint = str(tiny_bundles.checkpoint(SPECULATOR))
    command = ["parity", checkpoint, str(bundle), "--prompts", "2", "--greedy-tokens", "8"]
    assert run([*command, "--exits", str(tmp_path / "exits")]) == 0
    assert "greedy continuations: identical" in capsys.readouterr().out
    refused(command, "exit after 1 layers", "its own weights", "--exits FOLDER")
    exit_nodes.write_random_exits(Path(checkpoint), tmp_path / "others", *OWN)
    assert run([*command, "--exits", str(tmp_path / "others")]) == 1
    error = capsys.readouterr().err
    assert "head after 1 layers" in error
    assert "head after 2 layers" not in error
    assert "head after 3 layers" in error
    exit_nodes.write_random_exits(Path(checkpoint), tmp_path / "other-kind", replace(OWN[0], norm="own"), OWN[1])
    refused([*command, "--exits", tmp_path / "other-kind"], "exit after 1 layers differs from the one in the folder")


def test_the_quality_report_feeds_exits_what_they_see(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    twin, nodes, bundle = bundle_of(SPECULATOR, tiny_bundles, tmp_path, *OWN)
    tokens = np.random.randint(3, SPECULATOR.vocab, size=(1, 30))
    states = exit_nodes.before(exit_nodes.true_states(twin, tokens))
    found = load(bundle).activations(tokens[0].tolist()).heads
    for node, expected in zip(nodes, exit_nodes.expected_exits(twin, nodes, tokens, states), strict=True):
        scale = max(1.0, float(expected.logits.std()) / USUAL_DEVIATION)
        ours = found[node.exit_spec.exit_layer]
        np.testing.assert_allclose(ours, expected.logits[0], atol=MAX_ABS * scale, rtol=0)


def test_a_bundle_with_trained_exits_is_quantized_with_a_report(
    tiny_bundles: TinyBundles, tmp_path: Path, quantized: QuantizedBundles
) -> None:
    *_, bundle = bundle_of(SPECULATOR, tiny_bundles, tmp_path, *OWN)
    rounded = quantized(bundle, preset(INT4))
    report = make_report(ReportSpec(bundle, rounded, heldout_tokens=256, prompts=2, continuation_tokens=8))
    assert report.is_exact
    assert set(report.result.exit_agreement) == {1, 3}


# What a bundle with exits holds


def test_exits_next_to_the_checkpoint_are_used_only_if_named(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "checkpoint"))
    exit_nodes.write_random_exits(checkpoint, checkpoint, ExitSpec(2, branch="linear"))
    plain = export_bundle(ExportSpec(str(checkpoint), tmp_path / "plain", (1,)))
    assert plain.manifest.plan.exits == (ExitSpec(1),)
    trained = export_bundle(ExportSpec(str(checkpoint), tmp_path / "trained", (1,), exits=checkpoint))
    assert trained.manifest.plan.exits == (ExitSpec(1), ExitSpec(2, branch="linear"))
    assert trained.manifest.source_name == "checkpoint + checkpoint"


def test_a_draft_vocabulary_trims_only_whole_shared_heads(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    exits = (ExitSpec(1, branch="linear"), ExitSpec(2, branch="mlp", head="own"), ExitSpec(3, 30, branch="linear"))
    *_, bundle = bundle_of(SPECULATOR, tiny_bundles, tmp_path, *exits, exit_layers=(4,), draft_vocab=50)
    found = open_bundle(bundle, verify_hashes=True).manifest.plan.exits
    assert [e.draft_vocab for e in found] == [50, None, 30, 50]
    one, four = (np.load(bundle / names.draft_vocab_file(depth)) for depth in (1, 4))
    np.testing.assert_array_equal(one, four)
    stored = stored_tensors(bundle)
    for part in ("head.weight", "head.ids"):
        assert len({stored[names.exit_weight(depth, part)].offset for depth in (1, 4)}) == 1


@pytest.mark.parametrize("tiny", [BASE, TIED], ids=lambda tiny: tiny.name)
def test_exits_add_their_own_weights_and_nothing_else(
    tiny_bundles: TinyBundles, tmp_path: Path, tiny: TinyModel
) -> None:
    exits = (ExitSpec(1, branch="mlp"), ExitSpec(2, branch="linear", sees_token=True))
    twin, nodes, bundle = bundle_of(tiny, tiny_bundles, tmp_path, *exits)
    plain = tiny_bundles.bundle(tiny, 1, 2)
    own_bytes = sum(4 * value.numel() for node in nodes for value in node.state_dict().values())
    unit_norm_bytes = 4 * twin.spec.hidden_size
    grown = (bundle / names.WEIGHTS_FILE).stat().st_size - (plain / names.WEIGHTS_FILE).stat().st_size
    assert 0 <= grown - own_bytes - unit_norm_bytes < 64 * 16  # alignment


def test_a_float16_bundle_has_exits_in_half_precision(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    exits = (
        ExitSpec(1, 64, branch="linear", linear_mlp=40, sees_token=True, sees_state=True, has_gate=True),
        ExitSpec(2, branch="mlp", norm="own", head="low_rank", head_rank=16),
    )
    made = bundle_of(BASE, tiny_bundles, tmp_path, *exits, dtype="float16")
    tokens = np.random.randint(3, BASE.vocab, size=(1, 9))
    state = np.random.standard_normal((1, 9, BASE.hidden)).astype(np.float32)
    found = exit_nodes.run_graphs(made[2], tokens, 9, state)
    for expected, outputs in zip(exit_nodes.expected_exits(made[0], made[1], tokens, state), found, strict=False):
        np.testing.assert_allclose(outputs[names.LOGITS], expected.logits, atol=tolerances.TINY_FP16.max_abs, rtol=0)


def test_exits_of_a_bundle_that_keeps_blocks_are_int8(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    checkpoint = tiny_bundles.checkpoint(SPECULATOR)
    tensors = gguf_files.of_checkpoint(checkpoint, SPECULATOR.layers)
    kind = gguf.GGMLQuantizationType.Q8_0
    file = gguf_files.write(
        tmp_path / "m.gguf", tensors, edit=gguf_files.byte_level, quantization=kind, tiny=SPECULATOR
    )
    exits = (
        ExitSpec(1, branch="block"),
        ExitSpec(2, 64, branch="linear", sees_token=True, sees_state=True, has_gate=True),
        ExitSpec(4, head="own"),
    )
    exit_nodes.write_random_exits(checkpoint, tmp_path / "exits", *exits)
    bundle = export_bundle(ExportSpec(str(file), tmp_path / "out", exits=tmp_path / "exits", keep_blocks=True))
    formats = bundle.manifest.precision.weights
    assert formats[names.exit_weight(2, "linear.weight")] == formats[names.exit_weight(4, "head.weight")] == INT8
    check_inspect(bundle.folder)
    model = load(bundle.folder)
    plain = model.generate([5, 6, 7], max_new_tokens=24, ignore_eos=True).tokens
    assert formats[names.exit_weight(1, "block.attn.qkv_proj.weight")] == INT8
    for depth in (1, 2, 4):
        drafted = model.generate(
            [5, 6, 7],
            max_new_tokens=24,
            ignore_eos=True,
            strategy="self-speculative",
            exit_layer=depth,
            draft=DraftPolicy(3),
        )
        assert drafted.tokens == plain
        assert drafted.stats.drafted


def test_a_bundle_in_format_2_has_plain_exits(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    source = tiny_bundles.bundle(BASE, 1, 3, draft_vocab=64)
    old = Path(shutil.copytree(source, tmp_path / "old"))
    data = json.loads((old / names.MANIFEST_FILE).read_text(encoding="utf-8"))
    data = as_format(data, 2)
    (old / names.MANIFEST_FILE).write_text(json.dumps(data), encoding="utf-8")
    assert open_bundle(old, verify_hashes=True).manifest.plan == open_bundle(source).manifest.plan
    assert load(old).generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens
    data["format_version"] = 3
    data["digest"] = manifests._digest(data)
    (old / names.MANIFEST_FILE).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError, match="an exit has the fields exit_layer, draft_vocab, branch"):
        open_bundle(old)
