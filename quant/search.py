"""The cheapest mix of int4, int8 and float parts that stays under a KL divergence, greedy by sensitivity.

Units are the attention, the MLP and the branch on tokens of each layer, the head, and an untied embedding. Each is
rounded once to every width of codes, for the inputs that the float model gives it. A unit's *sensitivity* is the KL
divergence from the source when it alone is int4, per byte that int4 saves over int8. In that order units go from int8
to int4; how many may go is found by bisection, and every candidate mix is run. Where int8 everywhere is already too
much, units go from int8 to float instead, the most sensitive first.

KL is measured on text that rounding did not see: the last quarter of the calibration text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.layer_weights import matrix_parts
from shortstack.graphs.precision import CODE_TYPES, BlockFormat
from shortstack.progress import Stage
from shortstack.quant.layers import HeadGraph, LayerGraph, Lent, Weight
from shortstack.quant.method import Method
from shortstack.quant.preset import Assignment, Format
from shortstack.quant.record import Searched
from shortstack.quant.rounding import LayerwiseRounding, Rounded
from shortstack.quant.side_product import Tuning
from shortstack.quant.source import Source

Floats = npt.NDArray[np.float32]
_BRANCHES = ("attn.", "mlp.", "per_layer.")  # what the parts of their matrices begin with
_WIDTHS = tuple(sorted(CODE_TYPES, reverse=True))  # bits, from the finest codes to the coarsest
_MEASURED_TOKENS = 1024
_HEAD_ROWS = 256
# The report measures on another text than the search: aim a little lower than asked.
_AIM = 0.9


@dataclass(frozen=True, slots=True)
class Unit:
    """Matrices that change their format together.

    Attributes:
        layer: The layer; None for the head and the embedding.
        matrices: Names of its matrices.
    """

    layer: int | None
    matrices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """The formats of a model.

    Attributes:
        assignment: The format of each matrix.
        searched: What the search found; None where the formats are the preset's.
    """

    assignment: Assignment
    searched: Searched | None = None


@dataclass(slots=True)
class _Candidates:
    """Every unit of one model in int4, int8 and float, and the float model's answers.

    Attributes:
        source: The float bundle.
        rows: Text to measure on, int64 [texts, seq].
        rounded: Blocks by bits and matrix name.
        streams: The float model's residual stream before each layer, and after the last.
        reference: The float model's log probabilities [positions, vocab].
    """

    source: Source
    rows: npt.NDArray[np.int64]
    rounded: Mapping[int, Mapping[str, BlockTensor]]
    streams: list[Floats] = field(default_factory=list)
    reference: Floats | None = None
    _graphs: dict[int, LayerGraph] = field(default_factory=dict)
    _lent: Lent = field(default_factory=dict)

    def prepare(self, advance: Callable[[float], None]) -> None:
        """Run the float model."""
        spec = self.source.spec
        self.streams, text = [self.source.embedded(self.rows)], self.source.text(self.rows)
        for layer in range(spec.num_hidden_layers):
            self._graphs[layer] = LayerGraph(spec, layer, self.source.layer(layer, text))
            self.streams.append(self._graphs[layer].run(self.streams[-1], lent=self._lent, tokens=text))
            advance(1)
        self.reference = self._log_probs({})

    def kl(self, mix: Mapping[str, int]) -> float:
        """Return the mean KL divergence of a mix from the float model, nats per token.

        Args:
            mix: Bits of each matrix that is in blocks, by name.
        """
        assert self.reference is not None
        logp = self._log_probs(mix)
        return float((np.exp(self.reference) * (self.reference - logp)).sum(axis=1).mean(dtype=np.float64))

    def _log_probs(self, mix: Mapping[str, int]) -> Floats:
        spec = self.source.spec
        changed = [
            layer
            for layer in range(spec.num_hidden_layers)
            if any(names.layer_weight(layer, part) in mix for part in matrix_parts(spec.weights(layer)))
        ]
        lowest = changed[0] if changed else spec.num_hidden_layers
        hidden = self.streams[lowest]
        if names.EMBED_TOKENS in mix:  # other rows at the bottom, so everything above is another
            lowest, embedding = 0, self.rounded[mix[names.EMBED_TOKENS]][names.EMBED_TOKENS]
            rows = embedding.rows(self.rows.reshape(-1)).dequantize()
            hidden = self.source.first_stream(rows.reshape(hidden.shape))
        text = self.source.text(self.rows)
        lent = {layer: parts for layer, parts in self._lent.items() if layer < lowest}
        for layer in range(lowest, spec.num_hidden_layers):
            graph = self._graphs[layer]
            if layer in changed:
                floats: dict[str, Weight] = dict(self.source.layer(layer, text))
                own = {n: self.rounded[mix[n]][n] for n in floats if n in mix}
                graph = LayerGraph(spec, layer, floats | own)
            hidden = graph.run(hidden, lent=lent, tokens=text)
        head = head_name(self.source)
        weight: Weight = self.rounded[mix[head]][head] if head in mix else self.source.floats(head)
        graph_of_head = HeadGraph(spec, head, {head: weight, **self.source.final_norm()})
        flat = hidden.reshape(-1, spec.hidden_size)
        parts = [graph_of_head.logits(flat[i : i + _HEAD_ROWS]) for i in range(0, len(flat), _HEAD_ROWS)]
        logits = np.concatenate(parts)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits


def head_name(source: Source) -> str:
    """Return the matrix of the final head."""
    return names.EMBED_TOKENS if source.spec.tie_word_embeddings else names.LM_HEAD


def units(source: Source) -> list[Unit]:
    """Return the units of a model, bottom to top; matrices that keep a checkpoint's blocks are in none."""
    kept = source.reader.kept_names
    vocabulary = dict.fromkeys((head_name(source), names.EMBED_TOKENS))  # one and the same where they are tied
    found = [
        Unit(layer, tuple(names.layer_weight(layer, part) for part in parts if part.startswith(branch)))
        for layer in range(source.spec.num_hidden_layers)
        for parts in (matrix_parts(source.spec.weights(layer)),)
        for branch in _BRANCHES
    ]
    found += [Unit(None, (name,)) for name in vocabulary]
    found = [Unit(unit.layer, tuple(name for name in unit.matrices if name not in kept)) for unit in found]
    return [unit for unit in found if unit.matrices]  # few layers have a branch on tokens


def coarsest_mix(source: Source, assignment: Assignment) -> Assignment:
    """Return the smallest mix that a search could take: all that it may change, in the coarsest codes."""
    changed = {name for unit in units(source) for name in unit.matrices}
    bits = _WIDTHS[-1]
    matrices = {n: _with_bits(f, bits) if n in changed else f for n, f in assignment.matrices.items()}
    return replace(assignment, matrices=matrices, first_rows=None)


def search(
    source: Source,
    method: Method,
    assignment: Assignment,
    rows: npt.NDArray[np.int64],
    max_kl: float,
    stage: Stage,
    tuning: Tuning = "keep",
) -> Mix:
    """Return the cheapest mix found that stays under ``max_kl`` nats per token.

    Args:
        source: The float bundle.
        method: How to round.
        assignment: The preset's: block size, symmetry and the offsets of its layers are kept, its bits are not.
        rows: Calibration text, int64 [texts, seq].
        max_kl: The limit.
        stage: Starts a stage of the progress bar.
        tuning: What to do about a fine-tuning that rounding would erase.
    """
    depth = source.spec.num_hidden_layers
    measured = max(1, min(len(rows) // 4, _MEASURED_TOKENS // rows.shape[1]))
    seen = rows[:-measured] if len(rows) > measured else rows
    everything = units(source)
    matrix_names = [name for unit in everything for name in unit.matrices]
    formats = {bits: {name: _with_bits(assignment.matrices[name], bits) for name in matrix_names} for bits in _WIDTHS}
    rounded = {}
    for bits, wanted in formats.items():
        advance = stage(f"Rounding to {CODE_TYPES[bits].name}", depth)
        flat = Assignment({**dict.fromkeys(assignment.matrices), **wanted}, {}, tables=dict.fromkeys(assignment.tables))
        rounding = LayerwiseRounding(source, flat, method, seen, tuning=tuning, follows_floats=True)
        rounded[bits] = _round_all(rounding, advance)
    candidates = _Candidates(source, rows[-measured:], rounded)
    candidates.prepare(stage("Running the float model", depth))
    advance = stage("Measuring sensitivity", len(everything))
    sensitivity: dict[Unit, float] = {}
    for unit in everything:
        sensitivity[unit] = candidates.kl(dict.fromkeys(unit.matrices, _WIDTHS[-1])) / _saved_bytes(unit, rounded)
        advance(1)
    order = sorted(everything, key=lambda unit: sensitivity[unit])
    advance = stage("Searching the mix", int(np.ceil(np.log2(len(order) + 1))) + len(_WIDTHS) - 1)
    chosen, kl = cheapest_mix(order, candidates.kl, max_kl * _AIM, advance)
    matrices: dict[str, Format] = dict(assignment.matrices)
    for unit in everything:
        for name in unit.matrices:
            matrices[name] = formats[chosen[name]][name] if name in chosen else None
    # Tables were floats in all of this: in 8 bits they stay nearly that.
    tables = {n: None if f is None else _with_bits(f, _WIDTHS[0]) for n, f in assignment.tables.items()}
    found = Assignment(matrices, assignment.draft_heads, exit_matrices=assignment.exit_matrices, tables=tables)
    became = Counter(CODE_TYPES[chosen[name]].name if name in chosen else "float" for name in matrix_names)
    return Mix(found, Searched(kl, candidates.rows.size, dict(became.most_common())))


def cheapest_mix(
    order: Sequence[Unit],
    kl: Callable[[Mapping[str, int]], float],
    limit: float,
    advance: Callable[[float], None] = lambda _: None,
) -> tuple[dict[str, int], float]:
    """Return the bits of each matrix of the cheapest mix under a limit, floats left out, and its divergence.

    The mixes are the steps of one way down: from float everywhere to int8 everywhere, unit by unit, then from there to
    int4 everywhere in the same order. Bisection finds the last step that still stays under the limit.

    Args:
        order: Units, the least sensitive first.
        kl: The divergence of a mix.
        limit: Largest allowed divergence.
        advance: Called with 1 after each mix.
    """

    def mix(steps: int) -> dict[str, int]:
        """Return the mix after so many steps: every unit takes the finest codes, in order, then the next finer ones."""
        bits: dict[str, int] = {}
        for done, width in enumerate(_WIDTHS):
            changed = order[: max(0, steps - done * len(order))]
            bits |= {name: width for unit in changed for name in unit.matrices}
        return bits

    def is_under(steps: int) -> bool:
        measured[steps] = kl(mix(steps))
        advance(1)
        return measured[steps] <= limit

    measured = {0: 0.0}  # by steps: float everywhere has no divergence at all
    # Above `low` nothing is known; at `high` the limit is broken.
    low, high = 0, len(_WIDTHS) * len(order) + 1
    for whole in range(len(order), high - 1, len(order) or 1):  # one width everywhere
        if not is_under(whole):
            high = whole
            break
        low = whole
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_under(middle) else (low, middle)
    return mix(low), measured[low]


def _round_all(rounding: LayerwiseRounding, advance: Callable[[float], None]) -> dict[str, BlockTensor]:
    found: dict[str, BlockTensor] = {}
    for layer in range(rounding.source.spec.num_hidden_layers):
        for rounded in rounding.layer(layer):
            if isinstance(rounded, Rounded):
                found |= {name: t for name, t in rounded.tensors.items() if isinstance(t, BlockTensor)}
        advance(1)
    kept = rounding.source.reader.kept_names
    found |= {rows.name: rows.rounded() for rows in rounding.heads() if rows.name not in kept}
    return found


def _with_bits(wanted: Format, bits: int) -> BlockFormat:
    """Return a preset's format with other bits; its offsets are kept only where they gain something."""
    shape = wanted or BlockFormat(bits)
    return replace(shape, bits=bits, has_offsets=shape.has_offsets and CODE_TYPES[bits].gains_from_offsets)


def _saved_bytes(unit: Unit, rounded: Mapping[int, Mapping[str, BlockTensor]]) -> int:
    def stored(bits: int, name: str) -> int:
        blocks = rounded[bits][name]
        return blocks.format.stored_bytes(*blocks.shape)

    return sum(stored(_WIDTHS[0], name) - stored(_WIDTHS[-1], name) for name in unit.matrices)
