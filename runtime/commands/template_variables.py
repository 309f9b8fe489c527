"""The option ``--template-variable NAME=VALUE``: variables of the chat template, such as ``enable_thinking=false``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from shortstack.graphs.errors import RequestError
from shortstack.graphs.read_file import parse_json
from shortstack.runtime.text.tokenizer import Tokenizer

F = TypeVar("F", bound=Callable[..., Any])

OPTION = "--template-variable"
_OF_PYTHON = {"True": "true", "False": "false", "None": "null"}


def template_option(command: F) -> F:
    """Give a command the option; its parameter is ``template_variables``, a dict that is empty without it."""
    return click.option(
        OPTION,
        "template_variables",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_parse,
        help="A variable of the chat template, such as enable_thinking=false. VALUE is JSON or text; may be given more "
        "than once.",
    )(command)


def check_variables(variables: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Refuse variables that would have no effect.

    Raises:
        RequestError: There is no chat template, it is damaged, or it does not read one of them.
    """
    if not variables:
        return
    if not tokenizer.has_chat_template:
        raise RequestError(f"{OPTION} needs a chat template, and this bundle has none", remedy=f"drop {OPTION}")
    if idle := sorted(variables.keys() - tokenizer.template_variables):
        read = ", ".join(sorted(tokenizer.template_variables)) or "none"
        raise RequestError(
            f"{OPTION} {idle[0]} would have no effect: the chat template does not read it",
            remedy=f"leave it out; the template reads {read}" if read != "none" else "leave it out",
        )


def _parse(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not equals or not name.isidentifier():
            raise RequestError(OPTION, found=repr(each), expected="NAME=VALUE", remedy="such as enable_thinking=false")
        if name in variables:
            raise RequestError(f"{OPTION} {name} is given twice", remedy="give it once")
        if text in _OF_PYTHON:
            raise RequestError(f"{OPTION} {name}", found=text, expected=f"JSON, {_OF_PYTHON[text]}")
        variables[name] = _value(text, f"{OPTION} {name}")
    return variables


def _value(text: str, where: str) -> Any:
    """Return the value of a JSON text; what does not look like one is text itself."""
    if text[:1] in ("{", "[", '"'):
        return parse_json(text, where, RequestError, "mend the JSON, or give text that begins with another character")
    try:
        return json.loads(text)
    except ValueError:
        return text
