"""What `export --preset` refuses, and how early: before a fetch, a hash, a search or a byte on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.bad_input import Refused, left_behind
from helpers.kv_bundles import KVBundles
from helpers.kv_cases import exits_of
from helpers.straight import at_once, check_same, mix
from helpers.tiny_models import BASE, TinyBundles
from shortstack.export import assemble
from shortstack.export.spec import ExportSpec
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.kv_map import placement


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "rtn"], "--method would have no effect: without --preset"),
        (["--head", "int8", "--calibration-tokens", "99"], "--head, --calibration-tokens would have no effect"),
        (["--preset", "int5"], "--preset is unknown: found 'int5'"),
        (["--preset", "float"], "--preset float puts nothing in blocks"),
        (["--preset", "int4", "--calibration-tokens", "3"], "--calibration-tokens: found 3"),
        (["--preset", "int4", "--max-kl", "0"], "--max-kl: found 0.0"),
        (["--preset", "int4", "--calibration", "no/file"], "--calibration no/file cannot be read"),
        (["--draft-vocab", "9", "--draft-text", "no/file"], "--draft-text no/file cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused, options: list[str], says: str
) -> None:
    refused(["export", tiny_bundles.checkpoint(BASE), tmp_path / "out", *options], says)
    assert left_behind(tmp_path) == []


def test_layers_that_cannot_run_one_by_one_take_no_text(kv_bundles: KVBundles, tmp_path: Path) -> None:
    kv_map = placement("sandwich", "top", 6, 3)
    request = ExportSpec(str(kv_bundles.checkpoint(kv_map)), tmp_path / "one", exits_of(kv_map))
    with pytest.raises(UnsupportedError, match="calibration runs layer after layer"):
        at_once(request, mix("gptq"))
    with pytest.raises(UnsupportedError, match="scales of an int8 cache"):
        at_once(request, mix("rtn"))
    check_same(request, mix("rtn", kv_cache="float"), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "int5"),
        ("--preset", "int4", "--max-kl", "-1"),
        ("--preset", "int4", "--calibration", "no/file"),
        ("--draft-vocab", "9", "--draft-text", "no/file"),
    ],
    ids=" ".join,
)
def test_wrong_options_are_refused_before_a_checkpoint_is_fetched(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    def never(*arguments: Any, **others: Any) -> None:
        raise AssertionError("the checkpoint was opened")

    monkeypatch.setattr(assemble, "open_checkpoint", never)
    refused(["export", "some-owner/some-model", tmp_path / "out", *options], options[-2])


def test_numbers_that_are_not_finite_are_refused_by_name(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    from shortstack.graphs.errors import CheckpointError

    checkpoint = Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"):
        damaged = {**tensors, name: np.array(tensors[name])}
        damaged[name][5, 7] = np.nan
        save_file(damaged, checkpoint / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name}.*NaN or infinity in 1 of"):
            at_once(ExportSpec(str(checkpoint), tmp_path / "out", (1,)), mix("rtn"))
        assert left_behind(tmp_path) == ["checkpoint"]
