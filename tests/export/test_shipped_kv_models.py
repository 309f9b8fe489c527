"""The trained models in samples/checkpoints/kv-sharing are small, and behave as the random models do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs.kv_map import iterated_groups
from shortstack.runtime import load
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.engine import stack

SHIPPED = Path(__file__).parents[2] / "samples" / "checkpoints" / "kv-sharing"
TABLE = json.loads((SHIPPED / "table.json").read_text(encoding="utf-8"))
EXIT_LAYER = TABLE["settings"]["exit_layer"]
PROMPT = "book a table for two in paris at seven\n"


def folder_of(name: str) -> Path:
    return SHIPPED / name


@pytest.mark.parametrize("name", TABLE["maps"])
def test_a_shipped_model_is_small_and_has_its_map(name: str) -> None:
    with safe_open(folder_of(name) / "model.safetensors", "np") as tensors:
        keys = list(tensors.keys())
        assert {tensors.get_tensor(key).dtype for key in keys} == {np.dtype(np.float16)}
        assert sum(tensors.get_tensor(key).size for key in keys) <= 2_000_000
    kv_map = TABLE["maps"][name]["kv_map"]
    owners = {int(key.split(".")[2]) for key in keys if key.endswith("k_proj.weight")}
    assert owners == set(kv_map)
    assert len(owners) == (len(kv_map) if name == "plain" else len(kv_map) // 2)


@pytest.mark.parametrize("name", TABLE["maps"])
def test_drafts_of_a_shipped_model_change_nothing_and_are_accepted(name: str, tmp_path: Path) -> None:
    bundle = tmp_path / name
    export_bundle(ExportSpec(str(folder_of(name)), bundle, (EXIT_LAYER,)))
    model = load(bundle)
    plain = model.generate(PROMPT, max_new_tokens=40)
    drafted = model.generate(PROMPT, max_new_tokens=40, strategy="self-speculative", draft=DraftPolicy(4))
    assert drafted.tokens == plain.tokens
    assert drafted.stats.accepted > drafted.stats.rejected  # the exit was trained with the model
    assert plain.text.startswith("[IN:")


@pytest.mark.parametrize("name", [name for name, of in TABLE["maps"].items() if iterated_groups(tuple(of["kv_map"]))])
def test_prompts_of_trained_models_converge_in_few_passes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    run_passes = stack.run_passes

    def counted(*arguments: Any) -> int:
        counts.append(run_passes(*arguments))
        return counts[-1]

    monkeypatch.setattr(stack, "run_passes", counted)
    bundle = tmp_path / name
    export_bundle(ExportSpec(str(folder_of(name)), bundle, (EXIT_LAYER,)))
    model = load(bundle)
    text = model.encode(PROMPT * 8)
    found = model.generate(text, max_new_tokens=8, ignore_eos=True).tokens
    assert counts
    assert max(counts) < len(text) // 3
    assert load(bundle, prefill_passes="sequential").generate(text, max_new_tokens=8, ignore_eos=True).tokens == found
