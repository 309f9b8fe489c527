"""A batch on several workers of a local Ray: one dies, and nobody sees it in the answers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.quantized import QuantizedBundles, preset
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.__main__ import run
from shortstack.graphs.precision import BlockFormat
from shortstack.runtime import load
from shortstack.runtime.workers import ray_pool
from shortstack.runtime.workers.ray_generator import RayGenerator

pytest.importorskip("ray", reason="the extra [ray] is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:::ray")  # what Ray's own modules say to each other

TEXTS = [f"Text number {number}" for number in range(16)]


@pytest.fixture(scope="module")
def bundle(tiny_bundles: TinyBundles, quantized: QuantizedBundles) -> Path:
    return quantized(tiny_bundles.bundle(SPECULATOR, 1, 3), preset(BlockFormat(4), "int8"))


def test_a_worker_that_is_killed_loses_no_line_and_answers_none_twice(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker dies with finished answers in its hands, which is when a line could get lost or come twice."""
    deaths = tmp_path / "deaths"

    class Mortal(RayGenerator):
        def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
            answers = super().__call__(batch)
            if any(TEXTS[9] in line for line in batch["line"]) and not deaths.exists():
                deaths.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return answers

    monkeypatch.setattr(ray_pool, "RayGenerator", Mortal)
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS), encoding="utf-8")
    options = ["-n", "8", "--slots", "2", "--ray", "local", "--workers", "2", "--threads", "1", "--json"]
    assert run(["batch", str(bundle), str(prompts), "-o", str(out), *options]) == 0
    printed = capsys.readouterr()
    assert deaths.exists()
    assert "a worker died" in printed.err
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert sorted(int(entry["id"]) for entry in found) == list(range(1, len(TEXTS) + 1))
    with load(bundle) as model:
        alone = {str(number): model.generate(text, max_new_tokens=8) for number, text in enumerate(TEXTS, 1)}
    for entry in found:
        result = alone[entry["id"]]
        assert (entry["text"], entry["tokens"]) == (result.text, list(result.tokens))
    totals = json.loads(printed.out)
    assert (totals["answers"], totals["failed"]) == (len(TEXTS), 0)
    assert totals["tokens"] == sum(len(result.tokens) for result in alone.values())


def test_what_a_worker_cannot_load_ends_the_batch_in_one_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    class Elsewhere(RayGenerator):
        def __init__(self, bundle: Path, **options: Any) -> None:
            super().__init__(tmp_path / "no bundle", **options)

    monkeypatch.setattr(ray_pool, "RayGenerator", Elsewhere)
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"text": "a"}\n', encoding="utf-8")
    refused(
        ["batch", bundle, prompts, "-o", tmp_path / "out.jsonl", "--ray", "local", "--threads", "1"],
        "the workers failed",
        "no bundle does not exist",
    )
