"""Texts to calibrate on and to judge by: plain text or jsonl in, equally long rows of token ids out.

Of a ``.jsonl`` file each line is an object with ``text`` (a string) or ``messages`` (a conversation, which goes through
the bundle's chat template; without one, the contents are joined). Any other file is plain UTF-8 text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import BundleError, RequestError
from shortstack.graphs.genai_config import TextEnds
from shortstack.graphs.read_file import parse_json, read_json_object, read_text
from shortstack.quant.spec import Quantization
from shortstack.runtime.text.tokenizer import Tokenizer

_ROW_TOKENS = 256
_FEWEST_TOKENS = 32

_PROMPT_TOKENS = 32

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReportTexts:
    """What two bundles are compared on, as token ids.

    Attributes:
        heldout: Rows of text that calibration did not see, int64 [texts, seq].
        prompts: Beginnings of texts to continue greedily, from the same file.
    """

    heldout: Rows
    prompts: tuple[tuple[int, ...], ...]


def row_length(max_length: int) -> int:
    """Return how long rows of text are, for a bundle whose context has so many tokens."""
    return min(_ROW_TOKENS, max_length)


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """Return the tokenizer of a bundle."""
    return Tokenizer.load(bundle.folder, bundle.manifest.files)


def text_ends(bundle: Bundle) -> TextEnds:
    """Return the tokens around a text, as the runtime has them.

    Raises:
        BundleError: A text file is malformed.
    """
    tokenizer, name = open_tokenizer(bundle), names.GENERATION_CONFIG_FILE
    is_there = name in bundle.manifest.files
    sampling = read_json_object(bundle.folder / name, BundleError, "copy the bundle again") if is_there else {}
    return TextEnds(tokenizer.eos_token_ids, tokenizer.bos_token_id, sampling)


def tokenizer_of(files: Mapping[str, bytes]) -> Tokenizer:
    """Return the tokenizer of a bundle that is not written yet, from the content of its files by name."""
    with tempfile.TemporaryDirectory(prefix="shortstack-") as name:
        for file in names.TEXT_FILES:
            if file in files:
                (Path(name) / file).write_bytes(files[file])
        return Tokenizer.load(Path(name))


def check_text(path: Path, option: str) -> None:
    """Check that a file holds a text, before a tokenizer is there to read it; errors as in read_rows."""
    next(_texts(path, option), None)


def calibration_rows(wanted: Quantization, tokenizer: Tokenizer, max_length: int) -> Rows:
    """Return the calibration text in rows that fit a context of ``max_length`` tokens; errors as in read_rows."""
    tokens = wanted.calibration_tokens
    return read_rows(wanted.calibration, "--calibration", tokenizer, tokens, row_length(max_length))


def read_prompts(path: Path, option: str, tokenizer: Tokenizer, count: int) -> tuple[tuple[int, ...], ...]:
    """Return prompts from a file: the first turns of its conversations, or the first tokens of its texts."""
    prompts: list[tuple[int, ...]] = []
    for text in _texts(path, option):
        if isinstance(text, str):
            ids = tokenizer.encode(text)[:_PROMPT_TOKENS]
        elif tokenizer.has_chat_template:
            ids = tokenizer.encode_chat(text[:1])
        else:
            ids = tokenizer.encode(text[0]["content"])
        if ids:
            prompts.append(tuple(ids))
        if len(prompts) == count:
            break
    return tuple(prompts)


def read_rows(path: Path, option: str, tokenizer: Tokenizer, tokens: int, row_tokens: int = _ROW_TOKENS) -> Rows:
    """Return the beginning of a file as rows of token ids, int64 [rows, row_tokens]; an incomplete last row is dropped.

    A text shorter than one row makes one row of its own length.

    Args:
        path: The file.
        option: What the command line calls it, for messages.
        tokenizer: The bundle's.
        tokens: How many token ids to take at most.
        row_tokens: Length of a row.

    Raises:
        RequestError: It cannot be read, is empty, or holds too little.
    """
    ids: list[int] = []
    for text in _texts(path, option):
        ids += tokenizer.encode(text) if isinstance(text, str) else _encode_chat(tokenizer, text)
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    if len(ids) < _FEWEST_TOKENS:
        raise RequestError(
            f"{option} {path} is too short",
            found=f"{len(ids)} tokens",
            expected=f"at least {_FEWEST_TOKENS}, better some thousands",
            remedy="give a longer text of the kind that the model will write",
        )
    width = min(row_tokens, len(ids))
    return np.array(ids[: len(ids) // width * width], np.int64).reshape(-1, width)


def _texts(path: Path, option: str) -> Iterator[str | list[dict[str, str]]]:
    content = read_text(path, RequestError, "give a UTF-8 text or jsonl file", called=f"{option} {path}")
    if not content.strip():
        raise RequestError(
            f"{option} {path} is empty", remedy="give some thousand words of the kind that the model will write"
        )
    if path.suffix != ".jsonl":
        yield from (paragraph + "\n\n" for paragraph in content.split("\n\n") if paragraph.strip())
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield _parse_line(line, f"{option} {path}, line {number}")


def _parse_line(line: str, where: str) -> str | list[dict[str, str]]:
    expected = 'an object with "text" (a string) or "messages" (a list of {"role", "content"})'
    entry = parse_json(line, where, RequestError, f"write {expected}")
    if isinstance(entry, dict):
        text, messages = entry.get("text"), entry.get("messages")
        if isinstance(text, str):
            return text
        if (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            )
        ):
            return messages
    raise RequestError(where, found=line[:60], expected=expected)


def _encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    if not tokenizer.has_chat_template:
        return tokenizer.encode("\n".join(m["content"] for m in messages) + "\n\n")
    return tokenizer.encode_chat(messages, add_generation_prompt=False)
