"""Models whose layers share keys and values, as graphs: they compute what the twin computes, whole, in chunks and step
by step; exits leave no hole where nothing above them owns a cache.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import tolerances
from helpers.kv_bundles import KVBundles
from helpers.quantized import INT4, INT4_OFFSETS, INT8, QuantizedBundles, recipe
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.errors import RequestError, UnsupportedError
from shortstack.graphs.kv_map import complete_from, iterated_groups, parse_kv_map, placement, producers
from shortstack.graphs.precision import BlockFormat, KVType
from shortstack.runtime import DraftPolicy, ExitPolicy, Model, load, parse_criterion
from shortstack.runtime.stack import PREFILL_ROWS, Stack
from shortstack.runtime.teach import teach

LAYERS, PRODUCERS = 6, 3
PLACEMENTS = list(product(("pizza", "sandwich", "lasagna"), ("bottom", "middle", "top")))
TOLERANCE = 1e-4
TEXT = 24
GEMMA_TYPES = ["sliding_attention", "full_attention"] * 2


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> KVBundles:
    return KVBundles(tmp_path_factory.mktemp("kv"))


def ids(length: int = TEXT, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 131, length).tolist()


def legal_exit(kv_map: tuple[int, ...]) -> tuple[int, ...]:
    """The lowest depth at which the map may be cut; none if there is none."""
    groups = iterated_groups(kv_map)
    legal = (d for d in range(1, len(kv_map)) if not any(g.start < d < g.end for g in groups))
    return tuple(legal)[:1]


@torch.no_grad()
def wanted(twin: Any, text: Sequence[int], depths: Sequence[int]) -> dict[int, np.ndarray]:
    boundaries = twin.boundaries(torch.tensor([list(text)]), set(depths))
    return {depth: twin.logits(boundaries[depth].hidden)[0].numpy() for depth in depths}


def step_by_step(stack: Stack, text: Sequence[int], prompt: int) -> np.ndarray:
    """Logits [len(text) - prompt + 1, vocab] of the final head from the prompt's last position on."""
    stack.prefill(text[:prompt], 0, True)
    found = [stack.final.logits[0].copy()]
    for past in range(prompt, len(text)):
        stack.put(0, text[past])
        stack.draft(0, past, with_head=False, with_logits=False)
        stack.verify(1, past, True)
        found.append(stack.final.logits[0].copy())
    return np.stack(found)


CASES = [
    *((placement(*names_, LAYERS, PRODUCERS), {}) for names_ in PLACEMENTS),
    (placement("sandwich", "middle", 7, 4), {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12}),
    (placement("pizza", "bottom", 7, 2), {"hidden_size": 60, "intermediate_size": 77, "head_dim": 20}),
    (placement("lasagna", "bottom", 6, 3), {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    (placement("sandwich", "top", 6, 3), {"qkv_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    (placement("sandwich", "top", 6, 3), {"masks_diagonal": True}),
    (placement("pizza", "bottom", 6, 3), {"masks_diagonal": True}),
    (parse_kv_map("yoco", 6), {"windows": (4, 4, 4, 0, 0, 0)}),
    (placement("sandwich", "middle", 6, 3), {"windows": (0, 5, 5, 5, 0, 3)}),
    (placement("lasagna", "top", 6, 3), {"windows": (3,) * 6, "masks_diagonal": True}),
    ((0, 0, 0, 3, 0, 3), {}),
    ((0, 1, 2, 3), {"windows": (2, 0, 3, 1)}),
]
cases = pytest.mark.parametrize(
    ("kv_map", "changes"),
    CASES,
    ids=lambda c: "_".join(map(str, c)) if isinstance(c, tuple) else "+".join(c) or "plain",
)


@cases
def test_the_graphs_compute_what_the_twin_computes(
    bundles: KVBundles, kv_map: tuple[int, ...], changes: dict[str, Any]
) -> None:
    exits = legal_exit(kv_map)
    model = load(bundles.bundle(kv_map, *exits, **changes))
    twin, depths = bundles.twin(kv_map, **changes), (*exits, len(kv_map))
    text = ids()
    expected = wanted(twin, text, depths)
    found = teach(model, text)
    for depth in depths:
        assert np.abs(found.heads[depth] - expected[depth]).max() <= TOLERANCE
    for prompt in (1, 2, 9):
        logits = step_by_step(model.exclusive_stack(exits), text, prompt)
        assert np.abs(logits - expected[len(kv_map)][prompt - 1 :]).max() <= TOLERANCE


@cases
def test_drafts_are_judged_as_plain_decoding_would(
    bundles: KVBundles, kv_map: tuple[int, ...], changes: dict[str, Any]
) -> None:
    exits = legal_exit(kv_map)
    if not exits:
        pytest.skip("no depth at which this map may be cut")
    model = load(bundles.bundle(kv_map, *exits, **changes))
    accepted = rejected = 0
    for seed in range(4):
        plain = model.generate(ids(7, seed), max_new_tokens=24, ignore_eos=True)
        for policy in (DraftPolicy(2), DraftPolicy(4, has_bonus=True)):
            drafted = model.generate(
                ids(7, seed), max_new_tokens=24, ignore_eos=True, strategy="self-speculative", draft=policy
            )
            assert drafted.tokens == plain.tokens
            accepted += drafted.stats.accepted
            rejected += drafted.stats.rejected
        exact = ExitPolicy(parse_criterion("top_prob >= 0.1"), verify="exact")
        assert early(model, ids(7, seed), exact) == plain.tokens
    assert accepted + rejected > 0
    assert rejected > 0 or changes, "plain placements must meet rejected drafts"


def early(model: Model, prompt: Sequence[int], policy: ExitPolicy, tokens: int = 24) -> tuple[int, ...]:
    result = model.generate(prompt, max_new_tokens=tokens, ignore_eos=True, strategy="early-exit", exits=policy)
    assert result.stats.is_balanced
    return result.tokens


@pytest.mark.parametrize(("partition", "position"), PLACEMENTS)
def test_a_prompt_in_chunks_is_the_whole_prompt(bundles: KVBundles, partition: Any, position: Any) -> None:
    kv_map = placement(partition, position, LAYERS, PRODUCERS)
    model = load(bundles.bundle(kv_map, *legal_exit(kv_map)))
    text = ids(PREFILL_ROWS + 30)
    expected = wanted(bundles.twin(kv_map), text, (LAYERS,))[LAYERS][-1]
    stack = model.exclusive_stack()
    stack.prefill(text, 0, True)
    assert np.abs(stack.final.logits[0] - expected).max() <= TOLERANCE
    for cut in (1, 2, 100):  # as a second turn goes on from a first
        stack.prefill(text[:cut], 0, False)
        stack.prefill(text[cut:], cut, True)
        assert np.abs(stack.final.logits[0] - expected).max() <= TOLERANCE


@pytest.mark.parametrize(("partition", "position"), PLACEMENTS)
def test_a_cache_takes_as_many_bytes_as_there_are_producers(bundles: KVBundles, partition: Any, position: Any) -> None:
    sizes = []
    for count in (PRODUCERS, LAYERS):
        model = load(bundles.bundle(placement(partition, position, LAYERS, count)))
        model.generate(ids(), max_new_tokens=2)
        owners = [owner for s in model.bundle.manifest.plan.segments for owner in model.bundle.manifest.cache_types(s)]
        assert len(owners) == count
        sizes.append(sum(model.cache.buffer(o, part).numpy().nbytes for o in owners for part in names.KV_PARTS))
    assert sizes[0] * LAYERS == sizes[1] * PRODUCERS


def test_above_a_complete_exit_there_is_no_cache_at_all(bundles: KVBundles) -> None:
    kv_map = placement("pizza", "bottom", LAYERS, PRODUCERS)
    model = load(bundles.bundle(kv_map, complete_from(kv_map)))
    inputs = [port.name for port in model.sessions[1].get_inputs()]
    assert not [name for name in inputs if name.startswith(names.past(0, "").split("0")[0])]
    assert [name for name in inputs if "shared" in name] == [names.shared(2, part) for part in names.KV_PARTS]
    assert len(model.sessions[1].get_outputs()) == 5


@pytest.mark.parametrize("expression", ["always", "top_prob >= 0.12", "similarity >= 0.9"])
def test_leaving_at_a_complete_exit_changes_no_later_logit(bundles: KVBundles, expression: str) -> None:
    kv_map = placement("pizza", "bottom", LAYERS, PRODUCERS)
    exits = (PRODUCERS, PRODUCERS + 1)
    model = load(bundles.bundle(kv_map, *exits))
    for seed in range(4):
        for kv_policy in ("flush", "pipeline", "auto"):  # recomputing runs the lower rows in other numbers
            policy = ExitPolicy(parse_criterion(expression), kv_policy=kv_policy)  # type: ignore[arg-type]
            prompt = ids(7, seed)
            stream = model.stream(prompt, max_new_tokens=24, ignore_eos=True, strategy="early-exit", exits=policy)
            tokens = list(stream)
            assert {token.pending for token in tokens} == {0}
            text = [*prompt, *(token.id for token in tokens)]
            # The caches that early exit left, read by one more full-depth step; and those of a text that never left.
            after = []
            for fresh in (False, True):
                stack = model._stack(())
                if fresh:
                    stack.prefill(text[:7], 0, False)
                    for past in range(7, len(text) - 1):
                        stack.put(0, text[past])
                        stack.verify(1, past, False)
                stack.put(0, text[-1])
                stack.verify(1, len(text) - 1, True)
                after.append(stack.final.logits[0].copy())
            assert (after[0] == after[1]).all(), "bit for bit"


def test_a_prompt_runs_above_a_complete_exit_with_its_last_position_only(
    bundles: KVBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_map = placement("pizza", "bottom", LAYERS, PRODUCERS)
    model = load(bundles.bundle(kv_map, PRODUCERS))
    stack = model.exclusive_stack((PRODUCERS,))
    rows: list[tuple[int, int]] = []
    set_lengths = stack._set_lengths

    def watch(index: int, past: int, count: int) -> None:
        rows.append((index, count))
        set_lengths(index, past, count)

    monkeypatch.setattr(stack, "_set_lengths", watch)
    stack.prefill(ids(PREFILL_ROWS + 30), 0, True)
    assert rows == [(0, PREFILL_ROWS), (0, 30), (1, 1)]


def test_missing_producers_alone_are_filled_back(bundles: KVBundles) -> None:
    kv_map = placement("lasagna", "bottom", LAYERS, PRODUCERS)  # 0 0 2 2 4 4: complete from 5 on
    model = load(bundles.bundle(kv_map, 2, 5))
    runs: list[tuple[int, int]] = []
    stack = model._stack((2, 5))
    run = stack.run

    def watch(level: int, start: int, end: int, *rest: Any) -> None:
        runs.append((level, end - start))
        run(level, start, end, *rest)

    stack.run = watch  # type: ignore[method-assign]
    policy = ExitPolicy(parse_criterion("always"), max_pending=4)
    tokens = early(model, ids(7), policy, 25)
    assert [count for level, count in runs if level == 2] == []
    assert sum(count for level, count in runs if level == 1) == 24
    text = [*ids(7), *tokens]
    left = [model.cache.read(layer, 0, len(text) - 1) for layer in producers(kv_map, 0, LAYERS)]
    model.exclusive_stack().prefill(text[:-1], 0, False)
    for mine, layer in zip(left, producers(kv_map, 0, LAYERS), strict=True):
        for part, full in zip(mine, model.cache.read(layer, 0, len(text) - 1), strict=True):
            assert np.abs(part - full).max() <= 1e-5 * np.abs(full).max()


@pytest.mark.parametrize("passes", [1, 2, 9, "converged", "sequential"])
def test_a_prompt_runs_as_many_passes_as_is_asked(bundles: KVBundles, passes: Any) -> None:
    kv_map = placement("sandwich", "top", LAYERS, PRODUCERS)
    model = load(bundles.bundle(kv_map), prefill_passes=passes)
    text = ids(12)
    stack = model.exclusive_stack()
    stack.prefill(text, 0, True)
    twin = bundles.twin(kv_map)
    with torch.no_grad():
        given = passes if isinstance(passes, int) else None
        # The first position runs alone and is final, so the others have a pass more behind them than in the twin's
        # passes over all: n here are n + 1 there.
        boundary = twin.boundaries(torch.tensor([text]), {LAYERS}, passes=None if given is None else given + 1)[LAYERS]
        expected = twin.logits(boundary.hidden)[0, -1].numpy()
        exact = wanted(twin, text, (LAYERS,))[LAYERS][-1]
    assert np.abs(stack.final.logits[0] - exact).max() <= (TOLERANCE if given is None else np.inf)
    if given in (1, 2):
        assert np.abs(expected - exact).max() > TOLERANCE, "too few passes must show"
        assert np.abs(stack.final.logits[0] - exact).max() > TOLERANCE


@pytest.mark.parametrize("passes", [0, -1, "often", 1.5, True])
def test_passes_that_are_none_are_refused(bundles: KVBundles, passes: Any) -> None:
    with pytest.raises(RequestError, match="passes over a prompt"):
        load(bundles.bundle(placement("sandwich", "top", LAYERS, PRODUCERS)), prefill_passes=passes)


@pytest.mark.parametrize("kv_map", [placement("pizza", "bottom", 6, 3), placement("sandwich", "middle", 6, 3)], ids=str)
def test_parity_compares_with_the_twin_where_transformers_has_no_such_model(
    bundles: KVBundles, kv_map: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits = (*legal_exit(kv_map), 5)
    text = tmp_path / "prompts.txt"
    text.write_text("the red stone and the\n", encoding="utf-8")
    line = ["parity", str(bundles.checkpoint(kv_map)), str(bundles.bundle(kv_map, *exits)), "--text", str(text)]
    line += ["--greedy-tokens", "12"]
    assert run([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert [head["depth"] for head in report["heads"]] == [*exits, 6]
    other = bundles.checkpoint(placement("lasagna", "bottom", 6, 3))
    assert run(["parity", str(other), *line[2:]]) != 0


FOREIGN = {
    "lckv-llama": ((0, 3, 3, 3, 4), {"layer_types": "0_3_3_3_4", "force_nodiag": True, "sliding_window": 4096}),
    "llama": (  # Gemma 3n's and 4's fields
        (0, 1, 2, 1, 2),
        {"num_kv_shared_layers": 2, "sliding_window": 5, "layer_types": ["full_attention", *GEMMA_TYPES]},
    ),
}


@pytest.mark.parametrize("model_type", FOREIGN)
def test_configs_of_others_become_bundles(bundles: KVBundles, tmp_path: Path, model_type: str) -> None:
    kv_map, fields = FOREIGN[model_type]
    changes: dict[str, Any] = {"masks_diagonal": True} if model_type == "lckv-llama" else {"windows": (0, 5, 0, 5, 0)}
    twin = bundles.twin(kv_map, **changes)
    folder = Path(shutil.copytree(bundles.checkpoint(kv_map, **changes), tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    ours = ("kv_map", "windows", "masks_diagonal")
    theirs = {name: value for name, value in config.items() if name not in ours}
    (folder / "config.json").write_text(json.dumps({**theirs, "model_type": model_type, **fields}))
    export_bundle(ExportSpec(str(folder), tmp_path / "bundle"))
    found = teach(load(tmp_path / "bundle"), ids())
    assert np.abs(found.heads[5] - wanted(twin, ids(), (5,))[5]).max() <= TOLERANCE


def test_generate_takes_passes_where_there_are_any(bundles: KVBundles, capsys: pytest.CaptureFixture[str]) -> None:
    top, bottom = (bundles.bundle(placement("sandwich", position, LAYERS, PRODUCERS)) for position in ("top", "bottom"))  # type: ignore[arg-type]
    for passes in ("9", "converged", "sequential"):
        assert run(["generate", str(top), "the red stone", "-n", "4", "--prefill-passes", passes]) == 0
    capsys.readouterr()
    assert run(["generate", str(top), "the red stone", "--prefill-passes", "often"]) == 2
    assert "'converged', or 'sequential'" in capsys.readouterr().err
    assert run(["generate", str(bottom), "the red stone", "--prefill-passes", "9"]) == 2
    assert "would have no effect" in capsys.readouterr().err


def test_a_cut_through_a_group_is_refused_by_export(bundles: KVBundles, tmp_path: Path) -> None:
    kv_map = placement("sandwich", "middle", LAYERS, PRODUCERS)
    with pytest.raises(RequestError, match="run together"):
        bundles.bundle(kv_map, iterated_groups(kv_map)[0].start + 1)


WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 512}


@pytest.mark.parametrize(("partition", "position"), PLACEMENTS)
@pytest.mark.parametrize(
    ("weights", "kv_cache", "method"),
    [
        (INT4, "float", "rtn"),
        (INT8, "float", "rtn"),
        (INT8, "int8", "rtn"),
        (INT4, "int8", "awq-gptq"),
        (INT4_OFFSETS, "int8", "gptq"),
    ],
    ids=["int4", "int8", "int8 and cache", "awq-gptq and cache", "gptq with offsets and cache"],
)
def test_quantized_bundles_share_and_verify_exactly(
    bundles: KVBundles,
    quantized: QuantizedBundles,
    partition: Any,
    position: Any,
    weights: BlockFormat,
    kv_cache: KVType,
    method: str,
) -> None:
    kv_map = placement(partition, position, LAYERS, PRODUCERS)
    exits = legal_exit(kv_map)
    source = bundles.bundle(kv_map, *exits, **WIDE)
    mix = recipe(weights, kv_cache, method=method)
    if iterated_groups(kv_map) and kv_cache == "int8":
        with pytest.raises(UnsupportedError, match="--method rtn"):
            quantized(source, mix)
        return
    whole, small = load(source), load(quantized(source, mix))
    theirs, ours = (teach(model, ids()).heads[LAYERS] for model in (whole, small))
    worst = tolerances.QUANTIZED_INT8 if weights.bits == 8 else 1.0
    assert np.sqrt(np.square(theirs - ours).mean()) <= worst * theirs.std()
    for seed in range(3 if exits else 0):
        plain = small.generate(ids(7, seed), max_new_tokens=20, ignore_eos=True)
        drafted = small.generate(ids(7, seed), max_new_tokens=20, ignore_eos=True, strategy="self-speculative")
        assert drafted.tokens == plain.tokens
        exact = ExitPolicy(parse_criterion("top_prob >= 0.1"), verify="exact")
        assert early(small, ids(7, seed), exact, 20) == plain.tokens
