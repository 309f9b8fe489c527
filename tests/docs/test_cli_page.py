"""docs/cli.md is what the commands' help says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def make_cli(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", repository / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_is_up_to_date(make_cli: ModuleType) -> None:
    text = make_cli.PAGE.read_text(encoding="utf-8")
    assert text == make_cli.page(text), "options changed: run `python docs/make_cli.py`"


def test_the_page_does_not_depend_on_the_width_of_the_terminal(
    make_cli: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = make_cli.PAGE.read_text(encoding="utf-8")
    pages = set()
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        pages.add(make_cli.page(text))
    assert len(pages) == 1


def test_what_is_written_by_hand_stays(make_cli: ModuleType) -> None:
    page = make_cli.page(f"# By hand\n\n{make_cli.BEGINNING}\n\n## shortstack removed\n")
    assert page.startswith("# By hand\n")
    assert "shortstack removed" not in page
    assert "## shortstack generate" in page
