"""Drafters in GGUF files: the same bundle as from the checkpoint that they were converted from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.drafter_cases import written
from helpers.drafters import Eagle3, Projected, Recorded
from helpers.gguf_drafters import eagle3_gguf, with_mtp_gguf
from helpers.gguf_files import Kind
from helpers.mtp import TinyMtp
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import OWN_DRAFTER, ExportSpec
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.runtime import DraftPolicy, Speculate, load

TARGET = TinyModel("drafted for by a GGUF file")
HEADS = {
    "as EAGLE saves it": Eagle3(),
    "ids out of order": Eagle3(seed=1),
    "with all token ids": Eagle3(draft_vocab=None),
    "a normalised stream": Eagle3(options={"norm_before_residual": True}),
    "narrower, with its own embedding": Eagle3(hidden=48, has_embedding=True, theta=500.0, features=(1, 2, 4)),
}


@pytest.fixture(scope="module")
def target(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.checkpoint(TARGET)


def exported(target: Path, out: Path, drafter: Path | str) -> Bundle:
    return export_bundle(ExportSpec(str(target), out, drafter=str(drafter)))


@pytest.mark.parametrize("name", HEADS)
def test_an_eagle3_head_is_that_of_its_folder(target: Path, tmp_path: Path, name: str) -> None:
    folder = HEADS[name].write(tmp_path / "d")
    from_gguf = exported(target, tmp_path / "a", eagle3_gguf(folder, tmp_path / "d.gguf"))
    if HEADS[name].features[0] == 1:  # in a folder, these would be layers whose output is read
        folder = Eagle3(hidden=48, has_embedding=True, theta=500.0, features=(0, 1, 3)).write(tmp_path / "e")
        shutil.copy(tmp_path / "d" / "model.safetensors", folder / "model.safetensors")
        config = folder / "config.json"
        config.write_text(config.read_text().replace("[0, 1, 3]", "[1, 2, 3]"))
        from_folder = exported(target, tmp_path / "b", folder)
        assert from_gguf.manifest.plan.drafter is not None
        assert from_gguf.manifest.plan.drafter.features == (1, 2, 4)
    else:
        from_folder = exported(target, tmp_path / "b", folder)
        assert from_gguf.manifest.plan.drafter == from_folder.manifest.plan.drafter
    assert from_gguf.manifest.weights_sha256 == from_folder.manifest.weights_sha256


def test_divisors_of_its_rotary_embedding_are_its_own(target: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    folder = Eagle3(options={"rope_scaling": scaling}).write(tmp_path / "d")
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((32 / wavelengths - 1.0) / 3.0, 0.0, 1.0)
    factors = np.asarray(1 / ((1 - smooth) / 4.0 + smooth), np.float32)
    file = eagle3_gguf(folder, tmp_path / "d.gguf", changed={"rope_freqs.weight": factors})
    rounds = []
    for out, drafter in ((tmp_path / "a", file), (tmp_path / "b", folder)):
        source = Recorded()
        with load(exported(target, out, drafter).folder) as model:
            for seed in range(3):
                prompt = np.random.default_rng(seed).integers(3, 300, 60).tolist()
                strategy = Speculate(draft=DraftPolicy(3), source=source)
                model.generate(prompt, strategy=strategy, max_new_tokens=30, ignore_eos=True)
        rounds.append(source.rounds)
    assert rounds[0] == rounds[1]
    assert len(rounds[0]) > 60


def test_the_older_name_of_its_depths_means_the_same(target: Path, tmp_path: Path) -> None:
    file = eagle3_gguf(Eagle3().write(tmp_path / "d"), tmp_path / "d.gguf", layers="extract_layers")
    drafter = exported(target, tmp_path / "b", file).manifest.plan.drafter
    assert drafter is not None
    assert drafter.features == Eagle3().features


def test_a_file_that_does_not_fit_says_what_is_wrong(target: Path, tmp_path: Path) -> None:
    folder = Eagle3().write(tmp_path / "d")

    def refused(name: str, kind: type[Exception] = CheckpointError, **given: object) -> str:
        file = eagle3_gguf(folder, tmp_path / f"{name}.gguf", **given)  # type: ignore[arg-type]
        with pytest.raises(kind) as error:
            exported(target, tmp_path / "out", file)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    ids = np.arange(Eagle3().draft_vocab or 0, dtype=np.int64)
    assert "names token id 300000, and the model has" in refused("far", changed={"d2t": ids + 300000})
    assert "twice" in refused("twice", changed={"d2t": ids * 0})
    assert "whole numbers" in refused("floats", changed={"d2t": ids.astype(np.float32)})
    said = refused("missing", changed={"blk.0.attn_output.weight": None, "output_norm.weight": None})
    assert "midlayer.self_attn.o_proj.weight" in said
    assert "norm.weight" in said
    assert "target_layers" in refused("no depths", layers="other")
    assert "gemma4-assistant" in refused("assistant", UnsupportedError, architecture="gemma4-assistant")
    other = Eagle3(target_hidden=48).write(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"fc\.weight reads 144 columns"):
        exported(target, tmp_path / "out", eagle3_gguf(other, tmp_path / "other.gguf"))
    with pytest.raises(UnsupportedError, match=r"a drafter without its model: found eagle3"):
        export_bundle(ExportSpec(str(tmp_path / "far.gguf"), tmp_path / "out"))


@pytest.mark.parametrize("skip", ["nothing", "shared_head_norm"])
def test_layers_for_multi_token_prediction_are_those_of_their_folder(tmp_path: Path, skip: str) -> None:
    folder = TinyMtp(2).write(tmp_path / "model")
    file = with_mtp_gguf(folder, tmp_path / "m.gguf", "qwen2", skip=skip)
    from_gguf = exported(file, tmp_path / "a", OWN_DRAFTER)
    if skip != "nothing":  # then they use the model's
        from safetensors.numpy import load_file, save_file

        found = load_file(folder / "model.safetensors")
        shared = {name: found["model.norm.weight"] for name in found if "shared_head.norm" in name}
        save_file({**found, **shared}, folder / "model.safetensors", {"format": "pt"})
    from_folder = exported(folder, tmp_path / "b", OWN_DRAFTER)
    assert from_gguf.manifest.weights_sha256 == from_folder.manifest.weights_sha256
    assert from_gguf.manifest.plan.drafter == from_folder.manifest.plan.drafter
    assert from_gguf.manifest.spec.num_hidden_layers == 2
    plain = export_bundle(ExportSpec(str(file), tmp_path / "plain"))
    assert plain.manifest.plan.drafter is None
    assert plain.manifest.spec.num_hidden_layers == 2


def test_the_rows_of_such_a_layer_of_llama_are_put_back(target: Path, tmp_path: Path) -> None:
    spec = written(target, Projected("deepseek"), tmp_path / "d")
    from_folder = export_bundle(spec)
    file = with_mtp_gguf(Path(spec.checkpoint), tmp_path / "m.gguf", "llama")
    from_gguf = exported(file, tmp_path / "a", OWN_DRAFTER)
    assert from_gguf.manifest.weights_sha256 == from_folder.manifest.weights_sha256


def test_a_drafter_beside_kept_blocks_changes_no_token(tmp_path: Path) -> None:
    folder = TinyMtp(2).write(tmp_path / "model")
    head = Eagle3(hidden=32, target_hidden=32, heads=2, features=(1, 2)).write(tmp_path / "d")
    file = with_mtp_gguf(folder, tmp_path / "m.gguf", "qwen2", kind=Kind.Q8_0)
    speculate = Speculate(draft=DraftPolicy(2))
    for drafter in (OWN_DRAFTER, str(eagle3_gguf(head, tmp_path / "d.gguf"))):
        out = tmp_path / drafter.replace("/", "")
        bundle = export_bundle(ExportSpec(str(file), out, drafter=drafter, keep_blocks=True))
        assert bundle.manifest.precision.weights["drafter.layers.0.attn.o_proj.weight"].bits == 8
        with load(bundle.folder) as model:
            for seed in range(3):
                prompt = np.random.default_rng(seed).integers(3, 300, 9).tolist()
                plain = model.generate(prompt, max_new_tokens=30, ignore_eos=True)
                result = model.generate(prompt, strategy=speculate, max_new_tokens=30, ignore_eos=True)
                assert result.tokens == plain.tokens
                assert result.stats.drafted > 0


def test_such_layers_that_a_file_lacks_are_named(tmp_path: Path) -> None:
    file = with_mtp_gguf(TinyMtp(2).write(tmp_path / "model"), tmp_path / "m.gguf", "qwen2", skip="3.nextn.enorm")
    with pytest.raises(CheckpointError, match=r"it has no tensor model\.layers\.3\.enorm\.weight"):
        exported(file, tmp_path / "b", OWN_DRAFTER)
