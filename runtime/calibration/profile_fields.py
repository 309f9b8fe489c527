"""Which values each field of an exit profile may hold. A profile may come from anywhere, so every field is checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from shortstack.runtime.calibration.dissimilarity import LOSSES
from shortstack.runtime.calibration.learn_then_test import TESTS

_SHA256 = re.compile("[0-9a-f]{64}")
_MOST_CHARACTERS = 1_000
_MOST_ITEMS = 1_000
_MOST_LAYERS = 10_000


class Field(NamedTuple):
    """A check of a value, and in words which values pass it."""

    accepts: Callable[[Any], bool]
    words: str


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and low <= value <= high


def _is_count(value: Any, low: int = 1, high: int = 1 << 62) -> bool:
    return type(value) is int and low <= value <= high  # excludes True, which is an int too


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_ITEMS and all(map(accepts, value))


_TEXT = Field(lambda v: isinstance(v, str) and v.isprintable() and len(v) <= _MOST_CHARACTERS, "printable text")
_NUMBER = Field(_is_number, "a number")
_SHARE = Field(lambda v: _is_number(v, 0, 1), "a number, 0..1")
_PROBABILITY = Field(lambda v: _is_number(v) and 0 < v < 1, "a number between 0 and 1")
_COUNT = Field(_is_count, "a whole number, 1 or more")
_DEPTH = Field(lambda v: _is_number(v, 0, _MOST_LAYERS), "a depth in layers")

POINT_FIELDS: dict[str, Field] = {
    "threshold": _NUMBER,
    "mean_loss": _SHARE,
    "p_value": _SHARE,
    "is_accepted": Field(lambda v: isinstance(v, bool), "true or false"),
    "mean_exit_layer": _DEPTH,
    "exited_share": _SHARE,
    "tokens": _COUNT,
    "tokens_per_s": Field(lambda v: v is None or _is_number(v, 0), "null or a number, 0 or more"),
}
PROFILE_FIELDS: dict[str, Field] = {
    "name": _TEXT,
    "template": _TEXT,
    "threshold": Field(lambda v: v is None or _is_number(v), "null or a number"),
    "criterion": _TEXT,
    "exit_layers": Field(
        lambda v: _is_list(v, lambda e: _is_count(e, 1, _MOST_LAYERS)) and bool(v) and v == sorted(set(v)),
        "whole numbers, ascending",
    ),
    "delta": _PROBABILITY,
    "epsilon": _PROBABILITY,
    "prompts": _COUNT,
    "loss": Field(lambda v: isinstance(v, str) and v in LOSSES, " or ".join(LOSSES)),
    "test": Field(lambda v: isinstance(v, str) and v in TESTS, " or ".join(TESTS)),
    "max_new_tokens": _COUNT,
    "mean_loss": _SHARE,
    "mean_exit_layer": _DEPTH,
    "exited_share": _SHARE,
    "predicted_saving": _SHARE,
    "grid": Field(lambda v: _is_list(v, _is_number), "a list of numbers"),
    "weights_sha256": Field(lambda v: isinstance(v, str) and bool(_SHA256.fullmatch(v)), "64 hex digits"),
    "precision": _TEXT,
    "shortstack": _TEXT,
    "curve": Field(lambda v: _is_list(v, lambda p: isinstance(p, dict)), "a list of objects"),
}


def check_fields(data: Mapping[str, Any]) -> list[str]:
    """Return a list of what is wrong with the fields of a profile and of its points; empty if all are valid."""
    problems = _check(data, PROFILE_FIELDS, "")
    if not problems:
        for index, point in enumerate(data["curve"]):
            problems += _check(point, POINT_FIELDS, f"curve[{index}].")
    return problems


def _check(data: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> list[str]:
    problems = [f"no field {where}{name}" for name in fields if name not in data]
    problems += [f"unknown field {where}{ascii(name)[1:61]}" for name in data if name not in fields]
    problems += [
        f"field {where}{name}: found {ascii(data[name])[:60]}, expected {field.words}"
        for name, field in fields.items()
        if name in data and not field.accepts(data[name])
    ]
    return problems
