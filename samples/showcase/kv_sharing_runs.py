"""The models that the table of K,V maps compares: their data, their training from scratch, and what each is worth.

::

    OUT/settings.json     what everything below depends on
    OUT/data/             train.jsonl: the task's rows and texts to recall; held_out.jsonl: rows of the task;
                          recall.jsonl, copy.jsonl: texts to probe with
    OUT/start/            config and tokenizer
    OUT/runs/NAME-SEED/   the recipe's report and picture, its state while it runs, and its progress if others ran too
    OUT/models/NAME-SEED/ the trained model in float16
    OUT/quality/NAME-SEED.json
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shortstack.export.twin.folder import load_twin, save_twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_map import parse_kv_map
from shortstack.graphs.spec import ModelSpec
from shortstack.graphs.spec_json import llama_spec
from shortstack.samples.bench.report import progress
from shortstack.samples.recipes.kv_sharing import KVSharingSpec, train
from shortstack.samples.recipes.new_model import new_model
from shortstack.samples.recipes.training.data import Example, read_examples, read_texts
from shortstack.samples.recipes.training.loop import STATE_FILE, LoopSpec
from shortstack.samples.recipes.training.measure import measure_depths
from shortstack.samples.recipes.training.settings import check_settings
from shortstack.samples.recipes.training.source import open_source
from shortstack.samples.showcase.recall import Kind, completed, draw_rows

PLAIN = "plain"
_PROMPT, _COMPLETION = "{prompt}", "{completion}"
_PROBES: tuple[Kind, ...] = ("recall", "copy")
_HELD_OUT_SEED, _TRAIN_SEED = 1, 0
_LONGEST_TEXT = 512


@dataclass(frozen=True, slots=True)
class RunsSpec:
    """What is trained; the fields are those of the command. Texts are cut at 512 tokens, however long the context."""

    data: str
    prompt: str
    completion: str
    held_out_rows: int
    recall_rows: int
    probe_rows: int
    layers: int
    kv_layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    initializer_range: float
    exit_layer: int
    steps: int
    batch_size: int
    lr: float

    def maps(self) -> dict[str, tuple[int, ...]]:
        """Return the maps that are compared, by name."""
        shared = ("pizza-bottom", "lasagna-bottom", "sandwich-middle", "sandwich-top")
        found = {name: parse_kv_map(f"{name}:{self.kv_layers}", self.layers) for name in shared}
        return {PLAIN: parse_kv_map("none", self.layers), **found}

    def model(self) -> ModelSpec:
        """Return the model without sharing."""
        return llama_spec(
            model_type="llama",
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=-(-self.hidden * 8 // 3 // 32) * 32,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            vocab_size=self.vocab,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
        )


def prepare(out: Path, data: Path, spec: RunsSpec) -> None:
    """Write settings, data and the model to start from, unless they are there.

    Raises:
        RequestError: The folder holds something made with other settings, or the data does not fit.
    """
    settings = out / "settings.json"
    if settings.exists():
        found, wanted = json.loads(settings.read_text(encoding="utf-8")), asdict(spec)
        check_settings(
            f"{out} was made with other settings", found, wanted, "choose another folder, or the same settings"
        )
    else:
        asked, answers = (read_texts(data, *pair) for pair in ((spec.prompt, ""), ("", spec.completion)))
        rows = [{"prompt": "", "completion": f"{ask}{answer}"} for ask, answer in zip(asked, answers, strict=True)]
        if len(rows) < 2 * spec.held_out_rows:
            raise RequestError(f"{data} is too small", found=f"{len(rows)} rows", remedy="lower --held-out-rows")
        held_out = [{**row, "ask": ask} for row, ask in zip(rows, asked, strict=True)][-spec.held_out_rows :]
        recall = [row for kind in _PROBES for row in draw_rows(kind, spec.recall_rows // 2, _TRAIN_SEED, asks_all=True)]
        _write_rows(out / "data" / "train.jsonl", [*rows[: -spec.held_out_rows], *recall])
        _write_rows(out / "data" / "held_out.jsonl", held_out)
        for kind in _PROBES:
            _write_rows(out / "data" / f"{kind}.jsonl", draw_rows(kind, spec.probe_rows, _HELD_OUT_SEED))
        write_json(settings, asdict(spec))
    if not (out / "start").exists():
        new_model(
            out / "start",
            read_texts(out / "data" / "train.jsonl", _PROMPT, _COMPLETION),
            spec.model(),
            spec.initializer_range,
        )


def questions(out: Path, count: int) -> list[str]:
    """Return prompts of held-out rows, spread evenly."""
    lines = (out / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[index * len(lines) // count])["ask"] for index in range(min(count, len(lines)))]


def task_rows(out: Path, spec: RunsSpec, tokenizer: Any, end: Sequence[int]) -> list[Example]:
    """Return the task's rows that were trained on, those to recall left out."""
    rows = _examples(out / "data" / "train.jsonl", tokenizer, end)
    return rows[: len(rows) - 2 * (spec.recall_rows // 2)]


def run(out: Path, spec: RunsSpec, name: str, kv_map: tuple[int, ...], seed: int, device: str) -> dict[str, Any]:
    """Train one model and measure it, or continue to; return what it is worth, JSON-ready."""
    label = f"{name}-{seed}"
    result, folder, model = out / "quality" / f"{label}.json", out / "runs" / label, out / "models" / label
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    torch.manual_seed(seed)  # draws the weights: those that two maps have in common start equal
    source = open_source(str(out / "start"), from_scratch=True)
    data = out / "data"
    recipe = KVSharingSpec(
        kv_map, keys_values="target", exit_layers=(spec.exit_layer,), scale="equal", batch_size=spec.batch_size
    )
    loop = LoopSpec(steps=spec.steps, peak_rate=spec.lr, warmup_steps=min(20, spec.steps), seed=seed)
    settings = {**asdict(spec), "kv_map": list(kv_map), "seed": seed}
    examples = _examples(data / "train.jsonl", source.tokenizer, source.end)
    held_out = _examples(data / "held_out.jsonl", source.tokenizer, source.end)
    report = train(source, examples, held_out, recipe, loop, folder, device, settings)
    shutil.rmtree(model, ignore_errors=True)
    save_twin(load_twin(str(folder / "model")), model, source.files, dtype=torch.float16)
    twin = load_twin(str(model)).eval()
    depths = measure_depths(twin, held_out, (spec.exit_layer,))
    quality: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in twin.parameters()),
        "perplexity": depths[spec.layers].perplexity,
        "exit_perplexity": depths[spec.exit_layer].perplexity,
        **{
            kind: completed(twin, _examples(data / f"{kind}.jsonl", source.tokenizer, ())).to_json() for kind in _PROBES
        },
        "tokens": report["tokens"],
        "training_s": report["training_s"],
    }
    write_json(result, quality)
    (folder / STATE_FILE).unlink()  # nothing continues from here, and it is ten times the model
    shutil.rmtree(folder / "model")
    return quality


def run_all(
    out: Path, spec: RunsSpec, seeds: int, device: str, jobs: int, threads: int
) -> dict[str, list[dict[str, Any]]]:
    """Train and measure every map with every seed, all maps with one seed before the next seed.

    Args:
        out: The folder, prepared.
        spec: What is trained.
        seeds: How many.
        device: Where to train.
        jobs: Models trained at once, each in a process of its own if there are more than one.
        threads: Threads of each.

    Returns:
        By map, what the model of each seed is worth.
    """
    todo = [(name, kv_map, seed) for seed in range(seeds) for name, kv_map in spec.maps().items()]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in spec.maps()}
    if jobs == 1:
        torch.set_num_threads(threads)
        for name, kv_map, seed in todo:
            progress(f"{name}, seed {seed}")
            found[name].append(run(out, spec, name, kv_map, seed, device))
        return found
    start, done = time.monotonic(), 0
    progress(f"{len(todo)} models, {jobs} at once; each one's progress is in {out / 'runs'}")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_run_aside, out, spec, *one, device, threads): one for one in todo}
        try:
            for future in as_completed(running):
                future.result()
                done += 1
                left = (time.monotonic() - start) / done * (len(todo) - done)
                name, _, seed = running[future]
                progress(f"{name}, seed {seed}: {done} of {len(todo)} done, the others take about {left / 60:.0f} min")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # once the models that are being trained are done
            raise
        for future, (name, _, _) in running.items():
            found[name].append(future.result())
    return found


def _run_aside(
    out: Path, spec: RunsSpec, name: str, kv_map: tuple[int, ...], seed: int, device: str, threads: int
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    log = out / "runs" / f"{name}-{seed}" / "progress.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as said, contextlib.redirect_stderr(said):
        return run(out, spec, name, kv_map, seed, device)


def write_json(file: Path, content: Any) -> None:
    """Write a file under another name, then rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _examples(file: Path, tokenizer: Any, end: Sequence[int]) -> list[Example]:
    return read_examples(file, tokenizer, _PROMPT, _COMPLETION, end, _LONGEST_TEXT)


def _write_rows(file: Path, rows: Sequence[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
