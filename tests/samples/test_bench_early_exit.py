"""The benchmark of early exit: every way decodes, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.graphs.errors import RequestError
from shortstack.samples.bench.early_exit import bench, ways_of
from shortstack.samples.bench.exit_ways import Outcome, Way, terms
from shortstack.samples.bench.figures import spread


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"say": f"the {word} on"}) + "\n" for word in ("red", "stone")), encoding="utf-8"
    )
    return file


@pytest.mark.parametrize("exits", [(3,), (1, 3)])
def test_every_way_is_measured(tiny_bundles: TinyBundles, data: Path, exits: tuple[int, ...]) -> None:
    line = [str(tiny_bundles.bundle(SPECULATOR, *exits)), "--data", str(data), "--prompt", "{say}"]
    line += ["--threshold", "0.2", "--threshold", "1.0", "--max-new-tokens", "12", "--json"]
    result = CliRunner().invoke(bench, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    ways = {way["way"]["name"]: way for way in found["ways"]}
    assert list(ways) == [way.name for way in ways_of((0.2, 1.0), "top_prob >= {}", exits)]
    assert found["exits"] == list(exits)
    for name, way in ways.items():
        assert way["speed"]["median"] > 0
        if name == "plain" or "1.0" in name or "exact" in name:
            assert (way["text_loss"], way["same"]) == (0.0, 1.0)
    left = ways["top_prob >= 0.2, flush"]
    assert left["exited"] > 0
    assert left["depth"] < 6
    for name in ("recompute", "pipeline", "pipeline, a core each"):
        assert ways[f"top_prob >= 0.2, {name}"]["exited"] == left["exited"]
        assert ways[f"top_prob >= 0.2, {name}"]["text_loss"] == left["text_loss"]
    assert (left["terms"] is not None) == (len(exits) == 1)


def test_the_terms_of_a_tokens_time_add_up() -> None:
    plain = Outcome(Way("plain", "shared"), spread([1.0]), 100, 10.0, 8.0, 0, 0, 0.0, 1.0)
    early = Outcome(Way("exit", "shared"), spread([2.0]), 100, 5.0, 5.0, 60, 40, 0.1, 0.5)
    found = terms(early, plain, 0.2, 0.3, {1: 0.5, 2: 0.6, 4: 0.8})
    assert found.rows == 2.5
    assert found.upper == pytest.approx((0.6 + 0.25 * 0.2) / 2.5)
    assert found.predicted == pytest.approx(1 / (0.3 + 0.26))
    assert found.unmeasured == pytest.approx(0.5 - 0.56)
    assert early.exited_share == 0.6


def test_a_bundle_without_exits_is_refused(tiny_bundles: TinyBundles, data: Path) -> None:
    result = CliRunner().invoke(bench, [str(tiny_bundles.bundle(SPECULATOR)), "--data", str(data)])
    assert isinstance(result.exception, RequestError)
    assert "--exit-layer" in str(result.exception)
