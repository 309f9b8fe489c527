"""Contents of chat messages as lists of parts, which other APIs know: ``[{"type": "text", "text": "Hi"}]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from shortstack.graphs.errors import RequestError

_TEXT_TYPES = ("text", "input_text", "output_text")
# What a template does with contents that are lists: it asks for their type, goes through them, or picks one. A question
# about something else, such as whether the arguments of a tool call are a string, says nothing about contents.
_KNOWS_PARTS = re.compile(
    r"""content['"\]\s]*\s(is|is\s+not)\s+(string|iterable|sequence|mapping)\b"""
    r"""|\bfor\s+\w+\s+in\s+[\w.\[\]'"]*content['"\]]*\s*(%\}|-%\}|if\b|\|)"""
    r"""|content['"\]]*\s*(\[0\]|\|\s*(selectattr|map)\b)"""
    r"""|(content|part|item|chunk|block)\w*(\[['"]type['"]\]|\.type)"""
)


def with_text_contents(messages: Sequence[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return chat messages whose contents are texts, unless the template itself knows parts.

    The texts of several parts become lines, as vLLM joins them for a template that knows texts only.

    Args:
        messages: The messages, as plain JSON data.
        template: The chat template.

    Raises:
        RequestError: A part is not text, or has none.
    """
    knows_parts = _KNOWS_PARTS.search(template) is not None
    return [_with_text(message, index, knows_parts) for index, message in enumerate(messages)]


def _with_text(message: dict[str, Any], index: int, knows_parts: bool) -> dict[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    texts = [_text(part, f"chat message {index}, part {number}") for number, part in enumerate(parts)]
    return message if knows_parts else {**message, "content": "\n".join(texts)}


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_TYPES:
        raise RequestError(
            f"{where} is not text",
            found=repr(kind if kind is not None else part),
            expected='{"type": "text", "text": ...}',
            remedy="leave out images, sounds and files: this model reads text",
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where} has no text", found=repr(part.get("text")), expected="a string under `text`")
    return str(part["text"])
