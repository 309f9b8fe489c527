"""Reads prompts to calibrate on, from a file with one JSON object per line.

============================================  ========================================================================
line                                          prompt
============================================  ========================================================================
``{"prompt": "Why is the sky blue?"}``        the question, through the bundle's chat template, as in ``generate``
``{"messages": [{"role", "content"}, ...]}``  the conversation up to its last answer, through the chat template
``{"text": "Once upon a time"}``              the text as it is, to be continued
============================================  ========================================================================

Without a chat template a question is used as it is, and the contents of a conversation are joined by line breaks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.graphs.errors import RequestError
from shortstack.graphs.read_file import parse_json, read_text
from shortstack.runtime.text.tokenizer import Tokenizer

_EXPECTED = '"prompt" or "text" (strings), or "messages" (a list of {"role", "content"}), not all from the assistant'
_SEED = 0


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a file, encoded for one bundle.

    Attributes:
        ids: Token ids of each prompt, in the file's order.
        too_long: How many prompts were left out because the bundle's context has no room for a token after them.
    """

    ids: tuple[tuple[int, ...], ...]
    too_long: int


def read_prompts(
    path: Path,
    tokenizer: Tokenizer,
    max_length: int,
    limit: int | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> Prompts:
    """Read a file of prompts.

    Args:
        path: The file.
        tokenizer: The bundle's tokenizer.
        max_length: Positions of the bundle's context.
        limit: The most prompts to use. They are drawn at random with a fixed seed; None: all.
        template_variables: Further variables of the chat template.

    Raises:
        RequestError: The file cannot be read, a line is not a prompt (the message names the line), or no prompt fits.
    """
    content = read_text(path, RequestError, "give a UTF-8 jsonl file", called=f"--data {path}")
    prompts = [ids for ids in _encoded(content, path, tokenizer, template_variables) if ids]
    fitting = [ids for ids in prompts if len(ids) < max_length]
    if not fitting:
        raise RequestError(
            f"--data {path} has no prompt that fits into the bundle's context of {max_length} tokens",
            found=f"{len(prompts)} prompts",
            remedy="give prompts like those of later use, one JSON object per line",
        )
    if limit is not None and limit < len(fitting):
        chosen = sorted(random.Random(_SEED).sample(range(len(fitting)), limit))
        return Prompts(tuple(fitting[index] for index in chosen), len(prompts) - len(fitting))
    return Prompts(tuple(fitting), len(prompts) - len(fitting))


def _encoded(
    content: str, path: Path, tokenizer: Tokenizer, variables: Mapping[str, Any] | None
) -> Iterator[tuple[int, ...]]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"--data {path}, line {number}"
            encode = _parse_line(line, where, variables)
            try:
                ids = encode(tokenizer)
            except RequestError as error:  # the chat template refused the conversation
                raise RequestError(f"{where}: {error}") from None
            yield tuple(ids)


def _parse_line(line: str, where: str, variables: Mapping[str, Any] | None) -> Callable[[Tokenizer], list[int]]:
    """Return a function that encodes the prompt of a line."""
    entry = parse_json(line, where, RequestError, f"write an object with {_EXPECTED}")
    if isinstance(entry, dict):
        if isinstance(text := entry.get("text"), str):
            return lambda tokenizer: tokenizer.encode(text)
        if isinstance(prompt := entry.get("prompt"), str):
            return lambda tokenizer: _encode_chat(tokenizer, [{"role": "user", "content": prompt}], variables)
        if isinstance(messages := entry.get("messages"), list) and all(map(_is_message, messages)):
            asked = messages[: _behind_last_question(messages)]
            if asked:
                return lambda tokenizer: _encode_chat(tokenizer, asked, variables)
    raise RequestError(where, found=repr(line[:60]), expected=f"an object with {_EXPECTED}")


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )  # fmt: skip


def _behind_last_question(messages: list[dict[str, str]]) -> int:
    """Return how many messages there are up to the last one that is not the assistant's."""
    return next((n for n in range(len(messages), 0, -1) if messages[n - 1]["role"] != "assistant"), 0)


def _encode_chat(
    tokenizer: Tokenizer, messages: list[dict[str, str]], variables: Mapping[str, Any] | None
) -> list[int]:
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat(messages, variables=variables)
    return tokenizer.encode("\n".join(message["content"] for message in messages))
