"""EAGLE-1 heads and MTP layers: their drafts equal their formulas computed anew, the output that of plain decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.drafter_cases import KINDS, written
from helpers.drafters import Projected, Recorded
from helpers.quantized import preset
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import OWN_DRAFTER, ExportSpec
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import DraftPolicy, Speculate, load

TARGET = TinyModel("drafted for by a projection")
TOKENS = 40


@pytest.fixture(scope="module")
def model(tiny_bundles: TinyBundles) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_bundles.checkpoint(TARGET)).eval()


@pytest.mark.parametrize("name", KINDS)
def test_drafts_are_those_of_the_formula_and_change_no_token(
    tiny_bundles: TinyBundles, model: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    drafter = KINDS[name]
    bundle = export_bundle(written(tiny_bundles.checkpoint(TARGET), drafter, tmp_path / "d"))
    small = quantize_bundle(QuantizeSpec(bundle.folder, tmp_path / "small", preset(BlockFormat(4), "int8")))
    for folder, is_float in ((bundle.folder, True), (small.folder, False)):
        source = Recorded()
        with load(folder) as loaded:
            for seed in range(4):
                prompt = np.random.default_rng(seed).integers(3, 300, 1 + 9 * seed).tolist()
                plain = loaded.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)
                strategy = Speculate(draft=DraftPolicy(1 + seed), source=source)
                result = loaded.generate(prompt, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True)
                assert result.tokens == plain.tokens
        assert len(source.rounds) > 80
        for tokens, drafts in source.rounds if is_float else ():
            assert drafts == drafter.drafts(model, tokens, len(drafts))


def test_a_checkpoint_without_such_a_layer_is_refused(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    spec = ExportSpec(str(tiny_bundles.checkpoint(TARGET)), tmp_path / "b", drafter=OWN_DRAFTER)
    with pytest.raises(CheckpointError, match="no layer for multi-token prediction"):
        export_bundle(spec)


def test_a_part_of_such_a_layer_is_refused(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    spec = written(tiny_bundles.checkpoint(TARGET), Projected("deepseek"), tmp_path / "d")
    file = Path(spec.checkpoint) / "model.safetensors"
    weights = load_file(str(file))
    save_file({name: value for name, value in weights.items() if "layers.4.mlp" not in name}, str(file))
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.mlp\.up_proj\.weight"):
        export_bundle(spec)
