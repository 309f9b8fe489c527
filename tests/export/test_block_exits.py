"""Exits whose branch is a block: the exit's own decoder layer, with its own cache, on top of the stream at a boundary.

The PyTorch twin has no cache and runs the whole text at once. The graphs and the runtime keep a cache from run to run.
They must compute the same, however a text is split into runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from helpers import exit_nodes, tolerances
from helpers.exit_checks import MAX_ABS, USUAL_DEVIATION, bundle_of, check, check_inspect
from helpers.quantized import INT4, INT8, QuantizedBundles, preset
from helpers.tiny_models import BASE, SPECULATOR, SWITCHES, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.exits import ExitNode, save_exits
from shortstack.export.twin.folder import load_twin
from shortstack.export.twin.model import Twin
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.exit_parts import exit_matrices
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.precision import BlockFormat, KVType
from shortstack.runtime import DraftPolicy, ExitPolicy, Model, load, parse_criterion
from shortstack.runtime.commands.inspect_bundle import inspect
from shortstack.runtime.early_exit.policy import KVPolicy
from shortstack.runtime.engine.cache import CHUNK_POSITIONS
from shortstack.runtime.inspection.report import build_report
from shortstack.runtime.inspection.words import kv_lines, kv_owned_words

THREE = (
    ExitSpec(1, branch="block", norm="own", head="own"),
    ExitSpec(2, branch="block"),
    ExitSpec(3, 50, branch="block", norm="own", head="low_rank", head_rank=12, has_gate=True),
)
OTHERS = (
    ExitSpec(1, 40, branch="block", norm="none"),
    ExitSpec(2, branch="linear", sees_token=True, sees_state=True),
    ExitSpec(3, 40, branch="block", has_gate=True),
)
TINY = {tiny.name: tiny for tiny in SWITCHES}
# All biases, tied heads, padded heads, from one KV head to as many as heads, widths that are not multiples of a block.
MODELS = [
    *(TINY[name] for name in ("base", "all-biases-tied", "multi-head", "multi-query")),
    *(TINY[name] for name in ("head-dim-20-biased", "head-dim-24", "odd-sizes")),
]
# Accepts about half of the drafts, which the grids below rely on.
ACCEPTANCE = (0.1, 0.95)
ADDED = 0.15  # share of what a random block adds to the stream
POLICIES = [DraftPolicy(1), DraftPolicy(3), DraftPolicy(4, has_bonus=True)]
MIXES = [(INT4, "float"), (INT4, "int8"), (INT8, "float"), (INT8, "int8")]
SPECULATIVE = (ExitSpec(1, branch="block", norm="own", head="own"), ExitSpec(3, 200, branch="block"), ExitSpec(4))


@pytest.fixture(scope="module")
def speculator(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose blocks agree with the model about half the time."""
    folder, checkpoint = tmp_path_factory.mktemp("speculator"), tiny_bundles.checkpoint(SPECULATOR)
    twin = load_twin(str(checkpoint)).eval()
    save_exits(folder / "exits", twin.spec, [calm_exit(twin, spec) for spec in SPECULATIVE], dtype=np.float32)
    export_bundle(ExportSpec(str(checkpoint), folder / "bundle", exits=folder / "exits"))
    return folder / "bundle"


@torch.no_grad()
def calm_exit(twin: Twin, exit_spec: ExitSpec) -> ExitNode:
    torch.manual_seed(exit_spec.exit_layer)
    node = exit_nodes.random_exit(twin.spec, exit_spec)
    for name, parameter in node.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(ADDED)
    if exit_spec.norm == "own":
        node.norm.load_state_dict(twin.model.norm.state_dict())
    if exit_spec.head == "own":
        node.head.weight.copy_(1.1 * twin.head_weight)  # an identical head would be stored once when it is quantized
    return node


def prompt(seed: int, length: int = 9) -> list[int]:
    return np.random.default_rng(seed).integers(3, SPECULATOR.vocab, length).tolist()


def kv_of_exits(model: Model, positions: int) -> list[np.ndarray]:
    """Return the keys and values of every block, each [kv_heads, positions, head_dim]."""
    owners = [names.exit_block(e.exit_layer) for e in model.bundle.manifest.plan.exits if e.branch == "block"]
    assert owners
    return [
        model.cache.buffer(owner, part).numpy()[0, :, :positions].copy() for owner in owners for part in names.KV_PARTS
    ]


def assert_blocks_have_seen(model: Model, text: Sequence[int]) -> None:
    """Check that the last generation left in the caches of blocks what one run over its text writes."""
    positions = len(text) - 1  # the newest token is not cached
    left = kv_of_exits(model, positions)
    model.exclusive_stack().prefill(text[:positions], 0, False)
    for mine, whole in zip(left, kv_of_exits(model, positions), strict=True):
        assert np.abs(whole).max() > 0.1
        assert np.abs(mine - whole).max() <= tolerances.FLUSHED_KV * np.abs(whole).max()


# The graphs


@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_blocks_at_three_depths_compute_what_the_twin_computes(
    tiny_bundles: TinyBundles, tmp_path: Path, tiny: TinyModel
) -> None:
    check(*bundle_of(tiny, tiny_bundles, tmp_path, *THREE), tiny)


def test_a_block_works_next_to_other_exits(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    check(*bundle_of(BASE, tiny_bundles, tmp_path, *OTHERS), BASE)


@pytest.mark.parametrize("tiny", [TINY["base"], TINY["head-dim-20-biased"]], ids=lambda tiny: tiny.name)
def test_blocks_predict_and_keep_the_same_however_a_text_is_split_into_runs(
    tiny_bundles: TinyBundles, tmp_path: Path, tiny: TinyModel
) -> None:
    seq = 23
    twin, nodes, bundle = bundle_of(tiny, tiny_bundles, tmp_path, *THREE)
    tokens = np.random.randint(3, tiny.vocab, size=(1, seq))
    no_state = np.zeros((1, 0, tiny.hidden), np.float32)
    expected = exit_nodes.expected_exits(twin, nodes, tokens, no_state)
    whole = exit_nodes.CachedGraphs(bundle, 1, seq + 1)
    whole.run(tokens, 0, seq, no_state)
    # (length, rows) of each run: all rows of a prompt, none of it, some of two runs, then one at a time.
    cuts = ([(10, 10), (13, 13)], [(10, 0), (9, 2), (4, 1)], [(1, 1)] * seq, [(8, 0), *[(1, 1)] * 10, (5, 5)])
    for cut in cuts:
        graphs, past = exit_nodes.CachedGraphs(bundle, 1, seq + 1), 0
        for length, rows in cut:
            found = graphs.run(tokens[:, past : past + length], past, rows, no_state)
            past += length
            for wanted, outputs in zip(expected, found, strict=False):
                scale = max(1.0, float(wanted.logits.std()) / USUAL_DEVIATION)
                logits = wanted.logits[:, past - rows : past]
                np.testing.assert_allclose(outputs[names.LOGITS], logits, atol=MAX_ABS * scale, rtol=0)
        assert past == seq
        assert graphs.caches.keys() == whole.caches.keys() > {names.past(names.exit_block(2), "key")}
        for name, cache in graphs.caches.items():
            largest = np.abs(whole.caches[name]).max()
            assert np.abs(cache - whole.caches[name])[:, :, :seq].max() <= tolerances.FLUSHED_KV * largest, name


def test_a_float16_bundle_has_blocks_in_half_precision(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    twin, nodes, bundle = bundle_of(BASE, tiny_bundles, tmp_path, *THREE[:2], dtype="float16")
    tokens, no_state = np.random.randint(3, BASE.vocab, size=(1, 9)), np.zeros((1, 0, BASE.hidden), np.float32)
    found = exit_nodes.run_graphs(bundle, tokens, 9, no_state)
    for expected, outputs in zip(exit_nodes.expected_exits(twin, nodes, tokens, no_state), found, strict=False):
        np.testing.assert_allclose(outputs[names.LOGITS], expected.logits, atol=tolerances.TINY_FP16.max_abs, rtol=0)
    check_inspect(bundle)


# Quantized


@pytest.mark.parametrize("method", ["rtn", "awq-gptq"])
@pytest.mark.parametrize("tiny", [SPECULATOR, TINY["head-dim-20-biased"]], ids=lambda tiny: tiny.name)
def test_a_quantized_block_stays_close_to_the_original(
    tiny_bundles: TinyBundles, tmp_path: Path, quantized: QuantizedBundles, tiny: TinyModel, method: str
) -> None:
    twin, _, bundle = bundle_of(tiny, tiny_bundles, tmp_path, *THREE)
    rounded = quantized(bundle, preset(INT8, method=method))
    formats = open_bundle(rounded).manifest.precision.weights
    own = [names.exit_weight(e.exit_layer, part) for e in THREE for part in exit_matrices(twin.spec, e)]
    assert {formats[name] for name in own} == {INT8}
    assert names.exit_weight(2, "block.attn.qkv_proj.weight") in own
    tokens, no_state = np.random.randint(3, tiny.vocab, size=(1, 40)), np.zeros((1, 0, tiny.hidden), np.float32)
    before, after = (exit_nodes.run_graphs(folder, tokens, 40, no_state) for folder in (bundle, rounded))
    for exit_spec, ours, theirs in zip(THREE, after, before, strict=False):
        error = np.std(ours[names.LOGITS] - theirs[names.LOGITS]) / np.std(theirs[names.LOGITS])
        assert error < tolerances.QUANTIZED_INT8, (exit_spec, error)
    for rows in (0, 1):
        found = exit_nodes.run_graphs(rounded, tokens, rows, no_state)
        assert [outputs[names.TOKEN].shape for outputs in found] == 4 * [(1, rows)]
    check_inspect(rounded)


def test_only_the_cache_of_layers_is_int8(speculator: Path, quantized: QuantizedBundles) -> None:
    manifest = open_bundle(quantized(speculator, preset(INT8, "int8"))).manifest
    ports = {port.name: port.dtype for port in manifest.contract(manifest.plan.segments[0]).inputs}
    assert ports[names.past(0, "key")] == "int8"
    assert ports[names.past(names.exit_block(1), "key")] == "float32"
    check_inspect(quantized(speculator, preset(INT8, "int8")))


# Decoding


def check_drafts(model: Model) -> None:
    """Check that drafting from every exit gives the plain tokens, and that blocks keep what one run would."""
    drafted = accepted = 0
    for seed in range(3):
        expected = model.generate(prompt(seed), max_new_tokens=40, ignore_eos=True).tokens
        for exit_layer in model.exit_layers[:2]:
            for policy in POLICIES:
                result = model.generate(
                    prompt(seed),
                    max_new_tokens=40,
                    ignore_eos=True,
                    strategy="self-speculative",
                    exit_layer=exit_layer,
                    draft=policy,
                )
                assert result.tokens == expected, (exit_layer, policy)
                drafted, accepted = drafted + result.stats.drafted, accepted + result.stats.accepted
    low, high = ACCEPTANCE
    assert low < accepted / drafted < high, "the grid must meet accepted and rejected drafts"


def test_drafts_of_a_block_give_the_plain_tokens_and_the_cache_of_one_run(speculator: Path) -> None:
    model = load(speculator)
    check_drafts(model)
    for exit_layer in (1, 3, 4):
        result = model.generate(
            prompt(5), max_new_tokens=40, ignore_eos=True, strategy="self-speculative", exit_layer=exit_layer
        )
        assert_blocks_have_seen(model, [*prompt(5), *result.tokens])


@pytest.mark.parametrize(("weights", "kv_cache"), MIXES)
def test_drafts_of_a_quantized_block_give_the_plain_tokens(
    speculator: Path, quantized: QuantizedBundles, weights: BlockFormat, kv_cache: KVType
) -> None:
    check_drafts(load(quantized(speculator, preset(weights, kv_cache))))


def test_a_rejected_draft_leaves_no_trace_in_the_next(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    twin, nodes, bundle = bundle_of(BASE, tiny_bundles, tmp_path, *THREE[:2])
    stack, text = load(bundle).exclusive_stack(2), prompt(3)
    stack.prefill(text, 0, False)
    for tail in ([7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]):
        for row, token in enumerate(tail):
            stack.put(row, token)
            stack.draft(row, len(text), True, True)
            ids = np.array([[*text, *tail[: row + 1]]])
            wanted = exit_nodes.expected_exits(twin, nodes, ids, np.zeros((1, 0, BASE.hidden), np.float32))[1]
            np.testing.assert_allclose(stack.exit.logits[row], wanted.logits[0, -1], atol=MAX_ABS, rtol=0)


def test_the_cache_of_a_block_grows_with_the_text(speculator: Path) -> None:
    model, tokens = load(speculator), CHUNK_POSITIONS + 24
    plain = model.generate(prompt(1), max_new_tokens=tokens, ignore_eos=True).tokens
    assert_blocks_have_seen(model, [*prompt(1), *plain])
    drafted = load(speculator).generate(
        prompt(1), max_new_tokens=tokens, ignore_eos=True, strategy="self-speculative", draft=DraftPolicy(3)
    )
    assert drafted.tokens == plain
    assert model.cache.capacity > CHUNK_POSITIONS


@pytest.mark.parametrize("kv_policy", ["flush", "pipeline", "recompute"])
def test_tokens_that_exit_below_a_block_are_in_its_cache_too(speculator: Path, kv_policy: KVPolicy) -> None:
    model = load(speculator)
    policy = ExitPolicy(parse_criterion("top_prob >= 0.3"), kv_policy=kv_policy)
    for seed in range(3):
        result = model.generate(prompt(seed), max_new_tokens=40, ignore_eos=True, strategy="early-exit", exits=policy)
        assert len([depth for depth, count in result.stats.exits.items() if count]) > 1
        assert_blocks_have_seen(model, [*prompt(seed), *result.tokens])


# Reports about them


def test_inspect_names_the_cache_of_a_block_and_counts_it(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    *_, bundle = bundle_of(TINY["head-dim-20-biased"], tiny_bundles, tmp_path, *THREE[:2], ExitSpec(3))
    check_inspect(bundle)
    report = json.loads(CliRunner().invoke(inspect, [str(bundle), "--json"], catch_exceptions=False).stdout)
    one = 2 * 2 * 32 * 4  # keys and values of two heads, padded from 20 to 32, in float32
    heads = [segment["head"] for segment in report["segments"]]
    assert [head["kv_owner"] for head in heads] == ["exits.1", "exits.2", None, None]
    assert [head["cache_bytes_per_token"] for head in heads] == [one, one, 0, 0]
    assert [segment["cache_bytes_per_token"] for segment in report["segments"]] == [2 * one, 2 * one, one, one]
    assert report["cache_bytes_per_token"] == 6 * one
    inputs = [port["name"] for port in report["segments"][1]["inputs"]]
    assert names.past(names.exit_block(2), "key") in inputs
    found = build_report(open_bundle(bundle))
    assert [kv_owned_words(segment) for segment in found.segments] == [
        "0, exit 1's layer",
        "1, exit 2's layer",
        "2",
        "3",
    ]
    assert [line.words for line in kv_lines(found)] == ["0", "exit 1's layer", "1", "exit 2's layer", "2", "3"]


def test_parity_compares_blocks_with_the_twin(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, bundle = bundle_of(SPECULATOR, tiny_bundles, tmp_path, *THREE)
    checkpoint = str(tiny_bundles.checkpoint(SPECULATOR))
    command = ["parity", checkpoint, str(bundle), "--prompts", "2", "--greedy-tokens", "8"]
    assert run([*command, "--exits", str(tmp_path / "exits")]) == 0
    assert "greedy continuations: identical" in capsys.readouterr().out
    exit_nodes.write_random_exits(Path(checkpoint), tmp_path / "others", *THREE)
    assert run([*command, "--exits", str(tmp_path / "others")]) == 1
    error = capsys.readouterr().err
    assert all(f"head after {depth} layers" in error for depth in (1, 2, 3))
