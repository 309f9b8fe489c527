"""Bundles for the tests of `shortstack inspect`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from helpers.inspect_bundles import MakeBundle, write_bundle


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Writes a bundle whose files hold nothing but their own names."""
    return partial(write_bundle, tmp_path / "bundle")
