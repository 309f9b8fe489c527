"""What the commands share: options by group in ``--help``, options of the machine, environment variables.

A command that is a :class:`Command` lists its options under the titles that :func:`option_group` or :func:`gather`
gave them, checks its paths before it runs (:mod:`shortstack.command_paths`), and names the environment variable where
an error is about a value that came from one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from shortstack.command_paths import check_paths
from shortstack.graphs.errors import RequestError

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

_OPTION_WIDTH = 30  # of the column of options at most, as in click

# variable -> what it sets. `shortstack --help` prints them, and a test checks that each is in use.
ENVIRONMENT = {
    "SHORTSTACK_THREADS": "Sets --threads where a command has it.",
    "SHORTSTACK_PROVIDER": "Sets --provider where a command has it; several with spaces between them: 'cuda cpu'.",
    "SHORTSTACK_LOG": "Sets --log-level: debug, info or warning.",
    "SHORTSTACK_DEBUG": "Sets --debug: 1.",
    "SHORTSTACK_CACHE": "Folder of the model that the samples fetch.  [default: ~/.cache/shortstack]",
}


class Command(click.Command):
    """A click command with groups of options in its help, and errors that say what to run."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Return what asks for help, as in the group: click keeps a command's --help as it first was, whoever asked."""
        return ["-h", "--help"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by group, in the order in which the groups appear; those without a group come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "help_group", "Options"), []).append(record)
        width = max(len(flags) for records in groups.values() for flags, _ in records)
        width = min(width, _OPTION_WIDTH)
        for title in sorted(groups, key=lambda title: title == "Options"):
            first, *rest = groups[title]
            padded = first[0] + " " * (width - len(first[0]))  # so that all groups have the same columns
            with formatter.section(title):
                formatter.write_dl([(padded, first[1]), *rest], col_max=_OPTION_WIDTH)

    def invoke(self, ctx: click.Context) -> Any:
        """Check the paths, then run the command."""
        check_paths(ctx)
        try:
            return super().invoke(ctx)
        except RequestError as error:
            if variable := _variable_of(ctx, str(error)):
                raise RequestError(f"{str(error).rstrip('.')} (the value is from {variable})") from error
            raise


def _variable_of(context: click.Context, message: str) -> str | None:
    """Return the environment variable whose value a message is about, if there is one."""
    for option in context.command.params:
        if context.get_parameter_source(option.name) is ParameterSource.ENVIRONMENT:
            word = max(option.opts, key=len).lstrip("-")
            value = context.params[option.name]
            values = value if isinstance(value, tuple) else (value,)
            if message.startswith(word) and any(str(each).lower() in message.lower() for each in values):
                return str(option.envvar)
    return None


def option_group(title: str, *options: Decorator) -> Decorator:
    """Return a decorator that adds options to a command, under one title in its help."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
            function.__click_params__[-1].help_group = title  # type: ignore[attr-defined]
        return function

    return decorate


def gather(group: type, keyword: str, *options: Decorator, title: str = "Options") -> Decorator:
    """Return a decorator that adds options to a command and hands them over as one value of a dataclass.

    Args:
        group: The dataclass; its fields are the names of the options.
        keyword: The command's parameter that receives the value.
        options: The options.
        title: Their title in the help.
    """
    names = [field.name for field in fields(group)]

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def gathered(**values: Any) -> Any:
            value = group(**{name: values.pop(name) for name in names})
            return function(**values, **{keyword: value})

        return option_group(title, *options)(gathered)

    return decorate


def given_flags(names: Iterable[str]) -> dict[str, str]:
    """Return the flags of those options that the command line gave, by the names of their values.

    Args:
        names: The names to look for.
    """
    context = click.get_current_context()
    flags = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    return {name: flags[name] for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def refuse_given(names: tuple[str, ...], reason: str, remedy: str) -> None:
    """Refuse options that would do nothing, if the command line gave them.

    Args:
        names: The names of the options' values.
        reason: Why they would do nothing.
        remedy: What to do instead.

    Raises:
        RequestError: At least one was given; names all of them.
    """
    if listed := ", ".join(given_flags(names).values()):
        raise RequestError(f"{listed} would have no effect: {reason}", remedy=remedy)


provider_option = click.option(
    "--provider",
    "providers",
    multiple=True,
    envvar="SHORTSTACK_PROVIDER",
    show_envvar=True,
    show_default="cpu",
    help="Execution provider: cpu, cuda, or onnxruntime's name; may be given more than once.",
)
follow_links_option = click.option(
    "--follow-links",
    is_flag=True,
    help="Read files of CHECKPOINT that are links out of its folder. Those of the hub's cache always are read.",
)
allow_pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Where CHECKPOINT has no safetensors, which are the better way, read the tensors of pytorch_model.bin or "
    "another file of torch.save. Code in it is never run.",
)

genai_option = click.option(
    "--genai",
    is_flag=True,
    help="Also write model.onnx, the uncut model, and genai_config.json, with which onnxruntime-genai runs it from the "
    "same weights.",
)

threads_option = click.option(
    "--threads",
    type=int,
    envvar="SHORTSTACK_THREADS",
    show_envvar=True,
    show_default="all usable cores",
    help="Threads that compute.",
)
