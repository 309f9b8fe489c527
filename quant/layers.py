"""One decoder layer at a time, run by itself over calibration text, so that memory holds one layer only.

::

    hidden [texts, seq, hidden] ── layer as stored ── hidden for the next layer
                                        ├─ the input of each projection: what rounding is weighted by
                                        └─ keys and values: the scales of an int8 cache come from them

Computes in float32, also where the bundle is float16. Knows nothing about how weights are rounded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.contract import GraphContract, Port, cache_heads, cache_shape
from shortstack.graphs.ir.attention import Caches, layer_site
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.head import logits_of
from shortstack.graphs.ir.layer import Residual, Tokens, decoder_layer, norm, residual_sum
from shortstack.graphs.ir.lengths import Lengths
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.kv_map import consumers
from shortstack.graphs.spec import DType, ModelSpec
from shortstack.threads import make_thread_pool, session_options

Floats = npt.NDArray[np.float32]
Weight = Floats | BlockTensor
# Keys and values [texts, kv_heads, seq, head_dim] by ``key`` and ``value``, of producers that other layers use.
Lent = dict[int, dict[str, Floats]]
BATCH_ROWS = 2048  # positions of one run: enough to keep the cores busy, few enough to hold every input

_DTYPE: DType = "float32"
_EMBEDDINGS = "embeddings"


@dataclass(frozen=True, slots=True)
class Taps:
    """What was inside a layer during one batch.

    Attributes:
        inputs: What each projection multiplied [texts * seq, width], by the projection's name.
        cache: Keys and values [texts, kv_heads, seq, head_dim], by ``key`` and ``value``; empty for a consumer.
    """

    inputs: Mapping[str, Floats]
    cache: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Text:
    """What branches on tokens read of some texts.

    Attributes:
        ids: The place of each token in ``used``, int64 [texts, seq]: tables hold the rows of ``used`` alone.
        embeddings: Scaled embeddings [texts, seq, hidden].
        used: The ids of all tokens that occur, ascending.
    """

    ids: npt.NDArray[np.int64]
    embeddings: Floats
    used: npt.NDArray[np.int64]


class LayerGraph:
    """One layer as a session of its own.

    Args:
        spec: The model.
        layer: Which layer.
        weights: Its tensors and the rotary tables, by their names in :mod:`shortstack.graphs.names`: projections as
            blocks, or as floats [in, out]. Tables whose rows are looked up hold the rows that :class:`Text` uses.
        with_taps: Also fetch the inputs of its projections.
    """

    def __init__(self, spec: ModelSpec, layer: int, weights: Mapping[str, Weight], *, with_taps: bool = False) -> None:
        self._spec, self._layer = spec, layer
        self._owner = owner = spec.kv_map[layer]
        lender = names.past if owner == layer else names.shared
        self._cache = {part: lender(owner, part) for part in names.KV_PARTS}
        self._presents = {part: names.present(owner, part) for part in names.KV_PARTS} if owner == layer else {}
        self._taps: dict[str, str] = {}
        cache = cache_shape(spec, owner)
        hidden = ("batch", "seq", spec.hidden_size)

        def build(g: GraphBuilder) -> tuple[GraphContract, dict[str, ir.Value]]:
            reads_tokens = spec.reads_tokens((layer,))
            inputs = (
                Port(names.HIDDEN_STATES, _DTYPE, hidden),
                *([Port(names.INPUT_IDS, "int64", ("batch", "seq")), Port(_EMBEDDINGS, _DTYPE, hidden)] * reads_tokens),
                Port(names.SEQLENS_K, "int32", ("batch",)),
                Port(names.TOTAL_SEQUENCE_LENGTH, "int32", ()),
                *(Port(name, _DTYPE, cache) for name in self._cache.values()),
            )
            values = {port.name: g.input(port) for port in inputs}
            lengths = Lengths(values[names.SEQLENS_K], values[names.TOTAL_SEQUENCE_LENGTH])
            caches = Caches(g)
            tokens = Tokens(values[names.INPUT_IDS], values[_EMBEDDINGS], spec.hidden_size) if reads_tokens else None
            below = Residual(values[names.HIDDEN_STATES])
            x = decoder_layer(g, layer_site(spec, layer), below, lengths, caches, tokens=tokens)
            outputs = {names.HIDDEN_STATES_OUT: residual_sum(g, x, "/hidden_states_out"), **caches.presents()}
            ports = [Port(names.HIDDEN_STATES_OUT, _DTYPE, hidden)]
            ports += [Port(name, _DTYPE, cache) for name in self._presents.values()]
            if with_taps:
                for weight, value in g.projected.items():
                    # A value is fetched once, whichever projections share it, and under one name.
                    known = next((name for name, other in outputs.items() if other is value), None)
                    self._taps[weight] = known or f"input.{weight}"
                    if known is None:
                        if any(value is given for given in values.values()):  # an output needs a name of its own
                            value = g.op("Identity", [value], f"/taps/{weight}")
                        outputs[self._taps[weight]] = value
                        ports.append(Port(self._taps[weight], _DTYPE, ("batch", "seq", "width")))
            return GraphContract(inputs, tuple(ports)), outputs

        self._session = _session(f"layer {layer}", weights, build)

    def run(
        self,
        hidden: Floats,
        watch: Callable[[Taps], None] | None = None,
        lent: Lent | None = None,
        tokens: Text | None = None,
    ) -> Floats:
        """Return the residual stream after the layer, [texts, seq, hidden].

        Args:
            hidden: The residual stream before it.
            watch: Called with the taps of each batch of texts.
            lent: What the layers below lend; what this one lends to others is added. Not needed where none share.
            tokens: The texts themselves, where the layer has a branch on tokens.
        """
        spec, seq = self._spec, hidden.shape[1]
        out = np.empty_like(hidden)
        step = max(1, BATCH_ROWS // seq)
        wanted = [names.HIDDEN_STATES_OUT]
        lends = lent is not None and bool(consumers(spec.kv_map, self._layer))
        if watch is not None or lends:
            wanted += self._presents.values()
        if watch is not None:
            wanted += dict.fromkeys(self._taps.values())
        kept: dict[str, list[Floats]] = {part: [] for part in names.KV_PARTS}
        for start in range(0, len(hidden), step):
            batch = hidden[start : start + step]
            kv_heads, head_dim = cache_heads(spec, self._owner)
            empty = np.zeros((len(batch), kv_heads, seq, head_dim), np.float32)
            caches = dict.fromkeys(names.KV_PARTS, empty)
            if self._owner != self._layer:
                assert lent is not None, f"layer {self._layer} uses what layer {self._owner} lends"
                caches = {part: lent[self._owner][part][start : start + step] for part in names.KV_PARTS}
            feeds: dict[str, npt.NDArray[Any]] = {
                names.HIDDEN_STATES: batch,
                names.SEQLENS_K: np.full(len(batch), seq - 1, np.int32),
                names.TOTAL_SEQUENCE_LENGTH: np.array(seq, np.int32),
                **{name: caches[part] for part, name in self._cache.items()},
            }
            if tokens is not None and spec.reads_tokens((self._layer,)):
                feeds[names.INPUT_IDS] = tokens.ids[start : start + step]
                feeds[_EMBEDDINGS] = tokens.embeddings[start : start + step]
            found = dict(zip(wanted, self._session.run(wanted, feeds), strict=True))
            out[start : start + step] = found[names.HIDDEN_STATES_OUT]
            if watch is not None:
                flat = {port: found[port].reshape(-1, found[port].shape[-1]) for port in set(self._taps.values())}
                watch(
                    Taps(
                        {weight: flat[port] for weight, port in self._taps.items()},
                        {part: found[name] for part, name in self._presents.items()},
                    )
                )
            if lends:
                for part, name in self._presents.items():
                    kept[part].append(found[name])
        if lends:
            assert lent is not None
            lent[self._layer] = {part: np.concatenate(parts) for part, parts in kept.items()}
        return out


class HeadGraph:
    """The final norm and a head as a session of its own.

    Args:
        spec: The model.
        weight: Name of the head's matrix.
        weights: The matrix, blocks or floats [vocab, hidden], and the final norm, by name.
    """

    def __init__(self, spec: ModelSpec, weight: str, weights: Mapping[str, Weight]) -> None:
        hidden = Port(names.HIDDEN_STATES, _DTYPE, ("rows", spec.hidden_size))
        logits = Port(names.LOGITS, _DTYPE, ("rows", "vocab"))

        def build(g: GraphBuilder) -> tuple[GraphContract, dict[str, ir.Value]]:
            normed, _ = norm(g, spec.ends.final_norm, Residual(g.input(hidden)), names.FINAL_NORM, "/norm")
            found = logits_of(g, spec.ends, normed, weight, "/head")
            return GraphContract((hidden,), (logits,)), {names.LOGITS: found}

        self._session = _session("head", weights, build)

    def logits(self, hidden: Floats) -> Floats:
        """Return logits [rows, vocab] of final hidden states [rows, hidden]."""
        out: Floats = self._session.run([names.LOGITS], {names.HIDDEN_STATES: hidden})[0]
        return out


def _session(
    name: str,
    weights: Mapping[str, Weight],
    build: Callable[[GraphBuilder], tuple[GraphContract, dict[str, ir.Value]]],
) -> ort.InferenceSession:
    """Open a graph over weights of its own, through files: a message of protobuf ends at 2 GB."""
    make_thread_pool()
    options = session_options()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="shortstack-") as folder:
        with WeightStore(Path(folder)) as store:
            for key, weight in weights.items():
                if isinstance(weight, BlockTensor):
                    store.add_blocks(key, weight, _DTYPE)
                else:
                    store.add(key, weight.astype(np.float32, copy=False))
        g = GraphBuilder(name, store)
        contract, outputs = build(g)
        ir.save(g.finish(contract, outputs, "shortstack calibration"), Path(folder) / "graph.onnx")
        path, providers = str(Path(folder) / "graph.onnx"), ["CPUExecutionProvider"]
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=False)  # it prints to stdout
