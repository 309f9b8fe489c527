"""Every family: AWQ and the search of ``--max-kl`` on its tiny model.

All but a fixed slice are slow tests: one check each of three families.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.families import MadeFamily
from helpers.family_quantized import CHECKS
from helpers.family_rows import ROWS, FamilyRow
from helpers.quantized import INT4, preset
from shortstack.graphs.bundle import open_bundle
from shortstack.quant.bundle_floats import BundleFloats
from shortstack.quant.preset import assign
from shortstack.quant.search import units
from shortstack.quant.source import Source

SLICE = {"awq-gptq": "Qwen3", "--max-kl": "GPT-2", "awq": "Gemma 4 12B, 31B"}


def cases() -> Iterator[object]:
    for row in ROWS:
        for check in CHECKS:
            marks = [] if SLICE[check] == row.name else [pytest.mark.slow]
            yield pytest.param(row, check, id=f"{row.name}-{check}", marks=marks)


@pytest.mark.parametrize(("row", "check"), [*cases()])
def test_a_family_is_rounded_for_its_calibration_text(
    made: MadeFamily, row: FamilyRow, check: str, tmp_path: Path
) -> None:
    CHECKS[check](made, tmp_path)


@pytest.mark.parametrize("name", ["Qwen3", "GPT-2", "Gemma 4 E2B, E4B"])
def test_the_search_changes_every_matrix_that_the_preset_would_round(name: str, tmp_path: Path) -> None:
    """Those of Gemma 4's branch on tokens lie in no attention and in no MLP."""
    made = MadeFamily(next(row for row in ROWS if row.name == name), tmp_path)
    source = Source(BundleFloats(open_bundle(made.bundle)))
    searched = [matrix for unit in units(source) for matrix in unit.matrices]
    assert len(searched) == len(set(searched))
    assert set(searched) == assign(preset(INT4), source.spec, source.manifest.plan).matrices.keys()
    assert all(unit.matrices for unit in units(source))
