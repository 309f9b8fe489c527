"""What matrices were in the checkpoint: bundle.json keeps it, and `inspect` and `doctor` say it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers.inspect_bundles import MakeBundle, report_of, tiny_spec
from shortstack.graphs import manifest as manifest_module
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle, write_manifest
from shortstack.graphs.errors import BundleError
from shortstack.graphs.origins import Origin, grouped, origins_from_json, origins_to_json
from shortstack.graphs.precision import BlockFormat, Precision
from shortstack.runtime.commands.inspect_bundle import inspect
from shortstack.runtime.inspection.words import origin_facts

UP, DOWN, O_PROJ = (names.layer_weight(0, f"{part}.weight") for part in ("mlp.up_proj", "mlp.down_proj", "attn.o_proj"))
FORMATS = {
    O_PROJ: BlockFormat(8),
    UP: BlockFormat(4, has_offsets=True),
    DOWN: BlockFormat(8, 16, is_symmetric=True),
    names.layer_weight(1, "mlp.up_proj.weight"): BlockFormat(4, has_offsets=True),
}
ORIGINS = {
    O_PROJ: Origin("Q4_K, turned", False, 0.005),
    UP: Origin("Q4_K", True, 0.0058),
    DOWN: Origin("Q6_K", True, 0.0),
    names.layer_weight(1, "mlp.up_proj.weight"): Origin("Q4_K", True, 0.0061),
}
WORDS = [
    "1 matrix bit for bit (Q6_K as int8 symmetric, blocks of 16)",
    "2 matrices nearly (Q4_K as int4 with offsets, blocks of 32): up to 0.61% off the float weights",
    "1 matrix rounded (Q4_K, turned as int8, blocks of 32): up to 0.5% off the float weights",
]


def with_origins(make_bundle: MakeBundle) -> Path:
    folder = make_bundle(tiny_spec(), precision=Precision(FORMATS))
    write_manifest(folder, replace(open_bundle(folder).manifest, origins=ORIGINS))
    return folder


def edited(folder: Path, **fields: Any) -> Path:
    """Put other fields into a bundle.json, with the digest that fits."""
    path = folder / names.MANIFEST_FILE
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(data | {"digest": manifest_module._digest(data)}))
    return folder


def test_matrices_of_one_fate_are_gathered_the_exact_ones_first() -> None:
    assert [group.words for group in grouped(ORIGINS, FORMATS)] == WORDS
    assert [group.fate for group in grouped(ORIGINS, FORMATS)] == ["exact", "near", "rounded"]


def test_bundle_json_keeps_them(make_bundle: MakeBundle) -> None:
    folder = with_origins(make_bundle)
    assert open_bundle(folder).manifest.origins == ORIGINS
    stored = json.loads((folder / names.MANIFEST_FILE).read_text())["origins"]
    assert stored[UP] == {"kind": "Q4_K", "is_kept": True, "error": 0.0058, "error_of": "weights"}
    assert origins_from_json(origins_to_json(ORIGINS), FORMATS) == ORIGINS


def test_a_bundle_without_them_is_as_before(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec(), precision=Precision(FORMATS))
    assert "origins" not in json.loads((folder / names.MANIFEST_FILE).read_text())
    assert open_bundle(folder).manifest.origins == {}
    assert origin_facts(report_of(folder)) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "", "is_kept": True, "error": 0.0},
        {"kind": "a\x1b[31m", "is_kept": True, "error": 0.0},
        {"kind": "Q" * 201, "is_kept": True, "error": 0.0},
        {"kind": 4, "is_kept": True, "error": 0.0},
        {"kind": "Q4_K", "is_kept": 1, "error": 0.0},
        {"kind": "Q4_K", "is_kept": True, "error": -0.1},
        {"kind": "Q4_K", "is_kept": True, "error": math.inf},
        {"kind": "Q4_K", "is_kept": True, "error": math.nan},
        {"kind": "Q4_K", "is_kept": True, "error": True},
        {"kind": "Q4_K", "is_kept": True, "error": 10**400},
        {"kind": "Q4_K", "is_kept": True, "error": 0.1, "error_of": "outputs"},
        {"kind": "Q4_K", "is_kept": False, "error": 0.1, "error_of": "all"},
        {"kind": "Q4_K", "is_kept": True},
        "Q4_K",
        None,
    ],
)
def test_an_origin_that_nothing_has_is_refused(make_bundle: MakeBundle, entry: object) -> None:
    folder = edited(with_origins(make_bundle), origins={UP: entry})
    with pytest.raises(BundleError, match=r"bundle\.json lacks or misspells a field"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "origins", [["Q4_K"], "Q4_K", 3, {"no.such.matrix": {"kind": "a", "is_kept": True, "error": 0}}]
)
def test_origins_of_no_matrix_are_refused(make_bundle: MakeBundle, origins: object) -> None:
    with pytest.raises(BundleError, match=r"bundle\.json lacks or misspells a field"):
        open_bundle(edited(with_origins(make_bundle), origins=origins))


def test_inspect_says_what_matrices_were(make_bundle: MakeBundle) -> None:
    folder = with_origins(make_bundle)
    done = CliRunner().invoke(inspect, [str(folder)], catch_exceptions=False)
    assert done.exit_code == 0
    folded = " ".join(done.output.split())
    for words in WORDS:
        assert words in folded
    found = json.loads(CliRunner().invoke(inspect, [str(folder), "--json"], catch_exceptions=False).output)["origins"]
    assert found[DOWN] == {
        "kind": "Q6_K",
        "fate": "exact",
        "stored_as": "int8 symmetric, blocks of 16",
        "error": 0.0,
        "error_of": "weights",
    }
    assert {name: entry["fate"] for name, entry in found.items()} == {n: o.fate for n, o in ORIGINS.items()}
