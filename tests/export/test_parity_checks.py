"""``shortstack parity`` on what is unusual: another model of the same sizes, nothing to compare inside, links."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.bad_input import Refused, edit_json
from helpers.quantized import INT8, QuantizedBundles, preset
from helpers.tiny_models import BASE, TinyBundles
from shortstack.__main__ import run

QUICK = ["--prompts", "1", "--greedy-tokens", "2"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 1e-3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        ("kv_map", [0, 0, 2, 2]),
    ],
)
def test_another_model_of_the_same_sizes_is_refused(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused, field: str, value: object
) -> None:
    other = Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "other"))
    edit_json(other / "config.json", **{field: value})
    refused(["parity", other, tiny_bundles.bundle(BASE, 2), *QUICK], "the bundle was made from another model")


def test_a_whole_model_with_an_int8_cache_has_nothing_inside_to_compare(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = quantized(tiny_bundles.bundle(BASE), preset(INT8, "int8"))
    assert run(["parity", str(tiny_bundles.checkpoint(BASE)), str(whole), *QUICK]) in (0, 1)
    assert "cache and hidden states: not compared" in capsys.readouterr().out


def test_links_out_of_the_checkpoint_are_followed_if_asked_for(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused
) -> None:
    folder, source = tmp_path / "linked", tiny_bundles.checkpoint(replace(BASE, name="base"))
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    bundle = tiny_bundles.bundle(BASE, 2)
    refused(["parity", folder, bundle, *QUICK], "is a link that leads out of the folder", "--follow-links")
    assert run(["parity", str(folder), str(bundle), *QUICK, "--follow-links"]) == 0
    assert run(["export", str(folder), str(tmp_path / "out"), "-e", "2", "--follow-links"]) == 0
