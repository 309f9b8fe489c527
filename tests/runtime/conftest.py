"""A loaded model, for tests that need no special one."""

from __future__ import annotations

from pathlib import Path

import pytest

from shortstack.runtime import Model, load


@pytest.fixture(scope="module")
def model(sound: Path) -> Model:
    return load(sound)
