"""Reads a foreign config strictly: every field is requested by type, and the error for a wrong one names its file.

It serves the model families in ``export/arch/``, and the GGUF reader, which reads GGUF metadata through the same class.
optimum's NormalizedConfig does not fit: it reads attributes of a transformers config object, returns them untyped,
cannot tell a missing field from a null one, and names neither the file nor the expected type.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast

from shortstack.graphs import read_file
from shortstack.graphs.errors import CheckpointError, UnsupportedError, shortened

T = TypeVar("T", bound=bool | int | float | str)
D = TypeVar("D", bound=bool | int | float | str | None)


class _Default(Enum):
    REQUIRED = "required"


class Config:
    """Parsed key-value data and the file it came from.

    A field whose value is ``null`` counts as absent: Hugging Face configs write ``null`` for "not set".

    Args:
        data: The parsed JSON object, or the metadata of a GGUF file.
        file: The file that messages name.
        prefix: Where ``data`` lies inside that file, such as ``rope_scaling.``; empty at the top.
        remedy: What to do about a field that is not right, where that can be said for the whole file.
    """

    def __init__(self, data: Mapping[str, object], file: str, prefix: str = "", remedy: str | None = None) -> None:
        self.data = data
        self.file = file
        self.prefix = prefix
        self.remedy = remedy

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def where(self, key: str) -> str:
        """Return the file and the full field name, for messages."""
        return f"{self.file}: {self.prefix}{key}"

    def read(self, kind: type[T], key: str, default: T | D | _Default = _Default.REQUIRED) -> T | D:
        """Read one field.

        Args:
            kind: ``bool``, ``int``, ``float`` or ``str``. A bool never counts as a number; an int counts as a float.
            key: The field's name at this level.
            default: Returned when the field is absent or null. Without it the field is required.

        Returns:
            The value, of type ``kind``, or the default.

        Raises:
            CheckpointError: The field is required and absent, has another type, or is a float that is not finite.
        """
        value = self.data.get(key)
        if value is None:
            if isinstance(default, _Default):
                raise CheckpointError(
                    f"{self.where(key)} is missing",
                    expected=_KIND_NAMES[kind],
                    remedy=self.remedy or "add the field, or take the file from the model's original repository",
                )
            return default
        accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(key, _KIND_NAMES[kind])
        return cast("T", self._finite(key, value) if kind is float else value)

    def _finite(self, key: str, value: Any) -> float:
        try:
            number = float(value)
        except OverflowError:  # an integer that no float can hold
            number = math.inf
        if not math.isfinite(number):
            raise self.wrong(key, "a finite number")
        return number

    def read_token_ids(self, key: str) -> tuple[int, ...]:
        """Read a field that holds one token id or a list of them; an absent field gives an empty tuple.

        A negative id stands for "none" in configs that transformers accepts, and is left out.

        Raises:
            CheckpointError: The field holds anything else.
        """
        value = self.data.get(key)
        if value is None:
            return ()
        ids: list[Any] = value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(token for token in ids if token >= 0)

    def read_ints(self, key: str) -> tuple[int, ...]:
        """Read a required list of integers.

        Raises:
            CheckpointError: The field is absent or holds anything else.
        """
        return tuple(self._read_list(key, int, "a list of integers"))

    def read_strings(self, key: str) -> tuple[str, ...]:
        """Read a required list of strings; errors as in :meth:`read_ints`."""
        return tuple(self._read_list(key, str, "a list of strings"))

    def _read_list(self, key: str, kind: type[T], expected: str) -> list[T]:
        value = self.data.get(key)
        if value is None:
            raise CheckpointError(f"{self.where(key)} is missing", expected=expected)
        if not isinstance(value, list) or not all(type(entry) is kind for entry in value):  # True is not 1
            raise self.wrong(key, expected)
        return value

    def section(self, key: str) -> Config | None:
        """Return the object under ``key`` as a separate config, or None if it is absent or null.

        Raises:
            CheckpointError: The field holds something that is not an object.
        """
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Config(value, self.file, f"{self.prefix}{key}.", self.remedy)

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """Return the error that says what ``key`` holds and what it should hold."""
        found = shortened(repr(self.data.get(key)), limit=80)
        return CheckpointError(self.where(key), found=found, expected=expected, remedy=self.remedy)


def positive(config: Config, key: str, default: int | None = None) -> int:
    """Read an integer above 0; errors as in :meth:`Config.read`, and for one that is not positive."""
    value = config.read(int, key) if default is None else config.read(int, key, default)
    if value <= 0:
        raise config.wrong(key, "a positive integer")
    if value > LARGEST_SIZE:
        raise config.wrong(key, f"at most {LARGEST_SIZE}")
    return value


def parse_json_object(text: bytes | str, file: Path | str) -> dict[str, object]:
    """Parse a JSON file that must hold an object.

    Args:
        text: The file's content.
        file: Its name, for messages.

    Raises:
        CheckpointError: As :func:`shortstack.graphs.read_file.parse_json_object` says.
    """
    return read_file.parse_json_object(text, file, CheckpointError, "download the file again")


def not_one_of(where: str, found: str, supported: Iterable[str], remedy: str | None = None) -> UnsupportedError:
    """Return the error for a choice that this version does not know; it suggests the nearest name that it knows.

    Args:
        where: The file and the field.
        found: The value there.
        supported: The values that are valid.
        remedy: What to do, if the nearest name does not say it.
    """
    names = sorted(supported)
    near = difflib.get_close_matches(found, names, n=1)
    expected = f"{'one of ' if len(names) > 1 else ''}{', '.join(names)}"
    if near and len(names) > 1:
        expected += f" (the nearest is {near[0]})"
    return UnsupportedError(where, found=repr(found), expected=expected, remedy=remedy)


LARGEST_SIZE = 2**31 - 1  # no model comes near, and numbers that overflow stay out
_KIND_NAMES: Mapping[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
