"""From floats to blocks, bottom to top: each layer is rounded for the inputs that it will really get.

With calibration text, the residual stream of that text goes through one layer at a time: through the float layer, to
see what its projections multiply, then through the rounded one, whose output is the input of the next layer. Without
calibration text matrices are read and rounded one by one, and no layer is ever in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.drafter_weights import stored_drafter
from shortstack.graphs.exit_parts import HEAD_IDS, mlp_norm, stored_parts
from shortstack.graphs.ir.block_tensor import BlockTensor, Side
from shortstack.graphs.kv_map import producers
from shortstack.graphs.layer_weights import matrix_parts
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.kv_scales import kv_scale
from shortstack.quant.layers import LayerGraph, Lent, Taps, Text, Weight
from shortstack.quant.method import Method
from shortstack.quant.methods.awq import scale_stored
from shortstack.quant.methods.k_quant import k_quant
from shortstack.quant.methods.stats import InputStats, InputStatsBuilder, output_error
from shortstack.quant.preset import Assignment, Format
from shortstack.quant.rows import RoundedRows, cached_rows, relative_error, round_rows
from shortstack.quant.side_product import Fate, Tuning, beside, find_sides
from shortstack.quant.source import Source
from shortstack.quant.vocabulary import RowsOf

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rounded parts of the model.

    Attributes:
        tensors: What is to be stored, by name: blocks, or floats as the bundle stores them.
        errors: Relative error of each rounded matrix, by name: of its output on the calibration text, or of its weights
            where there was none.
        fates: What became of a fine-tuning that rounding would have erased, by the name of the matrix; only where one
            was found.
    """

    tensors: Mapping[str, Weight]
    errors: Mapping[str, float] = field(default_factory=dict)
    fates: Mapping[str, Fate] = field(default_factory=dict)


@dataclass(slots=True)
class Stream:
    """The calibration text on its way through the layers: all that a layer needs to know of those below it.

    Attributes:
        hidden: The residual stream after the layers rounded so far, [texts, seq, hidden].
        lent: Keys and values that layers above use.
        exit_stats: The inputs of exits' own heads, by depth.
        text: What branches on tokens read; None for a model without them.
    """

    hidden: Floats
    lent: Lent = field(default_factory=dict)
    exit_stats: dict[int, InputStats] = field(default_factory=dict)
    text: Text | None = None


class LayerwiseRounding:
    """Rounds one model.

    Args:
        source: Its floats.
        assignment: The format of each matrix.
        method: How to round.
        rows: Calibration text, int64 [texts, seq]; None rounds without looking at text.
        kv_scales: Whether to find the scales of an int8 cache too; needs ``rows``.
        tuning: What to do about a fine-tuning that rounding would erase.
        follows_floats: Round each layer for the inputs that the float layers below give it, not the rounded ones.

    Attributes:
        stream: The calibration text after the layers rounded so far; None without one.
    """

    def __init__(
        self,
        source: Source,
        assignment: Assignment,
        method: Method,
        rows: npt.NDArray[np.int64] | None,
        kv_scales: bool = False,
        tuning: Tuning = "keep",
        follows_floats: bool = False,
    ) -> None:
        self.source = source
        self.stream: Stream | None = None
        self._assignment, self._method, self._tuning = assignment, method, tuning
        self._kv_scales, self._follows_floats = kv_scales, follows_floats
        self._formats = {name: wanted for name, wanted in assignment.matrices.items() if wanted is not None}
        plan = source.manifest.plan
        # Other exits' heads multiply something else than the normalised stream: they are rounded without text.
        bare = {e.exit_layer for e in plan.exits if e.branch == "none" and e.norm == "final"}
        self._heads_that_see = bare & assignment.draft_heads.keys()
        if rows is not None:
            self.stream = Stream(source.embedded(rows), text=source.text(rows))

    def layer(self, layer: int) -> Iterator[Rounded | RowsOf]:
        """Round a layer; those below it come first."""
        source, formats = self.source, self._formats
        reader = source.reader
        kept = {name: reader.kept(name) for name in self._matrices(layer) if name in reader.kept_names}
        if self.stream is None:
            wanted = [name for name in self._matrices(layer) if name not in kept and name in formats]
            yield Rounded({**{name: source.floats(name) for name in source.layer_vectors(layer)}, **kept})
            for name in (name for name in self._matrices(layer) if name not in kept and name not in formats):
                yield Rounded({name: source.floats(name)})
            for group in _by_input(wanted):
                yield self._group({name: source.matrix(name) for name in group}, {})
        else:
            yield self._seen_layer(layer, self.stream, kept)
            if layer + 1 in self._heads_that_see and self._method.uses_text:
                self.stream.exit_stats[layer + 1] = self._head_stats(self.stream)
        for name in source.tables(layer):
            yield self._rows_of(name, name, self._assignment.tables[name])

    def heads(self) -> Iterator[RowsOf]:
        """Round embedding, LM head and the exits' own heads; after all layers."""
        source, matrices = self.source, self._assignment.matrices
        stream = self.stream if self._method.uses_text else None
        stats = None if stream is None else self._head_stats(stream)
        head = names.EMBED_TOKENS if source.spec.tie_word_embeddings else names.LM_HEAD
        count = 0
        if self._assignment.first_rows is not None:
            count, wanted = self._assignment.first_rows
            yield self._rows_of(names.first_rows(head), head, wanted, stats, end=count)
        yield self._rows_of(head, head, matrices[head], stats, start=count)
        if not source.spec.tie_word_embeddings and names.EMBED_TOKENS in matrices:
            yield self._rows_of(names.EMBED_TOKENS, names.EMBED_TOKENS, matrices[names.EMBED_TOKENS])
        for depth, wanted_head in self._assignment.draft_heads.items():
            own = names.exit_weight(depth, "head.weight")
            seen = None if stream is None else stream.exit_stats.get(depth)
            yield self._rows_of(own, own if own in source else head, wanted_head, seen)

    def exits(self) -> Iterator[Rounded]:
        """Round the exits' own matrices other than heads, and the drafter's; biases, norms and gates stay floats."""
        source = self.source
        for exit_spec in source.manifest.plan.exits:
            for part in stored_parts(source.spec, exit_spec):
                name = names.exit_weight(exit_spec.exit_layer, part)
                wanted = self._assignment.exit_matrices.get(name)
                if wanted is not None:
                    yield self._round({name: source.matrix(name)}, {name: wanted}, {})
                elif part not in ("head.weight", HEAD_IDS):
                    yield Rounded({name: source.floats(name)})
            if exit_spec.branch == "mlp":
                norm = mlp_norm(source.spec, exit_spec.exit_layer)
                own = [names.exit_weight(exit_spec.exit_layer, part) for part in norm]
                yield Rounded({name: source.floats(name) for name in own})
        yield from self._drafter()

    def _drafter(self) -> Iterator[Rounded]:
        """Round the matrices of a drafter, without text; norms and biases stay floats."""
        source, drafter = self.source, self.source.manifest.plan.drafter
        if drafter is None:
            return
        for name in stored_drafter(drafter, source.spec.hidden_size, source.spec.vocab_size):
            wanted = self._assignment.exit_matrices.get(name)
            if wanted is not None:
                yield self._round({name: source.matrix(name)}, {name: wanted}, {})
            elif not name.endswith(HEAD_IDS):
                yield Rounded({name: source.floats(name)})

    def sees_inputs(self, name: str) -> bool:
        """Whether a matrix is rounded for its inputs on the calibration text, so that its error is of its outputs."""
        if self.stream is None or not self._method.uses_text:
            return False
        spec = self.source.spec
        head = names.EMBED_TOKENS if spec.tie_word_embeddings else names.LM_HEAD
        heads = {head, names.first_rows(head)} | {
            names.exit_weight(depth, "head.weight") for depth in self._heads_that_see
        }
        return name in heads or any(name in self._matrices(layer) for layer in range(spec.num_hidden_layers))

    def _matrices(self, layer: int) -> list[str]:
        return [names.layer_weight(layer, part) for part in matrix_parts(self.source.spec.weights(layer))]

    def _seen_layer(self, layer: int, stream: Stream, kept: Mapping[str, BlockTensor]) -> Rounded:
        """Round a layer and run the calibration text through it."""
        source, spec = self.source, self.source.spec
        floats = source.layer(layer, stream.text)
        wanted = [name for name in self._matrices(layer) if name not in kept and name in self._formats]
        stats: dict[str, InputStats] = {}
        if wanted and self._method.uses_text:
            graph = LayerGraph(spec, layer, {**floats, **kept}, with_taps=True)
            stats = dict(_watch_inputs(graph, wanted, stream))
            del graph
        if self._method.scales_layers and stats and not kept:  # the columns of blocks cannot be scaled
            floats, stats = scale_stored(floats, stats, self._formats.get, spec, layer)
        groups = [
            self._group({name: np.ascontiguousarray(floats[name].T) for name in group}, stats)
            for group in _by_input(wanted)
        ]
        tensors: dict[str, Weight] = {**floats, **kept}
        for group_of in groups:
            tensors |= group_of.tensors
        tables = source.tables(layer)
        for name in tables:
            if (wanted_rows := self._assignment.tables[name]) is not None:
                tensors[name] = self._round({name: floats[name]}, {name: wanted_rows}, {}).tensors[name]
        largest: dict[str, Floats] = {}

        def watch(taps: Taps) -> None:
            for part, cache in taps.cache.items():
                peak = np.abs(cache).max(axis=(0, 2))  # [kv_heads, head_dim]
                largest[part] = np.maximum(largest[part], peak) if part in largest else peak

        passed_on = source.layer(layer, stream.text) if self._follows_floats else tensors
        watching = watch if self._kv_scales else None
        stream.hidden = LayerGraph(spec, layer, passed_on).run(stream.hidden, watching, stream.lent, stream.text)
        if self._kv_scales and layer in producers(spec.kv_map, layer, layer + 1):
            tensors |= {names.kv_scale(layer, part): kv_scale(peak) for part, peak in largest.items()}
        for name in (*names.rope_tables(len(spec.ropes)), *tables):
            del tensors[name]
        errors = {name: error for group_of in groups for name, error in group_of.errors.items()}
        return Rounded(tensors, errors, {name: fate for group_of in groups for name, fate in group_of.fates.items()})

    def _group(self, weights: Mapping[str, Floats], stats: Mapping[str, InputStats]) -> Rounded:
        """Round the matrices [out, in] of a layer that have one input."""
        wanted = {name: self._formats[name].fitted(weight.shape[1]) for name, weight in weights.items()}
        found = {} if self._tuning == "ignore" else self._find_tuning(weights, wanted)
        return self._round(weights, wanted, stats, found)

    def _find_tuning(
        self, weights: Mapping[str, Floats], wanted: Mapping[str, BlockFormat]
    ) -> Mapping[str, tuple[Fate, Side | None]]:
        """Look for fine-tunings in matrices [out, in] of one input; returns what was found in those that have one."""
        finding = find_sides(list(weights.values()), [wanted[name] for name in weights])
        if finding.fate == "kept" and self._tuning == "keep":
            return {name: ("kept", side) for name, side in zip(weights, finding.sides, strict=True)}
        return {} if finding.fate == "ordinary" else dict.fromkeys(weights, ("at risk", None))

    def _round(
        self,
        weights: Mapping[str, Floats],
        wanted: Mapping[str, BlockFormat],
        stats: Mapping[str, InputStats],
        found: Mapping[str, tuple[Fate, Side | None]] = MappingProxyType({}),
    ) -> Rounded:
        """Round matrices [out, in]."""
        tensors: dict[str, Weight] = {}
        errors: dict[str, float] = {}
        for name, weight in weights.items():
            seen, fitted = stats.get(name), wanted[name].fitted(weight.shape[1])
            fate, side = found.get(name, ("ordinary", None))
            if fate == "at risk":  # off the grid that it lies near, it survives on average
                fitted = replace(fitted, has_offsets=False, is_symmetric=False)
            if side is None:
                rounded = self._round_rows(weight, fitted, seen)
                tensors[name], errors[name] = rounded.tensor, relative_error(rounded.left, rounded.whole)
            else:
                blocks = beside(self._round_rows(weight - side.dequantize(), fitted, seen).tensor, side)
                tensors[name], errors[name] = blocks, output_error(weight, blocks.dequantize(), seen)
        return Rounded(tensors, errors, {name: fate for name, (fate, _) in found.items()})

    def _round_rows(self, weight: Floats, block_format: BlockFormat, seen: InputStats | None) -> RoundedRows:
        """Round a matrix [out, in], or rows of one."""
        # An untied embedding multiplies nothing: its rows are looked up, so only their own error counts.
        round_matrix = k_quant if seen is None and self._method.needs_text else self._method.round
        step = cached_rows(weight.shape[1]) if seen is None else self._method.rows or cached_rows(weight.shape[1])
        return round_rows(round_matrix, step, weight, block_format, seen)

    def _rows_of(
        self,
        name: str,
        source_name: str,
        wanted: Format,
        stats: InputStats | None = None,
        start: int = 0,
        end: int | None = None,
    ) -> RowsOf:
        """Return a matrix that is rounded slice by slice, as it is stored."""
        source = self.source
        kept = source.reader.kept(name) if name in source.reader.kept_names else None

        def slices() -> Iterator[RoundedRows | Floats]:
            for rows in source.row_slices(source_name, start, stop):
                yield rows if fitted is None else self._round_rows(rows, fitted, stats)

        rows, width = source.shape(source_name)
        stop = rows if end is None else end
        fitted = None if wanted is None else wanted.fitted(width)
        return RowsOf(name, source_name, start, (stop - start, width), fitted, stats, kept, slices)

    def _head_stats(self, stream: Stream) -> InputStats:
        """Return the inputs of a head that reads the residual stream after the layers rounded so far."""
        flat = stream.hidden.reshape(-1, stream.hidden.shape[-1])
        builder = InputStatsBuilder()
        ends, norm = self.source.spec.ends, self.source.final_norm()
        for start in range(0, len(flat), 4096):
            x = flat[start : start + 4096].astype(np.float64)
            if ends.final_norm.kind == "layer":
                x = x - x.mean(axis=1, keepdims=True)
            x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + ends.final_norm.eps)
            x = x * norm[names.FINAL_NORM].astype(np.float64) + norm.get(names.FINAL_NORM_BIAS, np.float32(0))
            builder.add((x * ends.logit_scale).astype(np.float32))
        return builder.finish()


def _by_input(matrices: Sequence[str]) -> list[list[str]]:
    """Return the matrices of a layer in groups of one input each."""
    groups: dict[str, list[str]] = {}
    for name in matrices:
        groups.setdefault(names.side_factor(name), []).append(name)
    return list(groups.values())


def _watch_inputs(graph: LayerGraph, wanted: Sequence[str], stream: Stream) -> Iterator[tuple[str, InputStats]]:
    """Yield the statistics of what each wanted projection multiplies; projections of one input share them."""
    builders: dict[int, InputStatsBuilder] = {}
    same: dict[str, int] = {}

    def watch(taps: Taps) -> None:
        seen: set[int] = set()
        for name in wanted:
            x = taps.inputs[name]
            key = same.setdefault(name, next((same[o] for o in same if taps.inputs[o] is x), len(builders)))
            if key not in seen:
                builders.setdefault(key, InputStatsBuilder()).add(x)
                seen.add(key)

    graph.run(stream.hidden, watch, stream.lent, stream.text)
    finished = {key: builder.finish() for key, builder in builders.items()}
    for name in wanted:
        yield name, finished[same[name]]
