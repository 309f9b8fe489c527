"""Every family, every recipe: two steps of training, and the bundle computes what was trained.

All but a fixed slice are slow tests: sharing in three families, and the other recipes in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.families import MadeFamily
from helpers.family_recipes import RECIPES, half_shared
from helpers.family_rows import ROWS, FamilyRow
from helpers.recipe_runs import options, write_words
from shortstack.export.twin.folder import load_twin
from shortstack.samples.recipes import kv_sharing

SLICE = {"kv_sharing": ("qwen3", "gemma2", "gpt_neox")}
SLICE_OF_OTHERS = ("gemma2",)
SHARE_ALREADY = ("Gemma 4 E2B, E4B",)


def cases() -> Iterator[object]:
    for row in ROWS:
        for recipe in RECIPES:
            is_in_slice = row.model_type in SLICE.get(recipe, SLICE_OF_OTHERS)
            marks = [] if is_in_slice else [pytest.mark.slow]
            yield pytest.param(row, recipe, id=f"{row.name}-{recipe}", marks=marks)


@pytest.mark.parametrize(("row", "recipe"), [*cases()])
def test_a_recipe_trains_a_family_and_the_bundle_computes_what_was_trained(
    made: MadeFamily, row: FamilyRow, recipe: str, tmp_path: Path, one_torch_thread: Callable[[], None]
) -> None:
    one_torch_thread()
    if recipe == "kv_sharing" and row.name in SHARE_ALREADY:
        data = write_words(tmp_path)
        own = ",".join(map(str, half_shared(load_twin(str(made.checkpoint)).spec)))
        line = [made.checkpoint, tmp_path / "run", "--kv-map", own, *options(data, 2)]
        result = CliRunner().invoke(kv_sharing.main, [str(word) for word in line])
        assert result.exit_code == 2
        assert "the model's layers share keys and values already" in result.output
        return
    RECIPES[recipe](made, tmp_path)
