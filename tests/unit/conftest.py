"""Bundles for the tests of `shortstack inspect`, and command lines with wrong paths."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from helpers.command_paths import Says
from helpers.inspect_bundles import MakeBundle, write_bundle
from shortstack.__main__ import run


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Writes a bundle whose files hold nothing but their own names."""
    return partial(write_bundle, tmp_path / "bundle")


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Runs a command line that must be refused, and returns what it says after "error: "."""

    def says(*arguments: str) -> str:
        capsys.readouterr()
        code = run(arguments)
        out, error = capsys.readouterr()
        assert (code, out) == (2, ""), error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error.removeprefix("error: ").removesuffix("\n")

    return says
