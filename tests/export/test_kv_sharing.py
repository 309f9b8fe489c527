"""Graphs of models whose layers share keys and values: they compute what the twin computes, for a whole text, in chunks
and step by step, also when quantized. Configs of other projects, and requests that are refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tolerances
from helpers.kv_bundles import KVBundles
from helpers.kv_cases import LAYERS, NINE, PRODUCERS, TOLERANCE, cases, early, exits_of, ids, step_by_step, wanted
from helpers.quantized import INT4, INT4_OFFSETS, INT8, QuantizedBundles, preset
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.errors import RequestError, UnsupportedError
from shortstack.graphs.kv_map import identity_kv_map, iterated_groups, placement
from shortstack.graphs.precision import BlockFormat, KVType
from shortstack.runtime import ExitPolicy, load, parse_criterion
from shortstack.runtime.engine.stack import PREFILL_ROWS

GEMMA_TYPES = ["sliding_attention", "full_attention"] * 2
nine = pytest.mark.parametrize("kv_map", NINE, ids=str)


@cases
def test_the_graphs_compute_what_the_twin_computes(
    kv_bundles: KVBundles, kv_map: tuple[int, ...], changes: dict[str, Any]
) -> None:
    exits = exits_of(kv_map)
    model = load(kv_bundles.bundle(kv_map, *exits, **changes))
    twin, depths = kv_bundles.twin(kv_map, **changes), (*exits, len(kv_map))
    text = ids()
    expected = wanted(twin, text, depths)
    found = model.activations(text)
    for depth in depths:
        assert np.abs(found.heads[depth] - expected[depth]).max() <= TOLERANCE
    for depth in exits or (None,):
        for prompt in (1, 2, 9):
            logits = step_by_step(model.exclusive_stack(depth), text, prompt)
            assert np.abs(logits - expected[len(kv_map)][prompt - 1 :]).max() <= TOLERANCE


@nine
def test_a_prompt_in_chunks_equals_the_whole_prompt(kv_bundles: KVBundles, kv_map: tuple[int, ...]) -> None:
    model = load(kv_bundles.bundle(kv_map, *exits_of(kv_map)))
    text = ids(PREFILL_ROWS + 30)
    expected = wanted(kv_bundles.twin(kv_map), text, (LAYERS,))[LAYERS][-1]
    stack = model.exclusive_stack()
    stack.prefill(text, 0, True)
    assert np.abs(stack.final.logits[0] - expected).max() <= TOLERANCE
    for cut in (1, 2, 100):  # as a second turn continues a first one
        stack.prefill(text[:cut], 0, False)
        stack.prefill(text[cut:], cut, True)
        assert np.abs(stack.final.logits[0] - expected).max() <= TOLERANCE


@nine
def test_cache_bytes_are_proportional_to_the_number_of_producers(
    kv_bundles: KVBundles, kv_map: tuple[int, ...]
) -> None:
    sizes = []
    for of_map, count in ((kv_map, PRODUCERS), (identity_kv_map(LAYERS), LAYERS)):
        model = load(kv_bundles.bundle(of_map))
        model.generate(ids(), max_new_tokens=2)
        owners = [owner for s in model.bundle.manifest.plan.segments for owner in model.bundle.manifest.cache_types(s)]
        assert len(owners) == count
        sizes.append(sum(model.cache.buffer(o, part).numpy().nbytes for o in owners for part in names.KV_PARTS))
    assert sizes[0] * LAYERS == sizes[1] * PRODUCERS


@pytest.mark.parametrize("kv_map", [placement("pizza", "bottom", 6, 3), placement("sandwich", "middle", 6, 3)], ids=str)
def test_parity_compares_with_the_twin_if_transformers_has_no_such_model(
    kv_bundles: KVBundles, kv_map: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits = (1, 5)
    text = tmp_path / "prompts.txt"
    text.write_text("the red stone and the\n", encoding="utf-8")
    line = ["parity", str(kv_bundles.checkpoint(kv_map)), str(kv_bundles.bundle(kv_map, *exits)), "--text", str(text)]
    line += ["--greedy-tokens", "12"]
    assert run([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert [head["depth"] for head in report["heads"]] == [*exits, 6]
    other = kv_bundles.checkpoint(placement("lasagna", "bottom", 6, 3))
    assert run(["parity", str(other), *line[2:]]) != 0


FOREIGN = {
    "lckv-llama": ((0, 3, 3, 3, 4), {"layer_types": "0_3_3_3_4", "force_nodiag": True, "sliding_window": 4096}),
    "llama": (  # Gemma 3n's and 4's fields
        (0, 1, 2, 1, 2),
        {"num_kv_shared_layers": 2, "sliding_window": 5, "layer_types": ["full_attention", *GEMMA_TYPES]},
    ),
}


@pytest.mark.parametrize("model_type", FOREIGN)
def test_configs_of_other_projects_become_bundles(kv_bundles: KVBundles, tmp_path: Path, model_type: str) -> None:
    kv_map, fields = FOREIGN[model_type]
    changes: dict[str, Any] = {"masks_diagonal": True} if model_type == "lckv-llama" else {"windows": (0, 5, 0, 5, 0)}
    twin = kv_bundles.twin(kv_map, **changes)
    folder = Path(shutil.copytree(kv_bundles.checkpoint(kv_map, **changes), tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    ours = ("kv_map", "windows", "masks_diagonal")
    theirs = {name: value for name, value in config.items() if name not in ours}
    (folder / "config.json").write_text(json.dumps({**theirs, "model_type": model_type, **fields}))
    export_bundle(ExportSpec(str(folder), tmp_path / "bundle"))
    found = load(tmp_path / "bundle").activations(ids())
    assert np.abs(found.heads[5] - wanted(twin, ids(), (5,))[5]).max() <= TOLERANCE


def test_a_cut_through_a_group_is_refused_by_export(kv_bundles: KVBundles, tmp_path: Path) -> None:
    kv_map = placement("sandwich", "middle", LAYERS, PRODUCERS)
    with pytest.raises(RequestError, match="run together"):
        kv_bundles.bundle(kv_map, iterated_groups(kv_map)[0].start + 1)


WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 512}


@nine
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
    kv_bundles: KVBundles,
    quantized: QuantizedBundles,
    kv_map: tuple[int, ...],
    weights: BlockFormat,
    kv_cache: KVType,
    method: str,
) -> None:
    exits = exits_of(kv_map)
    source = kv_bundles.bundle(kv_map, *exits, **WIDE)
    mix = preset(weights, kv_cache, method=method)
    if iterated_groups(kv_map) and method != "rtn":
        with pytest.raises(UnsupportedError, match="--method rtn"):
            quantized(source, mix)
        return
    whole, small = load(source), load(quantized(source, mix))
    theirs, ours = (model.activations(ids()).heads[LAYERS] for model in (whole, small))
    worst = tolerances.QUANTIZED_INT8 if weights.bits == 8 else 1.0
    assert np.sqrt(np.square(theirs - ours).mean()) <= worst * theirs.std()
    for seed in range(2):
        plain = small.generate(ids(7, seed), max_new_tokens=20, ignore_eos=True)
        for depth in exits:
            drafted = small.generate(
                ids(7, seed), max_new_tokens=20, ignore_eos=True, strategy="self-speculative", exit_layer=depth
            )
            assert drafted.tokens == plain.tokens
            exact = ExitPolicy(parse_criterion("top_prob >= 0.1"), exit_layers=(depth,), verify="exact")
            assert early(small, ids(7, seed), exact, 20) == plain.tokens
