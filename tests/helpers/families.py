"""What is checked of each family, on the tiny models of :mod:`helpers.family_rows`.

A check raises an AssertionError where a family fails it. ``tests/families`` runs every check on every row and compares
with the table of docs/families.md, which ``python -m tests.families`` writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from helpers import tolerances
from helpers.exit_nodes import CachedGraphs, random_exit
from helpers.family_rows import CONTEXT, VOCAB, FamilyRow
from helpers.gguf_cases import CASES
from helpers.gguf_written import logits, written
from helpers.quantized import INT4, INT4_OFFSETS, preset
from helpers.tiny_models import write_tokenizer
from shortstack.export.assemble import export_bundle
from shortstack.export.parity.reference import Reference
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.exits import save_exits
from shortstack.export.twin.folder import load_twin, save_twin
from shortstack.export.twin.sequential import sequential
from shortstack.graphs import names
from shortstack.graphs.plan import ExitSpec
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import ExitPolicy, Model, load, parse_criterion
from shortstack.runtime.commands.row_check import check_rows

TOKENS = 16
EXITS = (1, 2)
PIECES = ((0, 7), (7, 8), (8, 13), (13, CONTEXT))  # of a text that fills the cache


@dataclass
class MadeFamily:
    """The files of one row, each made when it is first asked for."""

    row: FamilyRow
    folder: Path

    @cached_property
    def checkpoint(self) -> Path:
        """The checkpoint folder, as transformers saves it."""
        folder = self.folder / "checkpoint"
        self.row.model().save_pretrained(folder)
        write_tokenizer(folder, VOCAB)
        if self.row.same_as:
            _rename(folder, self.row.model_type)
        if self.row.unread:
            file = folder / "model.safetensors"
            unread = {name: np.ones(shape, np.float32) for name, shape in self.row.unread.items()}
            save_file({**load_file(file), **unread}, file, metadata={"format": "pt"})
        return folder

    @cached_property
    def reference(self) -> Reference:
        """transformers' model."""
        return self.in_transformers(self.checkpoint)

    def in_transformers(self, folder: Path) -> Reference:
        """Return transformers' model of a folder, which may know the family by another name."""
        if not self.row.same_as:
            return Reference(str(folder))
        renamed = shutil.copytree(folder, folder.with_name(f"{folder.name}-in-transformers"))
        _rename(renamed, self.row.same_as)
        (renamed / "model.safetensors").unlink()
        tensors = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in tensors.items() if name not in self.row.unread}
        save_file(kept, renamed / "model.safetensors", metadata={"format": "pt"})
        return Reference(str(renamed))

    @cached_property
    def bundle(self) -> Path:
        """The bundle of floats, cut at the exits."""
        export_bundle(ExportSpec(str(self.checkpoint), self.folder / "bundle", EXITS))
        return self.folder / "bundle"

    @cached_property
    def int4(self) -> Path:
        """The bundle in int4 by GPTQ, with offsets and an int8 cache."""
        return self._quantized("int4", preset(INT4_OFFSETS, "int8", method="gptq"))

    @cached_property
    def int4_float_cache(self) -> Path:
        """The bundle in int4, its cache in floats."""
        return self._quantized("int4-float-cache", preset(INT4, "float"))

    def _quantized(self, name: str, mix: Any) -> Path:
        quantize_bundle(QuantizeSpec(self.bundle, self.folder / name, mix, calibration_tokens=256))
        return self.folder / name

    def text(self, length: int = CONTEXT, seed: int = 0) -> list[int]:
        """Return random token ids."""
        return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def parity(made: MadeFamily) -> None:
    """Logits of every head at every position are transformers', whatever pieces a text comes in, up to a full cache."""
    text, depth = made.text(), made.reference.spec.num_hidden_layers
    wanted = made.reference.run_text(text, (*EXITS, depth)).heads
    graphs = CachedGraphs(made.bundle, 1, CONTEXT)
    for start, end in PIECES:
        piece = np.array([text[start:end]], np.int64)
        found = graphs.run(piece, start, end - start, np.zeros((1, end - start, 64), np.float32))
        for outputs, head in zip(found, wanted.values(), strict=True):
            np.testing.assert_allclose(outputs[names.LOGITS][0], head[start:end], rtol=0, atol=tolerances.TINY.max_abs)


def greedy(made: MadeFamily) -> None:
    """Greedy tokens are transformers', but for near ties."""
    prompt = made.text(9, seed=1)
    ours = load(made.bundle).generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens
    theirs, gaps = made.reference.greedy(prompt, TOKENS)
    fork = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    assert fork is None or gaps[fork] < tolerances.TINY.tie


def speculation(made: MadeFamily) -> None:
    """Drafts of an exit, judged by the whole model, give the tokens of plain decoding."""
    _, drafted = _same_tokens(load(made.bundle), made.text(9, seed=2), strategy="self-speculative")
    assert drafted.stats.drafted


def exits(made: MadeFamily) -> None:
    """Tokens that leave early, judged by the whole model, are those of plain decoding."""
    model = load(made.bundle)
    _, left = _same_tokens(model, made.text(9, seed=3), exits=_verified_exits(model, made))
    assert left.stats.drafted


def int4(made: MadeFamily) -> None:
    """In int4 with an int8 cache, speculation and exits give the tokens of plain decoding, and the text is finite."""
    model = load(made.int4)
    for way in ({"strategy": "self-speculative"}, {"exits": _verified_exits(model, made)}):
        _, other = _same_tokens(model, made.text(9, seed=4), **way)
        assert other.stats.drafted


def rows(made: MadeFamily) -> None:
    """In int4, rows of one run have the bits of rows run one by one, with both kinds of cache."""
    for bundle in (made.int4, made.int4_float_cache):
        with load(bundle) as model:  # which knows whether a row may run alone on this machine
            assert all(check.is_exact for check in check_rows(model, made.text(13, seed=5), most_rows=4))


def training(made: MadeFamily) -> None:
    """The twin computes what transformers does, and after a step of training its folder is a checkpoint of theirs."""
    text, twin = torch.tensor([made.text(24, seed=6)]), load_twin(str(made.checkpoint))
    depth = twin.spec.num_hidden_layers
    with torch.no_grad():
        theirs = made.reference.run_text(text[0].tolist(), (depth,)).heads[depth]
        np.testing.assert_allclose(twin.eval()(text)[0], theirs, rtol=0, atol=tolerances.TINY.max_abs)
        by_definition = sequential(twin, text).logits[0]
        np.testing.assert_allclose(by_definition, theirs, rtol=0, atol=tolerances.TINY.max_abs)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    loss = torch.nn.functional.cross_entropy(twin.train()(text)[0, :-1], text[0, 1:])
    loss.backward()
    optimizer.step()
    files = {file.name: file.read_bytes() for file in made.checkpoint.glob("tokenizer*")}
    save_twin(twin, made.folder / "trained", files)
    trained = made.in_transformers(made.folder / "trained").run_text(text[0].tolist(), (depth,)).heads[depth]
    assert np.abs(trained - theirs).max() > 10 * tolerances.TINY.max_abs
    with torch.no_grad():
        np.testing.assert_allclose(twin.eval()(text)[0], trained, rtol=0, atol=tolerances.TINY.max_abs)


def trained_exits(made: MadeFamily) -> None:
    """Exits with weights of their own compute in the graphs what they compute in PyTorch."""
    twin = load_twin(str(made.checkpoint)).eval()
    second = ExitSpec(2, branch="mlp", norm="own") if made.row.mlp_exits else ExitSpec(2, norm="own", has_gate=True)
    specs = (
        ExitSpec(1, branch="linear", head="own", sees_token=True, linear_mlp=24),
        second,
        ExitSpec(3, branch="block"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        nodes = [random_exit(twin.spec, exit_spec) for exit_spec in specs]
    save_exits(made.folder / "exits", twin.spec, nodes, dtype=np.float32)
    out = made.folder / "bundle-with-exits"
    export_bundle(ExportSpec(str(made.checkpoint), out, exits=made.folder / "exits"))
    text = made.text(11, seed=8)
    found = _run(CachedGraphs(out, 1, CONTEXT), text, 0)
    ids = torch.tensor([text])
    with torch.no_grad():
        boundaries = twin.boundaries(ids, {node.exit_spec.exit_layer for node in nodes})
        for node, outputs in zip(nodes, found, strict=False):
            expected = node.eval()(boundaries[node.exit_spec.exit_layer], twin.embedded(ids), None, twin).logits[0]
            scale = max(1.0, float(expected.std()))
            np.testing.assert_allclose(outputs[names.LOGITS][0], expected, rtol=0, atol=tolerances.TINY.max_abs * scale)


class NoGgufError(Exception):
    """There are no GGUF files of a family, or this version does not read them."""


def gguf(made: MadeFamily) -> None:
    """The bundle of a GGUF file computes what the bundle of the folder does that the file was made from."""
    cases = [case for case in CASES if case.config_class.model_type == made.row.model_type]
    if not cases:
        raise NoGgufError(made.row.model_type)
    folder, file = written(cases[0], made.folder / "gguf")
    ours, theirs = logits(file, made.folder / "of-gguf"), logits(folder, made.folder / "of-folder")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


CHECKS: dict[str, Callable[[MadeFamily], None]] = {
    "parity": parity,
    "greedy": greedy,
    "speculation": speculation,
    "early exit": exits,
    "int4": int4,
    "rows": rows,
    "training": training,
    "trained exits": trained_exits,
    "GGUF": gguf,
}
"""By the heading of their column in docs/families.md."""


def _rename(folder: Path, model_type: str) -> None:
    """Write another family into a config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}), encoding="utf-8")


def _run(graphs: CachedGraphs, tokens: list[int], past: int) -> list[dict[str, Any]]:
    state = np.zeros((1, len(tokens), 64), np.float32)
    return graphs.run(np.array([tokens], np.int64), past, len(tokens), state)


def _verified_exits(model: Model, made: MadeFamily) -> ExitPolicy:
    """Return exits that most tokens take, however flat the model's probabilities are."""
    logits = model.activations(made.text(24, seed=9)).heads[EXITS[0]].astype(np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    least = float((1.0 / odds.sum(-1)).min())  # of the largest probability of each position
    return ExitPolicy(parse_criterion(f"top_prob >= {least:.4f}"), verify="exact")


def _same_tokens(model: Model, prompt: list[int], **way: Any) -> tuple[Any, Any]:
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
    plain = model.generate(prompt, **options)
    other = model.generate(prompt, **way, **options)
    assert len(plain.tokens) == TOKENS
    assert other.tokens == plain.tokens
    return plain, other
