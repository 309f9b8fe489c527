"""Folders that the twin writes, of models whose layers all have one type: transformers computes the same from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tolerances
from helpers.families import MadeFamily
from helpers.family_rows import FamilyRow
from shortstack.export.parity.reference import Reference
from shortstack.export.twin.folder import load_twin, save_twin

ALL_FULL = {"layer_types": ["full_attention"] * 4, "sliding_window": 6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", ALL_FULL),
    "gemma3": ("gemma3_text", ALL_FULL),
    "olmo3": ("olmo3", ALL_FULL),
    "cohere2": ("cohere2", ALL_FULL),
    "ministral": ("ministral", {**ALL_FULL, "head_dim": 16}),
    "exaone4": ("exaone4", ALL_FULL),
    "exaone4 without a window": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "phi3 without a window": ("phi3", {"sliding_window": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_of_one_type_of_layer_is_the_same_in_transformers(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    made = MadeFamily(FamilyRow(family, family, fields), tmp_path)
    text, files = made.text(), {file.name: file.read_bytes() for file in made.checkpoint.glob("tokenizer*")}
    twin = load_twin(str(made.checkpoint))
    save_twin(twin, tmp_path / "saved", files)
    assert load_twin(str(tmp_path / "saved")).spec == twin.spec
    found = Reference(str(tmp_path / "saved")).run_text(text, (4,)).heads[4]
    expected = made.reference.run_text(text, (4,)).heads[4]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.TINY.max_abs)


def test_a_mistral_stays_one(tmp_path: Path) -> None:
    made = MadeFamily(FamilyRow("mistral", "Mistral", {"sliding_window": None}), tmp_path)
    save_twin(load_twin(str(made.checkpoint)), tmp_path / "saved", {})
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["sliding_window"] is None
    assert "layer_types" not in config  # with it, transformers takes it for a Ministral
