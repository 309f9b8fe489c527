"""How the commands of the samples end: a known error is one line and its exit code, as in ``shortstack`` itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click

from shortstack.graphs.errors import INTERRUPTED, ShortstackError
from shortstack.usage_errors import usage_line


@contextlib.contextmanager
def command_errors(when_interrupted: str = "") -> Iterator[None]:
    """Turn a known error into one line on stderr and its exit code.

    Args:
        when_interrupted: What to say on stderr when the command is interrupted.
    """
    try:
        yield
    except ShortstackError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        click.echo(f"error: {usage_line(error)}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo(when_interrupted or "interrupted", err=True)
        sys.exit(INTERRUPTED)


def run_command(command: click.Command, *, when_interrupted: str = "") -> None:
    """Run a command on the command line's arguments; it ends as :func:`command_errors` says."""
    with command_errors(when_interrupted):
        command.main(standalone_mode=False)
