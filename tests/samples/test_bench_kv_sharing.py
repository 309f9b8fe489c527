"""The benchmark of K,V sharing on random models, run small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from shortstack.graphs.errors import RequestError
from shortstack.samples.bench.kv_sharing import bench

SHAPE = ["--layers", "4", "--hidden", "64", "--intermediate", "96", "--kv-heads", "1", "--exit-layer", "2"]


def test_every_map_is_timed_and_bundles_are_kept(smollm2_gguf: Path, tmp_path: Path) -> None:
    maps = ["--kv-map", "none", "--kv-map", "pizza-bottom:2", "--kv-map", "lckv:2"]
    line = [*SHAPE, *maps, "--prompt", "4", "--prompt", "9", "--rounds", "2", "--decode", "2", "--json"]
    for _ in range(2):
        result = CliRunner().invoke(bench, [*line, "--cache", str(tmp_path)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found = {entry["name"]: entry for entry in json.loads(result.stdout)["maps"]}
        assert [entry["is_complete"] for entry in found.values()] == [False, True, False]
        assert [entry["kv_bytes"] for entry in found.values()] == [4 * 512, 2 * 512, 3 * 512]
        assert found["none"]["first_token"]["9"]["median"] == 1.0
        assert all(entry["decode"]["4"]["median"] > 0 for entry in found.values())
        assert len(list(tmp_path.iterdir())) == 3  # nothing half-made is left


@pytest.mark.parametrize("wrong", [["--hidden", "100"], ["--kv-heads", "3"], ["--kv-map", "calzone:2"]])
def test_impossible_shapes_and_maps_are_refused(wrong: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, [*SHAPE, *wrong, "--cache", str(tmp_path)])
    assert isinstance(result.exception, RequestError)
