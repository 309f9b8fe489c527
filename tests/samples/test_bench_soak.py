"""The soak: every request comes to an end, and memory that grows or a slot that is lost is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.runtime.batch.prefixes import Slots
from shortstack.samples.bench import soak as soak_file
from shortstack.samples.bench.soak import Soak, growth, main, soak

MB = 1_000_000


@pytest.fixture(scope="module")
def bundle(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.bundle(SPECULATOR, 1, 3)


def test_every_request_comes_to_an_end_of_some_kind(bundle: Path) -> None:
    line = [str(bundle), "--requests", "150", "--slots", "3", "--every", "30", "--json"]
    result = CliRunner().invoke(main, line, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["is_sound"]
    assert sum(found["ended"].values()) == 150
    assert {"length", "refused", "closed", "cancelled", "dropped"} <= found["ended"].keys()
    assert [count for count, _ in found["memory"]] == [30, 60, 90, 120, 150]


def test_a_slot_that_does_not_come_back_is_noticed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_back, given = Slots.give_back, []

    def forget_one(slots: Slots, slot: object) -> None:
        given.append(slot)
        if len(given) != 10:
            give_back(slots, slot)  # type: ignore[arg-type]

    monkeypatch.setattr(Slots, "give_back", forget_one)
    assert soak(bundle, 30, 3, 0, 10).lost == 1


@pytest.mark.parametrize(
    ("sizes", "is_flat"),
    [
        ([100 * MB] * 50, True),
        ([100 * MB + i * 50_000 for i in range(50)], True),
        ([100 * MB + i * 200_000 for i in range(50)], False),
        ([100 * MB] * 20 + [300 * MB] + [100 * MB] * 29, True),
        ([], True),
    ],
)
def test_memory_that_grows_steadily_is_not_flat_and_a_single_peak_is(sizes: list[int], is_flat: bool) -> None:
    assert growth(sizes)[1] is is_flat


def test_memory_that_grows_ends_with_exit_code_1(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_file, "soak", lambda *_: Soak(1000, growth_bytes=50 * MB, is_flat=False))
    result = CliRunner().invoke(main, [str(bundle), "--requests", "1000"])
    assert result.exit_code == 1
    assert "+50.0 MB, NOT FLAT" in result.stdout
