"""The search of `--max-kl`, against divergences that are made up."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortstack.quant.search import Unit, cheapest_mix

UNITS = [Unit(0, ("a", "b")), Unit(1, ("c",)), Unit(None, ("head",)), Unit(2, ("d", "e"))]
MATRICES = [name for unit in UNITS for name in unit.matrices]
BITS = {"float": 16, "int8": 8, "int4": 4}


def prefix(steps: int) -> dict[str, int]:
    """The mix after so many steps down: units go to int8 one after another, then to int4."""
    count = len(UNITS)
    mix: dict[str, int] = {}
    for position, unit in enumerate(UNITS):
        bits = 4 if position < steps - count else 8 if position < steps else 16
        mix |= dict.fromkeys(unit.matrices, bits)
    return {name: bits for name, bits in mix.items() if bits < 16}


MIXES = [prefix(steps) for steps in range(2 * len(UNITS) + 1)]


def test_the_ends_are_float_and_int4_everywhere() -> None:
    assert MIXES[0] == {}
    assert MIXES[len(UNITS)] == dict.fromkeys(MATRICES, 8)
    assert MIXES[-1] == dict.fromkeys(MATRICES, 4)


@given(st.lists(st.floats(0, 1), min_size=len(MIXES), max_size=len(MIXES)).map(sorted), st.floats(1e-6, 1))
def test_the_longest_way_down_under_the_limit_is_found(divergences: list[float], limit: float) -> None:
    divergences[0] = 0.0  # float everywhere is the source itself
    calls: list[int] = []

    def kl(mix: Mapping[str, int]) -> float:
        calls.append(MIXES.index(dict(mix)))
        return divergences[calls[-1]]

    advanced: list[float] = []
    found, reached = cheapest_mix(UNITS, kl, limit, advanced.append)
    assert reached == divergences[MIXES.index(found)]
    assert MIXES.index(found) == max(steps for steps, value in enumerate(divergences) if value <= limit)
    assert len(set(calls)) == len(calls) == sum(advanced), "a mix was run twice"
    assert len(calls) <= ceil(log2(len(UNITS) + 1)) + 1


@given(st.lists(st.floats(0, 1), min_size=len(MIXES), max_size=len(MIXES)), st.floats(1e-6, 1))
def test_a_mix_whose_divergence_was_measured_as_too_large_is_never_taken(
    divergences: list[float], limit: float
) -> None:
    divergences[0] = 0.0
    found, reached = cheapest_mix(UNITS, lambda mix: divergences[MIXES.index(dict(mix))], limit)
    assert reached == divergences[MIXES.index(found)] <= limit


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({"int8": 1.0, "int4": 2.0}, {}),
        ({"int8": 0.0, "int4": 0.0}, dict.fromkeys(MATRICES, 4)),
        ({"int8": 0.0, "int4": 2.0}, dict.fromkeys(MATRICES, 8)),
        ({"int8": 0.1, "int4": 0.3}, {"a": 8, "b": 8, "c": 8, "head": 8, "d": 8, "e": 8} | {"a": 4, "b": 4}),
        ({"int8": 0.3, "int4": 2.0}, {"a": 8, "b": 8, "c": 8}),
    ],
    ids=["nothing fits", "all fits", "no int4", "some int4", "some int8"],
)
def test_costs_add_up_until_the_limit_is_reached(costs: dict[str, float], expected: dict[str, int]) -> None:
    def kl(mix: Mapping[str, int]) -> float:
        return sum(costs[f"int{bits}"] for bits in mix.values())

    found, reached = cheapest_mix(UNITS, kl, 1.0)
    assert found == expected
    assert reached == kl(expected)


def test_a_model_of_no_units_is_left_alone() -> None:
    assert cheapest_mix([], lambda mix: 0.0, 0.1) == ({}, 0.0)
