"""Exits with random weights, written as a folder of trained exits; runs of single graphs without the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from shortstack.export.twin.exits import ExitNode, save_exits, states_before
from shortstack.export.twin.folder import load_twin
from shortstack.export.twin.layer import unit_rms
from shortstack.export.twin.model import Twin
from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle, open_bundle
from shortstack.graphs.contract import Port
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.spec import ModelSpec
from shortstack.threads import make_thread_pool

Array = npt.NDArray[np.float32]


def random_exit(spec: ModelSpec, exit_spec: ExitSpec) -> ExitNode:
    """Return an exit in which every weight matters: none is zero, one or an identity."""
    node = ExitNode(spec, exit_spec)
    with torch.no_grad():
        for name, parameter in node.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        if node.head.ids is not None:
            node.head.ids.copy_(torch.randperm(spec.vocab_size)[: len(node.head.ids)].sort().values)
    return node


def write_random_exits(checkpoint: Path, folder: Path, *exits: ExitSpec) -> tuple[Twin, tuple[ExitNode, ...]]:
    """Write random exits for a checkpoint, in float32; return the twin and the exits."""
    twin = load_twin(str(checkpoint)).eval()
    nodes = tuple(random_exit(twin.spec, exit_spec) for exit_spec in exits)
    save_exits(folder, twin.spec, nodes, dtype=np.float32)
    return twin, nodes


class CachedGraphs:
    """Runs all graphs of a bundle over one cache in plain arrays, on texts [batch, seq] in pieces from any position.

    Attributes:
        caches: Keys and values by the name of their graph input.
    """

    def __init__(self, folder: Path, batch: int, capacity: int) -> None:
        self.bundle = open_bundle(folder)
        self._sessions = [session_of(self.bundle, s.index) for s in self.bundle.manifest.plan.segments]
        self.caches: dict[str, np.ndarray] = {}
        for segment in self.bundle.manifest.plan.segments:
            past = {names.past(j, p) for j in self.bundle.manifest.cache_types(segment) for p in names.KV_PARTS}
            ports = [port for port in self.bundle.manifest.contract(segment).inputs if port.name in past]
            self.caches |= {port.name: _empty(port, batch, capacity) for port in ports}

    def run(self, tokens: npt.NDArray[np.int64], past: int, rows: int, state: Array) -> list[dict[str, Array]]:
        """Run one piece of the texts; return the outputs of each graph by name.

        Args:
            tokens: The token ids of the piece.
            past: Number of positions before it.
            rows: ``num_rows``.
            state: The states for exits that see states, [batch, rows, hidden].
        """
        batch, seq = tokens.shape
        feeds: dict[str, np.ndarray] = {
            names.INPUT_IDS: tokens,
            names.SEQLENS_K: np.full(batch, past + seq - 1, np.int32),
            names.TOTAL_SEQUENCE_LENGTH: np.array(past + seq, np.int32),
            names.NUM_ROWS: np.array(rows),
        }
        results = []
        for segment, session in zip(self.bundle.manifest.plan.segments, self._sessions, strict=True):
            contract = self.bundle.manifest.contract(segment)
            feeds[names.EXIT_STATE] = state.astype(self.bundle.manifest.dtype)
            wanted = [port.name for port in contract.outputs]
            lent = {name.replace("past_key_values.", "shared."): cache for name, cache in self.caches.items()}
            given = {port.name: (feeds | self.caches | lent)[port.name] for port in contract.inputs}
            found = dict(zip(wanted, session.run(wanted, given), strict=True))
            for owner in self.bundle.manifest.cache_types(segment):
                for part in names.KV_PARTS:
                    self.caches[names.past(owner, part)] = found[names.present(owner, part)]
            results.append(found)
            if not segment.is_last:
                feeds[names.HIDDEN_STATES] = found[names.HIDDEN_STATES_OUT]
        return results


def run_graphs(folder: Path, tokens: npt.NDArray[np.int64], rows: int, state: Array) -> list[dict[str, Array]]:
    """Run every graph of a bundle on whole texts [batch, seq] with an empty cache; see :meth:`CachedGraphs.run`."""
    batch, seq = tokens.shape
    return CachedGraphs(folder, batch, seq + 1).run(tokens, 0, rows, state)


def session_of(bundle: Bundle, index: int) -> ort.InferenceSession:
    """Open one graph with the threads that all sessions of a process share."""
    make_thread_pool()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    path = bundle.graph_path(bundle.manifest.plan.segments[index])
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _empty(port: Port, batch: int, capacity: int) -> np.ndarray:
    sizes = {"batch": batch, "capacity": capacity}
    return np.zeros([d if isinstance(d, int) else sizes[d] for d in port.shape], port.dtype)


@dataclass(frozen=True)
class Expected:
    """The twin's results of one exit at all positions: logits, estimate of the state, confidence."""

    logits: Array
    state: Array | None
    gate: Array | None


@torch.no_grad()
def expected_exits(
    twin: Twin, nodes: Sequence[ExitNode], tokens: npt.NDArray[np.int64], state: Array
) -> list[Expected]:
    """Return the twin's results of each exit; exits that see states receive ``state`` [batch, seq, hidden]."""
    ids = torch.from_numpy(tokens)
    found = twin.boundaries(ids, {node.exit_spec.exit_layer for node in nodes})
    results = []
    for node in nodes:
        boundary = found[node.exit_spec.exit_layer]
        out = node(boundary, twin.embedded(ids), torch.from_numpy(state), twin)
        results.append(
            Expected(
                out.logits.numpy(),
                None if out.state is None else out.state.numpy(),
                None if out.gate is None else out.gate.numpy(),
            )
        )
    return results


@torch.no_grad()
def true_states(twin: Twin, tokens: npt.NDArray[np.int64]) -> Array:
    """Return the model's state at every position, [batch, seq, hidden]."""
    depth = twin.spec.num_hidden_layers
    hidden = twin.boundaries(torch.from_numpy(tokens), (depth,))[depth].hidden
    return np.asarray(unit_rms(hidden, twin.spec.norm_eps).numpy())


def before(states: Array) -> Array:
    """Return the states, each moved to the next position."""
    return np.asarray(states_before(torch.from_numpy(states)).numpy())
