"""Whatever a config of any family says, it is refused in one line, or its model can be stored and described again."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.family_configs import FAMILIES, fields_of, read, their_fields
from shortstack.export.arch import ARCHITECTURES
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.spec_json import spec_from_json, spec_to_json

HOSTILE: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**9, 2**31, 10**400, 1e308, -1e308, 1e-320, float("nan"), float("inf"), "", "\n\x1b[2J",
    [], [1] * 8, ["sliding_attention"] * 8, {}, {"full_attention": 3},
)  # fmt: skip
LENGTHS = {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.1}
YARN = {"rope_type": "yarn", **LENGTHS, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
DIVISORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "partial_rotary_factor": 1.0}
OLD = {
    "sliding_window_pattern": 2, "rope_theta": 500.0, "rope_local_base_freq": 20.0, "partial_rotary_factor": 1.0,
    "rotary_pct": 1.0, "rotary_emb_base": 50.0, "original_max_position_embeddings": 16, "windows": [0] * 8,
}  # fmt: skip


def configs(family: str) -> tuple[dict[str, Any], ...]:
    return (
        their_fields(fields_of(family, sliding_window=9)),
        {**OLD, "rope_scaling": {**YARN, "truncate": True}},
        {"rope_scaling": {name: value for name, value in YARN.items() if name != "attention_factor"}},
        {"rope_parameters": {"rope_type": "longrope", **LENGTHS, **DIVISORS}},
        {"kv_map": list(range(8)), "windows": [3, 0] * 4, "masks_diagonal": True},
    )


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value, of lists that of the first entry."""
    entries = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def put(fields: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(fields)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hostile_value_is_refused_in_one_line_or_gives_a_model(family: str) -> None:
    for fields in configs(family):
        for path in places({name: value for name, value in fields.items() if name != "model_type"}):
            for value in HOSTILE:
                config = put({**fields_of(family), **fields}, path, value)
                try:
                    spec = read(config)
                except CheckpointError as error:
                    text = str(error)
                    assert text.isprintable(), (path, value)
                    assert text.startswith("config.json: "), (path, value, text)
                    assert text.endswith("."), (path, value, text)
                else:
                    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec))), "model") == spec, (path, value)
                    assert read(ARCHITECTURES[family].write_config(spec)) == spec, (path, value)
