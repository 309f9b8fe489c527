"""What a worker of Ray Data answers, and how the command shares lines and cores; without Ray."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.quantized import QuantizedBundles, preset
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.batch import RayGenerator
from shortstack.graphs.errors import RequestError
from shortstack.graphs.precision import BlockFormat
from shortstack.runtime import (
    DraftPolicy,
    ExitEarly,
    ExitPolicy,
    Model,
    Plain,
    Request,
    SamplingParams,
    Speculate,
    load,
    parse_criterion,
)
from shortstack.runtime.batch.answers import digest_of
from shortstack.runtime.batch.lines import Line
from shortstack.runtime.workers.ray_pool import RayPool, Work, share_cores


@pytest.fixture(scope="module")
def bundle(tiny_bundles: TinyBundles, quantized: QuantizedBundles) -> Path:
    return quantized(tiny_bundles.bundle(SPECULATOR, 1, 3), preset(BlockFormat(4), "int8"))


@pytest.fixture(scope="module")
def one(bundle: Path) -> Iterator[Model]:
    with load(bundle) as model:
        yield model


@pytest.fixture(scope="module")
def worker(bundle: Path, one: Model) -> RayGenerator:
    return RayGenerator(bundle, slots=2, threads=None, max_new_tokens=6)


def batch_of(*lines: Any) -> dict[str, Any]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return {"line": np.array(texts, dtype=object)}


def answers_in(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in batch["answer"]]


def test_a_worker_answers_every_form_of_line_in_its_place(worker: RayGenerator, one: Model) -> None:
    openai = {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 4}}
    lines = [{"id": "a", "text": "Once upon"}, openai, {"id": 3, "prompt": "hello", "max_new_tokens": 5}]
    found = worker({**batch_of(*lines), "page": np.array([7, 8, 9])})
    first, second, third = answers_in(found)
    assert (first["id"], first["tokens"]) == ("a", list(one.generate("Once upon", max_new_tokens=6).tokens))
    assert second["custom_id"] == "c"
    assert second["response"]["body"]["choices"][0]["text"] == one.generate("Once", max_new_tokens=4).text
    hello = [{"role": "user", "content": "hello"}]
    assert (third["id"], third["tokens"]) == ("3", list(one.generate(hello, max_new_tokens=5).tokens))
    assert list(found["page"]) == [7, 8, 9]
    assert "line" not in found
    assert [json.loads(stats)["emitted"] for stats in found["stats"]] == [len(first["tokens"]), 4, len(third["tokens"])]


def test_a_line_without_an_id_has_its_number_in_the_file(worker: RayGenerator) -> None:
    (found,) = answers_in(worker({**batch_of({"text": "a"}), "number": np.array([12])}))
    assert found["id"] == "12"
    (without,) = answers_in(worker(batch_of({"text": "a"})))
    assert without["id"] == ""
    assert "id: found None" in without["error"]


def test_a_wrong_line_is_an_error_in_its_own_answer(worker: RayGenerator, one: Model) -> None:
    long = "a b " * one.bundle.manifest.max_length
    url = {"custom_id": "u", "url": "/v1/embeddings", "body": {}}
    lines = [
        "{",
        {"id": "x", "text": 3},
        {"id": "l", "text": long},
        url,
        "[1]",
        {"id": "e", "text": "a", "exit_layer": 2},
    ]
    *wrong, right = answers_in(worker(batch_of(*lines, {"id": "y", "text": "a"})))
    assert [each.get("custom_id", each["id"]) for each in wrong] == ["", "x", "l", "u", "", "e"]
    assert [
        words in str(each)
        for each, words in zip(wrong, ("JSON", "text", "too long", "url", "[1]", "exit"), strict=True)
    ]
    assert wrong[3]["response"]["status_code"] == 400
    assert all("error" in each for each in wrong)
    assert right["text"] == one.generate("a", max_new_tokens=6).text


def test_a_batch_without_lines_is_refused(worker: RayGenerator) -> None:
    with pytest.raises(RequestError, match="needs a column 'line': found text"):
        worker({"text": np.array(["a"])})


def test_the_class_and_what_the_command_sends_with_it_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(RayGenerator)) is RayGenerator
    policy = ExitPolicy(parse_criterion("top_prob >= auto"))
    for strategy in (Plain(), Speculate(8, DraftPolicy(4)), ExitEarly(policy)):
        sent = {"strategy": strategy, "sampling": SamplingParams(temperature=0.5, seed=1), "stop": ("x",)}
        assert pickle.loads(pickle.dumps(sent)) == sent


def test_importing_the_public_name_does_not_import_ray() -> None:
    script = "import sys, shortstack.batch\nsys.exit('imported' if 'ray' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class ScriptedRay:
    """Ray Data with one worker in this process, which gives back some blocks twice."""

    def __init__(self, twice: bool = False) -> None:
        self.data = self
        self.exceptions = SimpleNamespace(RayError=ConnectionError)
        self._copies = 1 + twice
        self.blocks: list[list[dict[str, Any]]] = []

    def from_items(self, rows: list[dict[str, Any]], override_num_blocks: int) -> ScriptedRay:
        size = -(-len(rows) // override_num_blocks)
        self.blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
        return self

    def ActorPoolStrategy(self, **options: Any) -> None:  # noqa: N802 - Ray's name
        pass

    def map_batches(self, fn: Any, *, fn_constructor_kwargs: dict[str, Any], **options: Any) -> ScriptedRay:
        self._worker = fn(**fn_constructor_kwargs | {"threads": None})  # this process has its pool already
        return self

    def iter_batches(self, **options: Any) -> Iterator[dict[str, Any]]:
        for block in self.blocks:
            for _ in range(self._copies):
                yield self._worker({name: [row[name] for row in block] for name in block[0]})


def lines_of(model: Model, *texts: str) -> list[tuple[Line, str]]:
    found = []
    for number, text in enumerate(texts, 1):
        request = Request(text, max_new_tokens=4, reuse_cache=True)
        line = Line(str(number), request, number=number, text=json.dumps({"text": text}))
        found.append((line, digest_of(line, model.bundle.manifest.weights_sha256)))
    return found


def test_a_block_that_ran_twice_is_answered_once(bundle: Path, one: Model) -> None:
    lines = lines_of(one, "a", "b", "c", "d", "e")
    ray = ScriptedRay(twice=True)
    found = list(RayPool(ray, workers=2, threads=1).answers(Work(bundle, 2, {"max_new_tokens": 4}), lines))
    assert len(ray.blocks) == 3
    assert sorted(entry["id"] for entry, _ in found) == ["1", "2", "3", "4", "5"]


def test_nothing_is_sent_where_all_lines_are_answered(bundle: Path) -> None:
    assert list(RayPool(None, workers=2, threads=1).answers(Work(bundle, 2, {}), [])) == []


def test_an_answer_of_another_model_is_not_taken(bundle: Path, one: Model) -> None:
    lines = [(line, "0" * 16) for line, _ in lines_of(one, "a")]
    with pytest.raises(RequestError, match="a worker has another model"):
        list(RayPool(ScriptedRay(), workers=1, threads=1).answers(Work(bundle, 2, {"max_new_tokens": 4}), lines))


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "shared"),
    [
        ([2], None, None, (1, 2)),
        ([2], 2, None, (2, 1)),
        ([8], 3, None, (3, 2)),
        ([0, 16, 16], None, None, (2, 16)),
        ([10, 10], 3, None, (3, 5)),
        ([4, 16], 2, None, (2, 4)),
        ([4, 4], 2, 3, (2, 3)),
    ],
)
def test_workers_share_the_cores_of_all_machines(
    cores: list[int], workers: int | None, threads: int | None, shared: tuple[int, int]
) -> None:
    assert share_cores(cores, workers, threads) == shared


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [([2], 3, None), ([4, 4], 2, 5), ([0], None, None), ([], 1, 1)]
)
def test_more_workers_than_fit_are_refused(cores: list[int], workers: int | None, threads: int | None) -> None:
    with pytest.raises(RequestError, match=r"workers at most|no core"):
        share_cores(cores, workers, threads)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--workers", "2"], ["--workers would have no effect", "--ray local"]),
        (["--ray", "local", "--provider", "cpu"], ["--provider would have no effect"]),
        (["--ray", "local", "--slots", "0"], ["slots: found 0"]),
        (["--ray", "local", "--threads", "0"], ["threads: found 0"]),
        (["--ray", "local"], ["needs 'ray', which is not installed", "pip install"]),
    ],
)
def test_what_ray_cannot_do_is_refused_before_anything_is_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any, options: list[str], says: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    refused(["batch", bundle, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *options], *says)
    assert not (tmp_path / "out.jsonl").exists()
