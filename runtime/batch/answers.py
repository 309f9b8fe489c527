"""The file of answers: one JSON object per line, written as they come, and read again to go on after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shortstack.graphs.errors import RequestError
from shortstack.graphs.read_file import parse_json
from shortstack.runtime.batch.lines import Line
from shortstack.runtime.result import Result

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BEGINS = b'{"id": '
_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}  # OpenAI's names


def answer(line: Line, digest: str, result: Result) -> dict[str, Any]:
    """Return what is written for a generation that finished or failed; ``digest`` is that of :func:`digest_of`."""
    if result.error is not None:
        return failure(line, result.error)
    text, tokens, reason, stats = result.text, result.tokens, result.finish_reason, result.stats
    if not line.is_openai:
        # Nothing that depends on the machine or on who else was served: a line is the same whenever it is written.
        return {
            "id": line.id,
            "text": text,
            "finish_reason": reason,
            "prompt_tokens": stats.prompt,
            "tokens": list(tokens),
            "request": digest,
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
        "system_fingerprint": digest,
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


@contextmanager
def open_answers(path: Path, *, overwrite: bool) -> Iterator[tuple[IO[bytes], dict[str, str | None]]]:
    """Open a file to append answers to; nobody else can meanwhile.

    A last line that was cut off, and failures, are removed: both are tried again.

    Args:
        path: The file.
        overwrite: Begin it anew.

    Yields:
        The file, and the digests of the requests that it has answers to, by id.

    Raises:
        RequestError: It cannot be read or written, holds something else, or another batch is writing it.
    """
    path = path.resolve()
    try:
        with _locked(path) as file:
            content = b"" if overwrite or not path.is_file() else path.read_bytes()
            found, kept = _answers(path, content)
            if overwrite and path.is_file():
                file.truncate(0)
            if kept == content or not content:
                yield file, found
                return
            part = path.with_name(f".{path.name}.partial-{os.getpid()}")
            try:
                part.write_bytes(kept)
                shutil.copymode(path, part)
                with _locked(part) as other:
                    part.replace(path)
                    yield other, found
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror})", remedy="choose another file") from None


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    with path.open("ab", buffering=0) as file:
        if fcntl is not None and path.is_file():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RequestError(
                    f"another batch is writing {path}", remedy="wait for it, or choose another file"
                ) from None
        yield file


def _answers(path: Path, content: bytes) -> tuple[dict[str, str | None], bytes]:
    """Return the digests of answered requests by id, and the lines that are to stay."""
    remedy = "choose another file for the answers, or remove this one"
    whole = content.rfind(b"\n") + 1
    if not (content[whole:].startswith(_BEGINS) or _BEGINS.startswith(content[whole:])):
        raise RequestError(
            f"{path} holds something other than answers", found=repr(content[whole:])[:60], remedy=remedy
        )
    found: dict[str, str | None] = {}
    kept: list[bytes] = []
    for number, text in enumerate(content[:whole].splitlines(), 1):
        where = f"{path}, line {number}"
        entry = parse_json(text.decode("utf-8", "replace"), where, RequestError, remedy)
        if not isinstance(entry, dict) or not _is_answer(entry):
            raise RequestError(f"{where} is not an answer", found=repr(text[:60]), expected="an id", remedy=remedy)
        if is_failure(entry):
            continue
        found[str(id_of(entry))] = request_of(entry)
        kept.append(text + b"\n")
    return found, b"".join(kept)


def _is_answer(entry: dict[str, Any]) -> bool:
    is_ours = {"text", "finish_reason"} <= entry.keys() or entry.keys() == {"id", "error"}
    is_openai = {"custom_id", "response"} <= entry.keys()
    return "id" in entry and isinstance(id_of(entry), str) and (is_ours or is_openai)


def id_of(entry: Mapping[str, Any]) -> Any:
    """Return the id of the line that was answered."""
    return entry.get("custom_id", entry["id"])


def is_failure(entry: Mapping[str, Any]) -> bool:
    """Return whether an answer says why there is none."""
    response = entry.get("response")
    return bool(entry.get("error")) or (isinstance(response, dict) and response.get("status_code") != 200)


def request_of(entry: Mapping[str, Any]) -> str | None:
    """Return the digest of the request that was answered (:func:`digest_of`); None where the answer has none."""
    response = entry.get("response")
    body = response.get("body", {}) if isinstance(response, dict) else entry
    digest: str | None = body.get("system_fingerprint", entry.get("request"))
    return digest


def digest_of(line: Line, weights_sha256: str) -> str:
    """Return what tells one request of one model from another: the first digits of a hash."""
    content = repr((line.request, weights_sha256)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()[:16]


def write(file: IO[bytes], entry: dict[str, Any]) -> None:
    """Append one answer in one write, so that a stop cuts off one line at most."""
    file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
