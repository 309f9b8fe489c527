"""The PROMPT of `shortstack generate`, from the command line or standard input; hints for what shells make of it."""

from __future__ import annotations

import sys
from typing import Any

import click

from shortstack.command_options import Command
from shortstack.graphs.errors import RequestError

_QUOTE = "put the prompt in quotes: shortstack generate BUNDLE 'Why is the sky blue?'"
_DASHES = "write -- before a prompt that begins with -: shortstack generate BUNDLE -- '- one'"


class PromptCommand(Command):
    """A command that takes BUNDLE and PROMPT, and says what to do where the prompt is missing or fell into words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            RequestError: There is no prompt, or more than one word of it stands without quotes.
        """
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if any(word.startswith(error.option_name) and " " in word for word in given):
                raise RequestError(f"no such option: {error.option_name}", remedy=_DASHES) from error
            raise
        except click.MissingParameter as error:
            if error.param is not None and error.param.name == "prompt":
                raise RequestError("the prompt is missing", remedy=f"{_QUOTE}, or write - to read it") from error
            raise
        except click.UsageError as error:
            if "extra argument" in error.message:
                raise RequestError(f"more than one prompt. {error.message.rstrip('.')}", remedy=_QUOTE) from error
            raise


def read_prompt(prompt: str) -> str:
    """Return the prompt; ``-`` stands for all of standard input.

    Raises:
        RequestError: Standard input is closed or is not text.
    """
    if prompt != "-":
        return prompt
    stdin: Any = sys.stdin
    if stdin is None or stdin.closed:
        raise RequestError("the prompt - is standard input, which is closed", remedy=_QUOTE)
    if stdin.isatty():
        click.echo("reading the prompt from the terminal; end it with Ctrl-D on a line of its own", err=True)
    try:
        text: str = stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError("standard input is not UTF-8", found=f"byte {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise RequestError(f"standard input cannot be read: {error}", remedy=_QUOTE) from None
    return text
