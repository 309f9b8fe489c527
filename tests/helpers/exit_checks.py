"""Checks of whole bundles with random exits: graphs against the PyTorch twin, bytes against inspect's prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

from helpers import exit_nodes
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.exits import ExitNode
from shortstack.export.twin.model import Twin
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.plan import ExitSpec
from shortstack.runtime.commands.inspect_bundle import inspect
from shortstack.runtime.inspection.report import build_report

# float32, for logits with a standard deviation of about 2. Without a norm they reach 20, and the error grows too.
MAX_ABS = 1e-4
USUAL_DEVIATION = 2.0
ROWS = 3

Made = tuple[Twin, tuple[ExitNode, ...], Path]


def bundle_of(tiny: TinyModel, tiny_bundles: TinyBundles, folder: Path, *exits: ExitSpec, **options: Any) -> Made:
    """Return random exits, their twin, and the bundle of both; the options are those of ExportSpec."""
    checkpoint = tiny_bundles.checkpoint(tiny)
    twin, nodes = exit_nodes.write_random_exits(checkpoint, folder / "exits", *exits)
    export_bundle(ExportSpec(str(checkpoint), folder / "bundle", exits=folder / "exits", **options))
    return twin, nodes, folder / "bundle"


def check(twin: Twin, nodes: Sequence[ExitNode], bundle: Path, tiny: TinyModel, tolerance: float = MAX_ABS) -> None:
    tokens = np.random.randint(3, tiny.vocab, size=(2, 9))
    state = np.random.standard_normal((2, 9, tiny.hidden)).astype(np.float32)
    expected = exit_nodes.expected_exits(twin, nodes, tokens, state)
    true = exit_nodes.true_states(twin, tokens)
    for rows in (9, ROWS, 1, 0):
        found = exit_nodes.run_graphs(bundle, tokens, rows, state[:, 9 - rows :])
        for wanted, node, outputs in zip(expected, nodes, found, strict=False):
            logits = wanted.logits[:, 9 - rows :]
            assert outputs[names.LOGITS].shape == logits.shape
            scale = max(1.0, float(wanted.logits.std()) / USUAL_DEVIATION)
            np.testing.assert_allclose(outputs[names.LOGITS], logits, atol=tolerance * scale, rtol=0)
            rows_best = logits.argmax(-1)
            best = rows_best if node.ids is None else node.ids.numpy()[rows_best]
            assert (outputs[names.TOKEN] == best).all()
            assert (names.GATE in outputs) == node.exit_spec.has_gate
            assert (names.EXIT_STATE_OUT in outputs) == node.exit_spec.sees_state
            if wanted.gate is not None:
                np.testing.assert_allclose(outputs[names.GATE], wanted.gate[:, 9 - rows :], atol=tolerance, rtol=0)
            if wanted.state is not None:
                np.testing.assert_allclose(
                    outputs[names.EXIT_STATE_OUT], wanted.state[:, 9 - rows :], atol=tolerance, rtol=0
                )
        sees_state = any(node.exit_spec.sees_state for node in nodes)
        assert (names.FINAL_STATE in found[-1]) == sees_state
        if sees_state:
            np.testing.assert_allclose(found[-1][names.FINAL_STATE], true[:, 9 - rows :], atol=tolerance, rtol=0)


def check_inspect(bundle: Path) -> None:
    report = build_report(open_bundle(bundle))
    assert report.weights.as_predicted, report.weights
    assert [head.exit_spec for head in report.exits] == list(open_bundle(bundle).manifest.plan.exits)
    for options in ([], ["--json"], ["--html", str(bundle.parent / "page.html")]):
        assert CliRunner().invoke(inspect, [str(bundle), *options], catch_exceptions=False).exit_code == 0
