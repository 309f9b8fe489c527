"""How the commands of the samples end: a known error is one line and its exit code, as in ``shortstack`` itself."""

from __future__ import annotations

import sys

import click

from shortstack.graphs.errors import INTERRUPTED, ShortstackError


def run_command(command: click.Command, *, when_interrupted: str = "") -> None:
    """Run a command on the command line's arguments.

    Args:
        command: The command.
        when_interrupted: What to say on stderr when it is interrupted.
    """
    try:
        command.main(standalone_mode=False)
    except ShortstackError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        if when_interrupted:
            click.echo(when_interrupted, err=True)
        sys.exit(INTERRUPTED)
