"""Runs graphs of whole models: with plain onnxruntime, and as onnxruntime-genai decodes them where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from helpers.exit_nodes import CachedGraphs
from shortstack.graphs import names
from shortstack.threads import make_thread_pool

TOKENS = 24


def need_genai() -> Any:
    """Return onnxruntime-genai; without it the test is skipped."""
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: the extra genai has it")


class WholeGraph:
    """Any graph of a whole model that onnxruntime-genai could drive, with caches in plain arrays.

    Args:
        path: The graph.
        capacity: Positions of the caches.
        head_dim: Width of the heads, where the graph does not say it.
    """

    def __init__(self, path: Path, capacity: int, head_dim: int = 0) -> None:
        make_thread_pool()
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = [port.name for port in self._session.get_outputs()]
        self._has_positions = any(port.name == "position_ids" for port in self._session.get_inputs())
        self.caches: dict[str, npt.NDArray[Any]] = {}
        for port in self._session.get_inputs():
            if port.name.startswith("past_key_values."):
                dtype = np.int8 if "int8" in port.type else np.float32
                _, heads, _, width = port.shape
                width = width if isinstance(width, int) else head_dim
                self.caches[port.name] = np.zeros((1, heads, capacity, width), dtype)

    def run(self, tokens: list[int], past: int) -> npt.NDArray[np.float32]:
        """Run one piece of a text; return the logits of its positions, [seq, vocab]."""
        total = past + len(tokens)
        feeds: dict[str, Any] = {
            names.INPUT_IDS: np.array([tokens], np.int64),
            names.ATTENTION_MASK: np.ones((1, total), np.int64),
            **self.caches,
        }
        if self._has_positions:
            feeds["position_ids"] = np.arange(past, total, dtype=np.int64)[None]
        found = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        self.caches = {name: found[name.replace("past_key_values.", "present.")] for name in self.caches}
        return np.asarray(found[names.LOGITS][0], np.float32)


def genai_tokens(folder: Path, prompt: list[int], count: int = TOKENS, **options: Any) -> list[int]:
    """Return what onnxruntime-genai decodes greedily; without the token that ends a text."""
    genai = need_genai()
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + count, **options)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def segment_tokens(folder: Path, prompt: list[int], count: int = TOKENS) -> list[int]:
    """Return what the segments decode greedily in runs of one row, without the token that ends a text."""
    graphs = CachedGraphs(folder, 1, len(prompt) + count + 1)
    state = np.zeros((1, len(prompt), graphs.bundle.manifest.spec.hidden_size), np.float32)
    piece, past, found = prompt, 0, []
    for _ in range(count):
        token = int(graphs.run(np.array([piece], np.int64), past, 1, state)[-1][names.TOKEN][0, 0])
        if token == 0:
            break
        found.append(token)
        past += len(piece)
        piece = [token]
    return found
