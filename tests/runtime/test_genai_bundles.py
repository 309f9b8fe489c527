"""Bundles with --genai: the uncut graph is the segments' model bit for bit, and onnxruntime-genai decodes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from helpers.bad_input import Refused
from helpers.exit_nodes import CachedGraphs
from helpers.families import CONTEXT, VOCAB
from helpers.family_rows import ROWS, FamilyRow
from helpers.genai import TOKENS, WholeGraph, genai_tokens, need_genai, segment_tokens
from helpers.kv_bundles import KVBundles
from helpers.quantized import INT4, INT8, QuantizedBundles, preset
from helpers.tiny_models import BASE, TinyBundles, write_tokenizer
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.runtime import load

FORMATS = {
    "float": None,
    "int8": preset(INT8),
    "int4": preset(INT4),
    "int4-int8-cache": preset(INT4, "int8"),
}
FAMILIES = ("llama", "qwen3", "gemma3_text", "gemma4_text", "phi3", "gpt2")
PIECES = (9, 1, 1, 2, 1, 4, 1, 8)


class Made:
    """A bundle with a graph for onnxruntime-genai of each family, and what is quantized from it."""

    def __init__(self, folder: Path, quantized: QuantizedBundles) -> None:
        self._folder, self._quantized = folder, quantized
        self._float: dict[str, Path] = {}

    def __call__(self, family: str, kind: str = "float") -> Path:
        if family not in self._float:
            row: FamilyRow = next(row for row in ROWS if row.model_type == family)
            checkpoint = self._folder / f"{family}-checkpoint"
            row.model().save_pretrained(checkpoint)
            write_tokenizer(checkpoint, VOCAB)
            export_bundle(ExportSpec(str(checkpoint), self._folder / family, (1, 2), genai=True))
            self._float[family] = self._folder / family
        mix = FORMATS[kind]
        return self._float[family] if mix is None else self._quantized(self._float[family], mix)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quantized: QuantizedBundles) -> Made:
    return Made(tmp_path_factory.mktemp("genai"), quantized)


def text(count: int, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(5, 290, count)]


def both(folder: Path, tokens: list[int]) -> tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
    """Return the logits of the segments and of the uncut graph, piece by piece."""
    graphs, whole = CachedGraphs(folder, 1, CONTEXT), WholeGraph(folder / names.GENAI_GRAPH_FILE, CONTEXT)
    hidden, past, ours, theirs = graphs.bundle.manifest.spec.hidden_size, 0, [], []
    for rows in PIECES:
        piece = tokens[past : past + rows]
        state = np.zeros((1, rows, hidden), np.float32)
        ours.append(graphs.run(np.array([piece], np.int64), past, rows, state)[-1][names.LOGITS][0])
        theirs.append(whole.run(piece, past))
        past += rows
    return ours, theirs


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_uncut_graph_gives_the_logits_of_the_segments_bit_for_bit(made: Made, family: str, kind: str) -> None:
    for ours, theirs in zip(*both(made(family, kind), text(sum(PIECES))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_genai_decodes_the_tokens_of_the_segments(made: Made, family: str, kind: str) -> None:
    need_genai()
    folder, prompt = made(family, kind), text(9, seed=2)
    assert genai_tokens(folder, prompt) == segment_tokens(folder, prompt)


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_genai_decodes_the_tokens_of_plain_decoding(made: Made, family: str, kind: str) -> None:
    need_genai()
    folder, prompt = made(family, kind), text(9, seed=3)
    ours = list(load(folder).generate(prompt, max_new_tokens=TOKENS).tokens)
    assert genai_tokens(folder, prompt) == ours[: ours.index(0) if 0 in ours else None]


def test_genai_reads_the_tokenizer_and_the_tokens_that_end_a_text(made: Made) -> None:
    genai = need_genai()
    folder = made("llama")
    tokenizer, ours = genai.Tokenizer(genai.Model(str(folder))), load(folder).tokenizer
    assert list(tokenizer.encode("the cat and the hat")) == ours.encode("the cat and the hat")
    assert tuple(tokenizer.eos_token_ids) == ours.eos_token_ids


def test_layers_that_use_another_layers_cache_have_none_of_their_own(kv_bundles: KVBundles, tmp_path: Path) -> None:
    kv_map = (0, 0, 2, 2, 4, 4)
    export_bundle(ExportSpec(str(kv_bundles.checkpoint(kv_map)), tmp_path / "bundle", (2,), genai=True))
    for ours, theirs in zip(*both(tmp_path / "bundle", [token % 131 for token in text(sum(PIECES))]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    config = json.loads((tmp_path / "bundle" / names.GENAI_CONFIG_FILE).read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 3
    need_genai()
    prompt = [token % 131 for token in text(9)]
    assert genai_tokens(tmp_path / "bundle", prompt) == segment_tokens(tmp_path / "bundle", prompt)


def test_models_that_need_several_runs_for_a_prompt_are_refused(
    kv_bundles: KVBundles, tmp_path: Path, refused: Refused
) -> None:
    checkpoint = kv_bundles.checkpoint((0, 3, 3, 3))
    refused(["export", checkpoint, tmp_path / "bundle", "--genai"], "layers [1, 2] need several runs", "--genai")
    assert not (tmp_path / "bundle").exists()


def test_the_bundle_lists_both_files_and_stores_no_weight_twice(made: Made, tiny_bundles: TinyBundles) -> None:
    folder = made("llama")
    files = open_bundle(folder, verify_hashes=True).manifest.files
    assert set(names.GENAI_FILES) < files.keys()
    assert sum(name.endswith(".data") for name in files) == 1
    assert files[names.GENAI_GRAPH_FILE].bytes < 100_000
    plain = tiny_bundles.bundle(BASE, 1)
    assert not set(names.GENAI_FILES) & open_bundle(plain).manifest.files.keys()


def test_quantize_adds_the_files_when_asked(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    source = tiny_bundles.bundle(BASE, 1)
    options = ["--preset", "int8", "--no-report", "--genai"]
    assert run(["quantize", str(source), str(tmp_path / "bundle"), *options]) == 0
    for ours, theirs in zip(*both(tmp_path / "bundle", text(sum(PIECES))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_bundle_with_the_files_is_inspected_like_one_without(made: Made) -> None:
    assert run(["inspect", str(made("llama"))]) == 0


def test_sampling_of_the_checkpoint_is_taken_over_and_decoding_stays_greedy(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "checkpoint"))
    settings = {"eos_token_id": [0, 2], "do_sample": True, "temperature": 0.6, "top_k": "many", "top_p": True}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    export_bundle(ExportSpec(str(checkpoint), tmp_path / "bundle", genai=True))
    config = json.loads((tmp_path / "bundle" / names.GENAI_CONFIG_FILE).read_text())
    assert config["model"]["eos_token_id"] == [0, 2]
    assert config["search"]["do_sample"] is False
    assert config["search"]["temperature"] == 0.6
    assert not {"top_k", "top_p"} & config["search"].keys()
