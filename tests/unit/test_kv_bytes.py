"""Bytes of keys and values per position, compared with products written out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.inspect_bundles import tiny_spec
from shortstack.graphs.kv_bytes import kv_bytes_per_token
from shortstack.graphs.kv_map import identity_kv_map, placement


@pytest.mark.parametrize("value_bytes", [4, 2, 1])
def test_each_producer_keeps_a_key_and_a_value_per_head(value_bytes: int) -> None:
    spec = tiny_spec(6, head_dim=32, heads=6, kv_heads=3)
    for kv_map, owners in ((identity_kv_map(6), 6), ((0, 0, 2, 2, 4, 4), 3), ((0, 4, 4, 4, 4, 5), 3), ((5,) * 6, 1)):
        assert kv_bytes_per_token(replace(spec, kv_map=kv_map), value_bytes) == 2 * owners * 3 * 32 * value_bytes


def test_a_head_counts_with_its_stored_width() -> None:
    assert kv_bytes_per_token(tiny_spec(1, head_dim=8), 4) == 2 * 1 * 16 * 4


def test_the_number_of_owners_can_be_given() -> None:
    spec = tiny_spec(4, kv_map=(0, 1, 1, 1))
    assert [kv_bytes_per_token(spec, 2, range(owners)) for owners in (0, 1, 2)] == [0, 64, 128]
    assert kv_bytes_per_token(spec, 2) == 128


def test_bytes_are_proportional_to_the_number_of_producers() -> None:
    plain = kv_bytes_per_token(tiny_spec(9), 4)
    for owners in range(1, 10):
        shared = tiny_spec(9, kv_map=placement("lasagna", "middle", 9, owners))
        assert kv_bytes_per_token(shared, 4) * 9 == plain * owners
