"""Every family, every check; docs/families.md says which pass, and is wrong where this file fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.families import CHECKS, MadeFamily, NoGgufError
from helpers.family_rows import ROWS, FamilyRow
from helpers.family_table import PASSES, read_table
from shortstack.export.arch import ARCHITECTURES


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_family_passes_what_the_table_says(made: MadeFamily, row: FamilyRow, check: str, repository: Path) -> None:
    said = read_table(repository)[row.name][check]
    if said != PASSES and check == "GGUF":
        with pytest.raises(NoGgufError):
            CHECKS[check](made)
        return
    CHECKS[check](made)
    assert said == PASSES, "the check passes; write the table with `python -m tests.families`"


def test_the_table_has_a_row_for_each_family_that_transformers_has(repository: Path) -> None:
    whole = {"gemma3", "gemma4", "mistral3"}  # folders of which a language model is a part: test_text_parts.py
    ours = {name for name in ARCHITECTURES if not name.startswith(("lckv", "opt", "cla"))} - whole
    assert {row.model_type for row in ROWS} == ours
    table = read_table(repository)
    assert [(name, cells["`model_type`"]) for name, cells in table.items()] == [
        (row.name, f"`{row.model_type}`") for row in ROWS
    ]
