"""The benchmark's other engines, by scripted ones: who takes turns, which models are made, what is judged."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from shortstack.graphs.errors import DependencyError
from shortstack.samples.bench import artifacts, rivals
from shortstack.samples.bench.__main__ import bench
from shortstack.samples.bench.artifacts import Artifacts, open_artifacts, stored_bytes
from shortstack.samples.bench.batch_rivals import Engine, compare
from shortstack.samples.bench.engines import turn_order
from shortstack.samples.bench.footprint import disk_section, load_section, memory_section
from shortstack.samples.bench.pipe import bundle_worker
from shortstack.samples.bench.report import Section
from shortstack.samples.bench.rivals import GENAI, LLAMA, Rival, check_genai, check_llama, find_rivals
from shortstack.samples.bench.sections import engines_section
from shortstack.samples.bench.settings import Settings

EXIT_LAYER, DRAFT_VOCAB = 3, 64
TEXT = list(range(10, 40))
SCRIPT = str(Path(__file__).with_name("scripted_worker.py"))


def scripted(name: str) -> Rival:
    return Rival(name, "1.0", sys.executable, SCRIPT, Path(SCRIPT))


def by_name(section: Section) -> dict[str, Any]:
    return {row.what: row for row in section.rows}


@pytest.fixture
def quantized(models: Artifacts, tmp_path: Path) -> Artifacts:
    """Bundles that lie where quantized ones would; these tests do not look into them."""
    for name in ("uncut", f"exit-{EXIT_LAYER}", f"exit-{EXIT_LAYER}-vocab-{DRAFT_VOCAB}"):
        (tmp_path / f"{name}-int4").symlink_to(models.folder / name)
    return replace(models, quantized_folder=tmp_path, precision="int4", preset="int4")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_worker_goes_first_and_follows_each_other_one_equally_often(workers: int) -> None:
    orders = [turn_order(workers, chunk) for chunk in range(2 * workers)]
    assert all(sorted(order) == list(range(workers)) for order in orders)
    assert set(Counter(order[0] for order in orders).values()) == {2}
    behind = Counter(pair for order in orders for pair in pairwise(order))
    assert len(behind) == workers * (workers - 1)
    assert len(set(behind.values())) <= 1


def test_several_rivals_take_turns_in_one_run(quantized: Artifacts, small: Settings) -> None:
    rows = by_name(engines_section(quantized, EXIT_LAYER, TEXT, 1, [scripted(GENAI), scripted(LLAMA)], small))
    for name in (GENAI, LLAMA):
        assert rows[f"ms per token of {name}, prompt 5"].shown == "500.00 [500.00, 500.00]"
        speed = rows[f"speed over {name}, prompt 5"]
        assert (speed.goal, speed.is_met) == (">= 1", True)
        assert rows[f"tokens equal to {name}'s, prompt 5"].is_met is None
    assert "not compared" not in {row.shown for row in rows.values()}


def test_a_rival_that_is_absent_is_named_and_the_rest_measured(quantized: Artifacts, small: Settings) -> None:
    rows = by_name(engines_section(quantized, EXIT_LAYER, TEXT, 1, [scripted(GENAI)], small))
    assert rows[LLAMA].shown == "not compared"
    assert f"speed over {GENAI}, prompt 5" in rows
    rows = by_name(engines_section(replace(quantized, precision="fp32"), EXIT_LAYER, TEXT, 1, [], small))
    assert list(rows) == [GENAI, "ms per token, prompt 5", "host overhead of a step, %, prompt 5"]


def test_loading_is_judged_against_genai_where_weights_are_quantized(
    models: Artifacts, quantized: Artifacts, small: Settings
) -> None:
    both = [scripted(GENAI), scripted(LLAMA)]
    rows = by_name(load_section(quantized, EXIT_LAYER, TEXT, both, small))
    assert rows[f"load / {GENAI}"].is_met
    assert rows[f"load / {LLAMA}"].is_met is None
    assert rows[f"load of {GENAI}, ms"].value == 1e6
    assert rows[f"load and first token of {LLAMA}, ms"].value == pytest.approx(1e6 + 500)
    rows = by_name(load_section(models, EXIT_LAYER, TEXT, both[:1], small))
    assert rows[f"load / {GENAI}"].is_met is None


def test_sizes_of_rivals_are_listed_next_to_ours_on_disk_and_in_memory(quantized: Artifacts, small: Settings) -> None:
    rows = by_name(disk_section(quantized, EXIT_LAYER, [scripted(LLAMA)], small, max_mb=0.0))
    assert rows[f"{LLAMA}, MB"].value == stored_bytes(Path(SCRIPT)) / 1e6
    assert rows["full exit head, MB"].is_met is False
    rows = by_name(memory_section(quantized, EXIT_LAYER, TEXT, [scripted(LLAMA)], small))
    assert rows[f"{LLAMA}, peak MB"].shown == "3 (loaded 1, decoded PSS 2)"


def test_batches_of_engines_are_compared_with_texts_alone_and_with_ours(models: Artifacts) -> None:
    with (
        bundle_worker(models.folder / "uncut", 1) as alone,
        bundle_worker(models.folder / "uncut", 1, 3) as together,
        scripted(GENAI).start(1) as rival,
    ):
        engines = {"shortstack": Engine(alone, together), GENAI: Engine(rival, rival)}
        said: list[str] = []
        ours, other = compare(engines, [TEXT[:4], TEXT[4:8], TEXT[8:12]], 5, 2, said.append)
        whole = together.ask("batch", prompts=[TEXT[:4], TEXT[4:8], TEXT[8:12]], tokens=5)
    assert said == ["round 0 of 2", "round 1 of 2", "round 2 of 2"]
    assert (ours.engine, ours.same_texts, ours.of_ours) == ("shortstack", 3, 1.0)
    assert [len(tokens) for tokens in whole["tokens"]] == [5, 5, 5]
    assert (other.gain, other.cpu_gain, other.same_texts) == (3.0, 3.0, 3)
    assert (other.alone_tokens_per_s, other.batch_tokens_per_s) == (2.0, 6.0)
    assert other.of_ours == pytest.approx(ours.batch_tokens_per_s / 6, rel=0.5)


def test_a_rival_that_is_not_installed_is_left_out_and_its_remedy_shown(
    models: Artifacts, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def absent(python: str) -> str:
        raise DependencyError(f"{python} has no engine", remedy="run: pip install engine")

    monkeypatch.setattr(rivals, "check_genai", absent)
    monkeypatch.setattr(rivals, "check_llama", absent)
    assert find_rivals(models, "python", "python") == []
    said = capfd.readouterr().err
    assert "onnxruntime-genai is left out" in said
    assert "pip install engine" in said
    assert LLAMA not in said  # its file has one precision, and fp32 is not it
    assert find_rivals(replace(models, precision="int4"), "python", "python") == []
    assert "it runs GGUF files" in capfd.readouterr().err


def test_llama_decodes_the_checkpoint_itself(models: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "check_llama", lambda python: "0.3")
    monkeypatch.setattr(rivals, "check_genai", lambda python: "0.18")
    monkeypatch.setattr(rivals, "build_genai", lambda source, folder, precision, python: folder / precision)
    source = Path("model.gguf")
    genai, llama = find_rivals(replace(models, checkpoint=source, precision="int4"), "one", "other")
    assert (genai.python, genai.model) == ("one", models.genai_folder / "int4")
    assert (llama.python, llama.model, llama.version) == ("other", source, "0.3")


def test_an_interpreter_without_an_engine_is_named_with_the_remedy() -> None:
    with pytest.raises(DependencyError, match="false -m pip install onnxruntime-genai"):
        check_genai("false")
    with pytest.raises(DependencyError, match="false -m pip install llama-cpp-python"):
        check_llama("false")


def test_a_quantized_bundle_is_made_from_the_exported_one(
    models: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sequence[str]] = []
    monkeypatch.setattr(artifacts, "make", lambda command, what: made.append(command[3:]))
    found = replace(models, quantized_folder=tmp_path, precision="int4", preset="int4-k-quant")
    out = found.bundle(EXIT_LAYER)
    assert out == tmp_path / "exit-3-int4-k-quant"
    source = str(models.folder / "exit-3")
    assert made == [["quantize", source, str(out), "--preset", "int4-k-quant", "--no-report"]]
    assert found.description == "int4, preset int4-k-quant"
    rounded = replace(found, preset="int4", method="rtn")
    assert rounded.bundle(EXIT_LAYER).name == "exit-3-int4-rtn"
    assert made[1][-3:] == ["--method", "rtn", "--no-report"]
    assert rounded.description == "int4, rounded by rtn"
    assert replace(found, preset="int4").description == "int4"
    assert models.description == "fp32"


def test_bundles_of_older_sources_are_removed(models: Artifacts, tmp_path: Path) -> None:
    for name in ("bundles-0123", "quantized-0123", "something else"):
        (tmp_path / name).mkdir()
    found = open_artifacts(models.checkpoint, tmp_path, "int4")
    kept = (found.folder, found.quantized_folder, found.genai_folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(p.name for p in kept), "something else"])
    assert open_artifacts(models.checkpoint, tmp_path).folder == found.folder  # the same for every precision


def test_a_preset_without_a_precision_is_refused() -> None:
    result = CliRunner().invoke(bench, ["--preset", "int4"])
    assert result.exit_code == 2
    assert "name a --precision" in result.output


class ScriptedLlama(SimpleNamespace):
    """The functions of llama.cpp that the worker calls; the likeliest next token is always the last one plus one."""

    llama_token = ctypes.c_int32
    vocab = 16

    def __init__(self) -> None:
        super().__init__(decoded=[], contexts=[], cleared=0)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: SimpleNamespace()  # a function that only has to be there

    def llama_log_callback(self, function: Any) -> Any:
        return function

    def llama_vocab_n_tokens(self, vocab: Any) -> int:
        return self.vocab

    def llama_init_from_model(self, model: Any, params: Any) -> Any:
        self.contexts.append(params)
        return params

    def llama_n_ctx(self, context: Any) -> int:
        return context.n_ctx

    def llama_memory_clear(self, memory: Any, data: bool) -> None:
        self.cleared += 1

    def llama_batch_get_one(self, ids: Any, count: int) -> list[int]:
        return list(ids)[:count]

    def llama_decode(self, context: Any, batch: list[int]) -> int:
        self.decoded.append(batch)
        return 0

    def llama_get_logits_ith(self, context: Any, row: int) -> Any:
        assert row == -1
        self.logits = (ctypes.c_float * self.vocab)()
        self.logits[self.decoded[-1][-1] + 1] = 1.0
        return ctypes.cast(self.logits, ctypes.POINTER(ctypes.c_float))


def test_the_llama_worker_decodes_one_token_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = ScriptedLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", llama)
    monkeypatch.syspath_prepend(str(Path(artifacts.__file__).parent))
    for name in ("llama_worker", "memory", "serve"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    worker = importlib.import_module("llama_worker").Worker("model.gguf", 2)
    ask = worker.operations()
    assert worker.load_s > 0
    assert ask["start"](prompt=[3, 4, 5], tokens=4)["tokens"] == [6]
    assert ask["chunk"](count=3)["tokens"] == [7, 8, 9]
    assert llama.decoded == [[3, 4, 5], [6], [7], [8]]
    (context,) = llama.contexts
    assert (context.n_threads, context.n_threads_batch, context.n_ctx) == (2, 2, 7)
    ask["start"](prompt=[1], tokens=2)
    assert (len(llama.contexts), llama.cleared) == (1, 1)  # there was room
    ask["start"](prompt=[1], tokens=20)
    assert [context.n_ctx for context in llama.contexts] == [7, 21]
    assert ask["memory"]()["peak_bytes"] > 0
