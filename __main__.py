"""The command line: a table of commands, each imported only when it is asked for.

``shortstack --help`` reads the table and nothing else, so it answers at once and works where neither onnxruntime nor
torch is installed. What a command does, and which options it takes, stands in the module that the table names.

The exit codes stand in :mod:`shortstack.graphs.errors`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import platform
import signal
import sys
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem

from shortstack import __version__
from shortstack.command_options import ENVIRONMENT
from shortstack.graphs.errors import INTERRUPTED, ShortstackError
from shortstack.log_level import LEVELS, show_log
from shortstack.missing import missing_dependency
from shortstack.usage_errors import usage_line

# command -> (module:attribute, summary). The attribute is a click.Command.
COMMANDS: dict[str, tuple[str, str]] = {
    "export": ("shortstack.export.cli:export", "Turn a checkpoint into a bundle of ONNX graphs cut at its exits."),
    "quantize": ("shortstack.quant.cli:quantize", "Shrink a bundle: int4 and int8 weights, fp16, int8 KV cache."),
    "parity": (
        "shortstack.export.parity.cli:parity",
        "Compare a bundle with the PyTorch model it was made from.",
    ),
    "inspect": (
        "shortstack.runtime.commands.inspect_bundle:inspect",
        "Print what a bundle holds: segments, KV owners, sizes.",
    ),
    "doctor": (
        "shortstack.runtime.commands.doctor:doctor",
        "Show what this machine has, and whether it verifies drafts exactly.",
    ),
    "calibrate": (
        "shortstack.runtime.commands.calibrate:calibrate",
        "Find a threshold for early exit with a guarantee.",
    ),
    "generate": (
        "shortstack.runtime.commands.generate:generate",
        "Decode plainly, self-speculatively or with early exit.",
    ),
    "batch": ("shortstack.runtime.commands.batch:batch", "Answer the prompts of a file, several at once."),
    "completion": ("shortstack.completion:completion", "Print the script that completes commands in a shell."),
}

# option of shortstack itself -> an example, for whoever writes it after the command
BEFORE_COMMAND = {"--log-level": "--log-level info", "--debug": "--debug"}

COMPLETION_VARIABLE = "_SHORTSTACK_COMPLETE"  # set by the script of `shortstack completion`, and read by click


class LazyGroup(click.Group):
    """A click group whose commands are the rows of ``COMMANDS``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the table, which is the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the one command that was asked for.

        Raises:
            DependencyError: its module needs a package that is not installed.
        """
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            explained = missing_dependency(f"shortstack {cmd_name}", error)
            if explained is None:
                raise
            raise explained from error
        assert isinstance(command, click.Command), f"{COMMANDS[cmd_name][0]} is not a click command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the summaries of the table, where click would import every command to ask for its own."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the environment variables."""
        with formatter.section("Environment variables"):
            formatter.write_dl(list(ENVIRONMENT.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes commands from the table, where click would import every one of them."""
        commands = [
            CompletionItem(name, help=summary) for name, (_, summary) in COMMANDS.items() if name.startswith(incomplete)
        ]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command; a package that it imports late and misses is reported like one that it imports first."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            explained = missing_dependency(f"shortstack {ctx.invoked_subcommand}", error)
            if explained is None:
                raise
            raise explained from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message=f"shortstack %(version)s (Python {platform.python_version()})")
@click.option(
    "--log-level",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="warning",
    envvar="SHORTSTACK_LOG",
    show_envvar=True,
    show_default=True,
    help="Log to stderr; info shows loads, growth of the cache, and drafting switched on and off.",
)
@click.option(
    "--debug", is_flag=True, envvar="SHORTSTACK_DEBUG", show_envvar=True, help="Show the traceback of an error."
)
@click.pass_context
def cli(ctx: click.Context, log_level: str, debug: bool) -> None:
    """Cut causal language models at their exits into ONNX graphs, and decode with them."""
    if isinstance(ctx.obj, dict):
        ctx.obj["debug"] = debug
    show_log(log_level)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; a command may return the code as an int.

    Args:
        arguments: What follows ``shortstack``; by default that of this process.
    """
    flags = {"debug": False}  # filled by `cli`, which alone parses options
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character gets a question mark
    try:
        result = cli.main(arguments, prog_name="shortstack", standalone_mode=False, obj=flags)
        if sys.stdout is not None:  # None: the caller closed it
            sys.stdout.flush()  # here, where a closed pipe can be caught, and not at exit
    except ShortstackError as error:
        if flags["debug"]:
            raise
        if os.environ.get(COMPLETION_VARIABLE):
            return error.exit_code  # whoever presses Tab has asked for no message
        message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        _say_error(message)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # the help, to whoever typed the bare name
        return error.exit_code
    except click.ClickException as error:
        _say_error(usage_line(_with_place(error)))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return INTERRUPTED
    except ImportError:
        if not _interrupts:  # a compiled module that is interrupted while it loads says this instead
            raise
        _say("interrupted")
        return INTERRUPTED
    except MemoryError:
        if flags["debug"]:
            raise
        _say_error("there is not enough memory for this; close other programs, or take a smaller model")
        return ShortstackError.exit_code
    except BrokenPipeError:
        # Python flushes stdout once more at exit, into a pipe that nobody reads: send that nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if flags["debug"]:
            raise
        _say_error(" ".join(str(error).split()))
        return ShortstackError.exit_code
    return result if isinstance(result, int) else 0


def _say_error(message: str) -> None:
    """Writes an error to stderr, in colour where that is a terminal and NO_COLOR (no-color.org) does not forbid it."""
    colour = False if os.environ.get("NO_COLOR") else None
    _say(f"{click.style('error:', fg='red', bold=True)} {message}", colour)


def _say(message: str, colour: bool | None = None) -> None:
    """Writes a line to stderr; where that is closed, nobody is to be told."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(message, err=True, color=colour)


def _with_place(error: click.ClickException) -> click.ClickException:
    """Returns the error; if an option of shortstack itself was written after a command, one that says where it goes."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None and error.ctx.command is not cli:
        example = BEFORE_COMMAND.get(error.option_name)
        if example is not None:
            place = f"shortstack {example} {error.ctx.command.name} ..."
            return click.UsageError(f"{error.message} It goes before the command: {place}", error.ctx)
    return error


def _open_closed_streams() -> None:
    """Gives the standard streams that the caller closed to nobody; else the next file that is opened would be one."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


_interrupts: list[int] = []  # the signals of Ctrl-C so far


def _interrupt(number: int, frame: object) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """Runs the console script ``shortstack``, and ``python -m shortstack``."""
    _open_closed_streams()
    # A polite kill unwinds like an exit, so that a half-written bundle is removed.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it is ignored, and stays so
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(run())


if __name__ == "__main__":
    main()
