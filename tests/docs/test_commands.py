"""Every command line in README, docs and the pages of samples has options that exist; every Python block compiles."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import click
import pytest

from helpers.documents import Block, Page, pages, split_command
from shortstack.__main__ import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = pages(REPOSITORY)


def name_of(page: Page) -> str:
    return str(page.path.relative_to(REPOSITORY))


LINES = [(name_of(page), line) for page in PAGES for line in page.commands if page.path.name != "cli.md"]


def command_of(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The click command that a command line runs, and its arguments; None where it runs something else."""
    if Path(words[0]).name == "shortstack":
        if words[1].startswith("-"):
            return None
        module, _, attribute = COMMANDS[words[1]][0].partition(":")
        return getattr(importlib.import_module(module), attribute), words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith("shortstack."):
        is_package = (REPOSITORY / Path(*words[2].split(".")[1:])).is_dir()
        name = f"{words[2]}.__main__" if is_package else words[2]
        found = [
            value
            for value in vars(importlib.import_module(name)).values()
            if isinstance(value, click.Command) and getattr(value.callback, "__module__", "") == name
        ]
        assert len(found) <= 1
        return (found[0], words[3:]) if found else None
    return None


def check(command: click.Command, arguments: list[str]) -> None:
    """Raises a click exception where an option does not exist, lacks its value, or has one that it does not take."""
    context = click.Context(command, info_name=command.name)
    if "--help" in arguments:
        return
    values, extra, _ = command.make_parser(context).parse_args(list(arguments))
    assert not extra, f"too many arguments: {extra}"
    for parameter in command.get_params(context):
        value = values.get(parameter.name) if parameter.name else None
        if parameter.required:
            assert isinstance(value, (str, list, tuple)) and value, f"{parameter.name} is missing"  # noqa: PT018
        if isinstance(value, (str, list, tuple)) and not isinstance(parameter.type, click.Path):
            for item in [value] if isinstance(value, str) else value:
                parameter.type.convert(item, parameter, context)


def test_there_are_commands_to_check() -> None:
    assert len(LINES) > 40
    assert {page for page, _ in LINES} >= {"README.md", "docs/faq.md", "docs/training.md", "samples/recipes/README.md"}


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}:{index}" for index, (page, _) in enumerate(LINES)])
def test_every_command_line_is_one_that_the_commands_take(page: str, line: str) -> None:
    words = split_command(line)
    found = command_of(words)
    if found is not None:
        check(*found)
    elif words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert words[1] in targets
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (REPOSITORY / words[1]).is_file()


@pytest.mark.parametrize(
    "line",
    [
        "shortstack generate out/ hi --no-such",
        "shortstack generate out/",
        "shortstack export a b --dtype x",
        "python -m shortstack.samples.recipes.new_model folder",
    ],
)
def test_a_command_line_that_is_wrong_is_found(line: str) -> None:
    found = command_of(split_command(line))
    assert found is not None
    with pytest.raises((click.ClickException, AssertionError)):
        check(*found)


BLOCKS = [(name_of(page), block) for page in PAGES for block in page.blocks if block.language == "python"]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}:{block.line}" for page, block in BLOCKS])
def test_python_blocks_import_names_that_exist(page: str, block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"
