"""What click says about a command line that is not valid, as every other error: one line, with what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import click


def usage_line(error: click.ClickException) -> str:
    """Return the message of a usage error on one line, with the nearest valid word and the command that lists them."""
    message = " ".join(error.format_message().split())
    message = re.sub(r"\(Did you mean one of: (.*?)\?\)", r"Did you mean one of \1?", message)
    message = message[:1].lower() + message[1:]
    if "Did you mean" not in message:
        message = _with_nearest(error, message)
    if message.endswith(("?", "...")):
        return message
    message, ctx = message.removesuffix("."), getattr(error, "ctx", None)
    if ctx is None:
        return f"{message}."
    return f"{message}. `{ctx.command_path} --help` shows what is valid."


def _with_nearest(error: click.ClickException, message: str) -> str:
    """Return the message with a question for the valid word nearest to the one that was given, if there is one."""
    found = re.search(r"'([^']*)'(?: is not one of|\.?$)", error.format_message())
    near = difflib.get_close_matches(found[1], _valid_words(error), n=1) if found else []
    return f"{message.removesuffix('.')}. Did you mean {near[0]}?" if near else message


def _valid_words(error: click.ClickException) -> Sequence[str]:
    ctx, param = getattr(error, "ctx", None), getattr(error, "param", None)
    if param is not None and isinstance(param.type, click.Choice):
        return [str(choice) for choice in param.type.choices]
    if ctx is not None and isinstance(ctx.command, click.Group):
        return ctx.command.list_commands(ctx)
    return ()
