"""Runs chat templates, which are foreign code, within bounds of time and size.

jinja2's immutable sandbox keeps a template from the objects of this process, but not from its time and memory:
``{{ 'x' * 10**10 }}`` or two loops over ``range(99999)`` would end it. So here

- operators, calls and filters that make long texts look at the sizes first,
- what is converted to text is measured first: lists that hold each other grow twofold with each step,
- and every line of a template, and of jinja2 itself, looks at the clock now and then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

MOST_CHARACTERS = 1 << 24
"""Of a rendered chat, and of every text on the way: as many as the longest context has tokens."""

MOST_ITEMS = 1_000_000
"""Of lists that are converted to text, those inside them included, and of numbers that say a width or a count."""

TIME_LIMIT_S = 10.0
"""Of one rendering, in processor time of its thread. Templates of real models take milliseconds."""

_MOST_BITS = 1 << 16
_LINES_BETWEEN_LOOKS = 256
_TO_TEXT = ("tojson", "string", "join", "pprint", "format", "escape", "e", "safe", "forceescape", "xmlattr", "urlize")
_HOME = os.path.dirname(jinja2.__file__)
_TEMPLATE = "<template>"


class TemplateLimitError(Exception):
    """A template wants more time or memory than a chat needs."""


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for (transformers.utils.chat_template_utils), with bounds."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            finalize=_measured,
        )
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = _bounded_filter("tojson", _tojson)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]  # made-up text has no place in a chat

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Apply a binary operator, unless the result would be too large."""
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2's
        """Call a function or a method, unless its arguments ask for too large a result."""
        _check_numbers((*args, *kwargs.values()))
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            _check_text_method(owner, name, args)
        return super().call(__context, __obj, *args, **kwargs)

    def from_string(self, *args: Any, **kwargs: Any) -> jinja2.Template:
        """Compile a template whose ``~`` looks at the sizes, too."""
        template = super().from_string(*args, **kwargs)
        functions: dict[str, Any] = template.root_render_func.__globals__
        functions |= {"str_join": _bounded_join, "markup_join": _bounded_join}
        return template


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Render a template within the bounds.

    Raises:
        TemplateLimitError: It takes too long, or makes too long a text.
        Exception: Whatever the template raises.
    """
    pieces: list[str] = []
    length = 0
    with _clock():
        for piece in template.generate(**variables):
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise TemplateLimitError(f"it writes more than {MOST_CHARACTERS} characters")
            pieces.append(piece)
    return "".join(pieces)


@contextmanager
def _clock() -> Iterator[None]:
    """Raise in the code of templates and of jinja2 when the time is over; other code is not looked at."""
    end_s = time.thread_time() + TIME_LIMIT_S
    lines = 0

    def look(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += 1
        if lines % _LINES_BETWEEN_LOOKS == 0 and time.thread_time() > end_s:
            raise TemplateLimitError(f"it takes longer than {TIME_LIMIT_S:g} seconds")
        return look

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        file = frame.f_code.co_filename
        return look(frame, event, argument) if file == _TEMPLATE or file.startswith(_HOME) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        _limit(abs(left).bit_length() * max(right, 0), _MOST_BITS, "a power")
    elif operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(text, str | list | tuple):
                _limit(len(text) * times, MOST_CHARACTERS if isinstance(text, str) else MOST_ITEMS, "a repetition")
        if isinstance(left, int) and isinstance(right, int):
            _limit(left.bit_length() + right.bit_length(), _MOST_BITS, "a product")
    elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _limit(len(left) + len(right), MOST_CHARACTERS if isinstance(left, str) else MOST_ITEMS, "a sum")
    elif operator == "%" and isinstance(left, str):
        _check_widths(left)
        _measured(right)


def _check_text_method(text: str, name: str, arguments: tuple[Any, ...]) -> None:
    if name in ("format", "format_map"):
        _check_widths(text)
        for argument in arguments:
            _measured(argument)
    elif name == "replace" and len(arguments) >= 2 and isinstance(arguments[0], str) and isinstance(arguments[1], str):
        _limit(text.count(arguments[0]) * len(arguments[1]), MOST_CHARACTERS, "a replacement")
    elif name == "join" and arguments:
        _limit(len(text) * _size(arguments[0]), MOST_CHARACTERS * 8, "a joined text")
        _measured(arguments[0])


def _check_widths(pattern: str) -> None:
    """Refuse a format whose widths are long numbers, or come from elsewhere."""
    digits = 0
    for character in pattern:
        digits = digits + 1 if character.isdigit() else 0
        if digits > 5:
            raise TemplateLimitError("a format asks for a width of more than 5 digits")


def _check_numbers(arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > MOST_ITEMS:
            raise TemplateLimitError(f"an argument is a number above {MOST_ITEMS}")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that looks at its arguments first; what jinja2 passes to it beforehand stays."""

    def bounded(*arguments: Any, **named: Any) -> Any:
        given = (*arguments, *named.values())
        _check_numbers(given)
        texts = [argument for argument in given if isinstance(argument, str)]
        if name == "format" and texts:
            _check_widths(texts[0])
        if name in _TO_TEXT:
            for argument in given:
                if isinstance(argument, str | list | tuple | dict):
                    _measured(argument)
        elif name == "replace" and len(texts) >= 3:
            _check_text_method(texts[0], "replace", (texts[1], texts[2]))
        return function(*arguments, **named)

    for attribute in ("jinja_pass_arg", "jinja_async_variant", "__name__", "__doc__"):
        if hasattr(function, attribute):
            setattr(bounded, attribute, getattr(function, attribute))
    return bounded


def _bounded_join(parts: Any) -> str:
    found = [str(_measured(part)) for part in parts]
    _limit(sum(map(len, found)), MOST_CHARACTERS, "a joined text")
    return "".join(found)


def _measured(value: Any) -> Any:
    """Return a value that will become text, unless there is too much of it."""
    if isinstance(value, list | tuple | dict):
        left = MOST_ITEMS
        waiting: list[Any] = [value]
        while waiting:
            left -= 1
            if left < 0:
                raise TemplateLimitError(f"more than {MOST_ITEMS} items become text")
            item = waiting.pop()
            if isinstance(item, dict):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                waiting += item
            elif isinstance(item, str):
                left -= len(item) // 64
    return value


def _size(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _limit(size: int, most: int, what: str) -> None:
    if size > most:
        raise TemplateLimitError(f"{what} would be larger than {most}")


class _GenerationBlock(jinja2.ext.Extension):
    """Renders the body of ``{% generation %}...{% endgeneration %}``, which only marks targets for training."""

    tags = {"generation"}  # noqa: RUF012 - overrides jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
