"""The benchmark of published drafters' shapes measures what it says, on tiny models and drafters that it makes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs.errors import RequestError
from shortstack.runtime import load
from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.drafter_rows import DrafterRows
from shortstack.runtime.engine.stack import Stack
from shortstack.samples.bench import drafter_shapes
from shortstack.samples.bench.drafter_costs import DrafterCosts, measure_drafter, relative
from shortstack.samples.bench.drafter_shapes import LABEL, measure, show
from shortstack.samples.bench.figures import spread
from shortstack.samples.bench.made_drafters import PAIRS, WithAssistant, WithEagle3, WithMtp
from shortstack.samples.bench.made_gemma4 import Assistant, Gemma4
from shortstack.samples.bench.made_model import Made, Shape, write_model, write_weights

SMALL = Shape(4, 64, 96, 4, 2, 16, 1000, is_tied=True)
TINY = {
    "llama-1b-eagle3": WithEagle3(SMALL, 200),
    "gemma4-e2b-assistant": WithAssistant(
        Assistant(Gemma4(10, 5, 64, 96, 4, 1, 16, 64, 1024, 32, 300), 4, 32, 64, 4, 64, 4)
    ),
    "mimo-mtp": WithMtp(replace(SMALL, layers=6, is_tied=False), 2),
}


@pytest.mark.parametrize(("shape", "precision"), [*((shape, "int4") for shape in TINY), ("llama-1b-eagle3", "fp32")])
def test_each_kind_of_drafter_is_made_and_measured(
    shape: str, precision: drafter_shapes.Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter_shapes, "PAIRS", TINY)
    found = measure(tmp_path, shape, None, precision, threads=1, context=20, repeats=2)
    assert [path.name for path in tmp_path.iterdir()] == [
        f"{shape}-{found.layers}-{precision}"
    ]  # no checkpoint is left
    assert list(found.costs.rows) == [1, 2, 3, 4, 5, 6]
    assert list(found.costs.first) == [1, 2, 3, 4, 5]
    assert found.costs.rows[1].median == 1
    assert found.costs.further.median > 0
    assert found.costs.further.count == 2
    assert 0 < found.drafter_bytes < found.weights_bytes
    assert found.plain.rss_bytes > 20e6  # an interpreter with onnxruntime
    assert [(each.acceptance, each.drafts) for each in found.predicted[:5]] == [
        (0.6, 1), (0.6, 2), (0.6, 3), (0.6, 4), (0.7, 1),
    ]  # fmt: skip
    assert "weights are random" in found.labels
    assert any("2 of 6 layers" in label for label in found.labels) == (shape == "mimo-mtp")
    assert any("300 of 1024 rows" in label for label in found.labels) == (shape == "gemma4-e2b-assistant")
    text = "\n".join(show(found))
    assert LABEL in text
    assert all(label in text for label in found.labels)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with an EAGLE-3 head."""
    folder = tmp_path_factory.mktemp("eagle3")
    pair = TINY["llama-1b-eagle3"].pair(None)
    assert pair.drafter is not None
    write_model(folder / "model", pair.model)
    write_weights(folder / "drafter", pair.drafter)
    spec = ExportSpec(str(folder / "model"), folder / "bundle", drafter=str(folder / "drafter"))
    return export_bundle(spec).folder


def test_a_repeat_judges_each_number_of_rows_and_refills_as_many(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []
    verify, keep, step = Stack.verify, DrafterRows.keep_round, DrafterRows.step

    def recorded(name: str, method: Any) -> Any:
        def run(self: object, rows: int, *given: Any, **named: Any) -> None:
            ran.append((name, rows))
            method(self, rows, *given, **named)

        return run

    monkeypatch.setattr(Stack, "verify", recorded("verify", verify))
    monkeypatch.setattr(DrafterRows, "keep_round", recorded("keep", keep))
    monkeypatch.setattr(DrafterRows, "step", recorded("step", step))
    with load(bundle, threads=1) as model:
        found = measure_drafter(model, [1, 2, 3], 1, drafts=True)
    once = [("keep", rows) for rows in range(1, 6)] + [("step", row) for row in (1, 2, 3)]
    once += [("verify", rows) for rows in range(1, 7)]
    assert sorted(ran) == sorted(2 * once)  # the first repeat is not counted
    assert {name: len(times) for name, times in found["verify"].items()} == dict.fromkeys("123456", 1)
    assert len(found["further"]) == 1


def test_without_drafts_the_drafter_is_never_opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DrafterGraphs, "_session")
    with load(bundle, threads=1) as model:
        assert set(measure_drafter(model, [1, 2, 3], 1, drafts=False)) == {"verify"}


def test_a_bundle_that_is_there_is_measured_again_and_printed_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter_shapes, "PAIRS", TINY)
    options = [str(tmp_path), "--shape", "mimo-mtp", "--threads", "1", "--context", "8", "--repeats", "1", "--json"]
    manifests = []
    for _ in range(2):
        done = CliRunner().invoke(drafter_shapes.main, options, catch_exceptions=False)
        figures = json.loads(done.stdout)
        manifests.append((tmp_path / "mimo-mtp-2-int4/bundle.json").stat().st_mtime_ns)
    assert manifests[0] == manifests[1]
    assert {each["label"] for each in figures["predicted"]} == {"predicted, acceptance forced"}


def test_a_model_with_too_few_layers_for_a_drafter_is_refused_before_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="4 or more"):
        measure(tmp_path, "llama-1b-eagle3", 3, "int4", threads=1, context=8, repeats=1)
    assert not list(tmp_path.iterdir())


def test_predicted_speeds_are_tokens_of_a_round_over_its_cost() -> None:
    one = spread([1.0])
    costs = DrafterCosts(
        plain_s=one.scaled(0.01),
        rows={rows: one.scaled(1 + (rows - 1) / 10) for rows in range(1, 7)},
        first={rows: one.scaled(0.2 + rows / 100) for rows in range(1, 6)},
        further=one.scaled(0.1),
    )
    # Two drafts: rows are left 1, 2, 3 with 0.4, 0.24, 0.36, and a round costs 0.2196 + 0.1 + c(3) = 1.5196.
    assert costs.first_draft(0.6, 2) == pytest.approx(0.2 + (0.4 * 1 + 0.24 * 2 + 0.36 * 3) / 100)
    assert costs.speed_up(0.6, 2) == pytest.approx((1 + 0.6 + 0.36) / 1.5196)
    assert costs.speed_up(0.0, 1) == pytest.approx(1 / (0.21 + 1.1))


def test_costs_are_medians_of_ratios_within_a_repeat() -> None:
    found = {
        "verify": {"1": [1.0, 10.0, 1.0], "2": [1.5, 15.0, 1.5]},
        "first": {"1": [0.3, 3.0, 0.3]},
        "further": [0.1, 1.0, 0.1],
    }
    costs = relative(found)
    assert asdict(costs)["rows"][2] == asdict(spread([1.5, 1.5, 1.5]))
    assert (costs.first[1].median, costs.further.median) == pytest.approx((0.3, 0.1))


def test_shapes_have_as_many_weights_as_the_models_they_are_named_after() -> None:
    def values(made: Made | None) -> float:
        assert made is not None
        shapes = [value for shard in made.shards() for value in shard.values() if isinstance(value, tuple)]
        return sum(float(np.prod(shape)) for shape in shapes)

    assert values(PAIRS["mimo-mtp"].pair(36).model) / 1e9 == pytest.approx(7.83, rel=0.01)
    e2b = PAIRS["gemma4-e2b-assistant"].pair(None)
    table = (262_144 - 4096) * 35 * 256
    assert (values(e2b.model) + table) / 1e9 == pytest.approx(4.65, rel=0.02)
    assert values(e2b.drafter) / 1e6 == pytest.approx(78, rel=0.02)  # as published


@pytest.mark.parametrize(("layers", "sharing"), [(35, 20), (10, 5), (5, 0), (2, 0), (20, 12)])
def test_a_shallower_gemma_keeps_a_full_layer_with_keys_and_values_of_its_own(layers: int, sharing: int) -> None:
    model = TINY["gemma4-e2b-assistant"].assistant.model  # type: ignore[attr-defined]
    made = replace(model, layers=35, sharing=20).with_layers(layers)
    assert made.sharing == sharing
    assert {"sliding_attention", "full_attention"} <= set(made.types[: layers - sharing])
