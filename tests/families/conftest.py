"""The files of one family, made once for the tests of it that follow each other."""

from __future__ import annotations

import pytest

from helpers.families import MadeFamily
from helpers.family_rows import FamilyRow

_FOLDERS: dict[str, MadeFamily] = {}


@pytest.fixture
def made(row: FamilyRow, tmp_path_factory: pytest.TempPathFactory) -> MadeFamily:
    """The family of the test's row; only the files of the last one are kept."""
    if row.name not in _FOLDERS:
        _FOLDERS.clear()
        _FOLDERS[row.name] = MadeFamily(row, tmp_path_factory.mktemp(row.model_type))
    return _FOLDERS[row.name]
