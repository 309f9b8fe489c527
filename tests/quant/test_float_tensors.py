"""What a float bundle must store is what export stores, for every kind of layer and exit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.exit_checks import bundle_of
from helpers.kv_bundles import KVBundles
from helpers.tiny_models import BASE, SPECULATOR, SWITCHES, TinyBundles, TinyModel
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.ir.read import read_tensors
from shortstack.graphs.kv_map import placement
from shortstack.graphs.plan import ExitSpec
from shortstack.quant.float_tensors import float_tensors

TINY = {tiny.name: tiny for tiny in SWITCHES}
MODELS = [TINY[name] for name in ("base", "all-biases-tied", "head-dim-20-biased", "odd-sizes-tied")]


def check(folder: Path) -> None:
    bundle = open_bundle(folder)
    expected = {name: (t.dtype, t.shape) for name, t in float_tensors(bundle.manifest).items()}
    assert {name: (str(t.dtype), t.shape) for name, t in read_tensors(bundle).items()} == expected
    graphs = {name: (folder / t.graph).read_bytes() for name, t in float_tensors(bundle.manifest).items()}
    assert [name for name, graph in graphs.items() if name.encode() not in graph] == []


@pytest.mark.parametrize("options", [{}, {"draft_vocab": 64}, {"dtype": "float16"}], ids=str)
@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_models_with_plain_exits(tiny_bundles: TinyBundles, tiny: TinyModel, options: dict[str, Any]) -> None:
    check(tiny_bundles.bundle(tiny, 1, 3, **options))


@pytest.mark.parametrize(
    "exits",
    [
        (ExitSpec(1, 64, branch="linear", linear_mlp=40, sees_token=True, sees_state=True, has_gate=True),),
        (ExitSpec(1, has_gate=True), ExitSpec(2, branch="mlp", norm="own", head="low_rank", head_rank=16)),
        (ExitSpec(1, branch="linear"), ExitSpec(2, branch="mlp", head="own"), ExitSpec(3, 30, branch="linear")),
        (ExitSpec(1, branch="block"), ExitSpec(3, 64, head="own", norm="none")),
    ],
)
@pytest.mark.parametrize("tiny", [BASE, TINY["all-biases-tied"]], ids=lambda tiny: tiny.name)
def test_models_with_trained_exits(
    tiny_bundles: TinyBundles, tmp_path: Path, tiny: TinyModel, exits: tuple[ExitSpec, ...]
) -> None:
    check(bundle_of(tiny, tiny_bundles, tmp_path, *exits)[-1])


@pytest.mark.parametrize("position", ["bottom", "top"])
def test_models_that_share_keys_and_values(kv_bundles: KVBundles, position: Any) -> None:
    check(kv_bundles.bundle(placement("pizza", position, SPECULATOR.layers, 3)))
