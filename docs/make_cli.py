"""Writes docs/cli.md from the commands' own help: ``python docs/make_cli.py``.

What stands above the first command is written by hand and kept as it is. The width is fixed here, so the page does not
depend on the terminal.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from shortstack.__main__ import COMMANDS, cli

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
BEGINNING = "<!-- made by docs/make_cli.py from here on: change the commands instead -->"


def page(text: str) -> str:
    """Return the page with everything below its hand-written part made anew.

    Args:
        text: The page as it is.
    """
    by_hand = text.partition(BEGINNING)[0].rstrip()
    root = _context(cli, None, "shortstack")
    parts = [by_hand, BEGINNING, "## shortstack", _block(cli.get_help(root))]
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        parts += [f"## shortstack {name}", _block(command.get_help(_context(command, root, name)))]
    return "\n\n".join(parts) + "\n"


def _context(command: click.Command, parent: click.Context | None, name: str) -> click.Context:
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, info_name=name, parent=parent, **settings)


def _block(help_text: str) -> str:
    lines = (line.rstrip() for line in help_text.rstrip().splitlines())
    return "\n".join(["```", *lines, "```"])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stderr.write(f"wrote {PAGE}\n")
