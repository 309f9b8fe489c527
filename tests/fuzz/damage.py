"""What is done to sound inputs: to bytes, to values of JSON files, to files as such. Every draw comes from ``rng``."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE_BYTES = 6 << 30
"""Size of a sparse file: more than may be read into memory, and nothing on the disk."""

_NUMBERS = (
    0,
    1,
    -1,
    -(2**31),
    2**31,
    2**63,
    10**9,
    10**30,
    0.0,
    -0.5,
    0.5,
    1e-300,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
)
_WORDS = (
    "",
    " ",
    "0",
    "-1",
    "null",
    "x" * 100_000,
    "../../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "\n",
)
_HOLDERS = ([], [[]], [None], [1, "a"], [0] * 10_000, {}, {"": None}, {"a": {"b": [1]}})
HOSTILE_VALUES: tuple[Any, ...] = (None, True, False, *_NUMBERS, *_WORDS, *_HOLDERS)
_TEXTS = (
    "[" * 100_000,
    '{"a":' * 50_000,
    "{} {}",
    "",
    "null",
    "[]",
    '"text"',
    "9" * 5_000,
    "{'a': 1}",
    '{"a": 1, "a": 2}',
    '{"a": "\\ud800"}',
    "\0" * 64,
)

ByteDamage = Callable[[random.Random, bytes], bytes]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _cut_a_little(rng: random.Random, data: bytes) -> bytes:
    return data[: -rng.randint(1, 16)]


def _flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_bits_at_the_start(rng: random.Random, data: bytes) -> bytes:
    return _flip_bits(rng, data[:512]) + data[512:]


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    junk = rng.choice((rng.randbytes(8), b"\xff" * 8, b"\0" * 8, rng.randbytes(256)))
    return data[:start] + junk + data[start + len(junk) :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randint(1, 64)) + data[start:]


def _remove(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randint(1, 64) :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.randint(1, 256)]
    return data[:start] + part * rng.randint(2, 9) + data[start:]


def _mark(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04", b"\x1f\x8b", b"version https://git-lfs")) + data


BYTE_DAMAGES: tuple[ByteDamage, ...] = (
    _cut, _cut_a_little, _flip_bits, _flip_bits, _flip_bits_at_the_start, _overwrite, _insert, _remove, _repeat, _mark,
)  # fmt: skip


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return damaged bytes; one to three damages follow each other."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(BYTE_DAMAGES)(rng, data)
    return data


def damage_value(rng: random.Random, value: Any) -> Any:
    """Return a copy of a JSON value with one to three of its nodes replaced, removed, added, renamed or exchanged."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(HOSTILE_VALUES)
        holder, key = rng.choice(places)
        change = rng.randrange(8)
        if change < 4:
            holder[key] = rng.choice(HOSTILE_VALUES)
        elif change == 4:
            del holder[key]
        elif change == 5:
            other, from_key = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[from_key]))
        elif change == 6 and isinstance(holder, dict):
            holder[rng.choice((key.upper(), f"{key}s", f"_{key}", "unknown"))] = holder.pop(key)
        elif isinstance(holder[key], bool):
            holder[key] = not holder[key]
        elif isinstance(holder[key], int | float):
            holder[key] = rng.choice(
                (holder[key] + 1, holder[key] - 1, holder[key] * 2, -holder[key], str(holder[key]))
            )
        else:
            holder[key] = [holder[key]]
    return value


def _places(value: Any) -> Any:
    """Yield (holder, key) of every node under a value; long lists give some of theirs."""
    if isinstance(value, dict):
        entries: Any = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))[:20]
    else:
        return
    for key, below in entries[:400]:
        yield value, key
        yield from _places(below)


def damage_json(rng: random.Random, path: Path) -> None:
    """Damage a JSON file: mostly a value of it, sometimes its text."""
    text = path.read_text(encoding="utf-8")
    kind = rng.randrange(10)
    if kind < 7:
        path.write_text(json.dumps(damage_value(rng, json.loads(text))), encoding="utf-8")
    elif kind == 7:
        path.write_text(rng.choice(_TEXTS), encoding="utf-8")
    elif kind == 8:
        path.write_bytes(text.encode(rng.choice(("utf-8-sig", "utf-16", "utf-32", "utf-8"))))
    else:
        path.write_bytes(damage_bytes(rng, text.encode()))


def damage_file(rng: random.Random, path: Path, outside: Path, *, is_text: bool = False) -> str:
    """Replace a file by something that is not one, or take it away; return what it is now.

    Args:
        rng: Draws what it becomes.
        path: The file.
        outside: A folder that no command may follow a link to.
        is_text: People may give it as a pipe, for which a command then waits; so it does not become one.
    """
    kinds = ("gone", "empty", "a folder", "a link out", "a dangling link", "a link to itself", "endless", "huge")
    kind = rng.choice(kinds if is_text else ("a pipe", *kinds))
    moved = outside / f"outside-{path.name}"
    if kind == "a link out":
        shutil.copy(path, moved)
    path.unlink()
    match kind:
        case "empty":
            path.touch()
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a link out":
            path.symlink_to(moved)
        case "a dangling link":
            path.symlink_to("nothing-here")
        case "a link to itself":
            path.symlink_to(path.name)
        case "endless":
            path.symlink_to("/dev/zero")
        case "huge":
            with path.open("wb") as file:
                file.truncate(HUGE_BYTES)
    return kind
