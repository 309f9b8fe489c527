"""The file of answers: one JSON object per line, written as they come, and read again to go on after a stop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shortstack.graphs.errors import RequestError
from shortstack.graphs.read_file import parse_json
from shortstack.runtime.batch.lines import Line
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.decode.stream import FinishReason

_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}  # OpenAI's names


def answer(line: Line, text: str, tokens: tuple[int, ...], reason: FinishReason, stats: Stats) -> dict[str, Any]:
    """Return what is written for a finished generation."""
    if not line.is_openai:
        # Nothing that depends on the machine or on who else was served: a line is the same whenever it is written.
        return {
            "id": line.id,
            "text": text,
            "finish_reason": reason,
            "prompt_tokens": stats.prompt,
            "tokens": list(tokens),
        }
    usage = {"prompt_tokens": stats.prompt, "completion_tokens": len(tokens)}
    usage["total_tokens"] = sum(usage.values())
    if stats.reused:
        usage["prompt_tokens_details"] = {"cached_tokens": stats.reused}  # type: ignore[assignment]
    is_chat = line.url.endswith("chat/completions")
    said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{line.id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": line.model,
        "choices": [{"index": 0, **said, "finish_reason": _FINISH.get(reason, reason)}],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": line.id, "body": body}
    return {"id": f"batch-{line.id}", "custom_id": line.id, "response": response, "error": None}


def failure(line: Line, error: Exception) -> dict[str, Any]:
    """Return what is written for a request that failed."""
    if not line.is_openai:
        return {"id": line.id, "error": str(error)}
    code = 400 if isinstance(error, RequestError) else 500
    kind = "invalid_request_error" if code == 400 else "server_error"
    body = {"error": {"message": str(error), "type": kind, "param": None, "code": None}}
    response = {"status_code": code, "request_id": line.id, "body": body}
    return {"id": f"batch-{line.id}", "custom_id": line.id, "response": response, "error": None}


def answered(path: Path) -> set[str]:
    """Return the ids that a file of answers has already, without failures; a last line that was cut off is removed.

    Raises:
        RequestError: The file cannot be read, or holds something else.
    """
    if not path.exists() or not path.is_file():
        return set()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror})", remedy="choose another file") from None
    whole = content.rfind(b"\n") + 1
    found: set[str] = set()
    kept: list[bytes] = []
    for number, text in enumerate(content[:whole].splitlines(), 1):
        where = f"{path}, line {number}"
        remedy = "choose another file for the answers, or remove this one"
        entry = parse_json(text.decode("utf-8", "replace"), where, RequestError, remedy)
        id_ = entry.get("custom_id", entry.get("id")) if isinstance(entry, dict) else None
        if not isinstance(id_, str):
            raise RequestError(f"{where} is not an answer", found=repr(text[:60]), expected="an id", remedy=remedy)
        if not _failed(entry):
            found.add(id_)
            kept.append(text)
    if whole < len(content) or len(kept) < content[:whole].count(b"\n"):  # what failed is tried again
        part = path.with_name(f".{path.name}.partial-{os.getpid()}")
        part.write_bytes(b"".join(line + b"\n" for line in kept))
        part.replace(path)
    return found


def _failed(entry: dict[str, Any]) -> bool:
    response = entry.get("response")
    return bool(entry.get("error")) or (isinstance(response, dict) and response.get("status_code") != 200)


@contextmanager
def open_answers(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to append answers to.

    Raises:
        RequestError: It cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            yield file
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror})", remedy="choose another file") from None


def write(file: IO[bytes], entry: dict[str, Any]) -> None:
    """Append one answer in one write, so that a stop cuts off one line at most."""
    file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
