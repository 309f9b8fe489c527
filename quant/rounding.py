"""From a bundle's floats to blocks, bottom to top: each layer is rounded for the inputs that it will really get.

With calibration text, the residual stream of that text goes through one layer at a time: through the float layer, to
see what its projections multiply, then through the rounded one, whose output is the input of the next layer. Without
calibration text every matrix is rounded by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.exit_parts import HEAD_IDS, mlp_norm, stored_parts
from shortstack.graphs.ir.block_tensor import Side
from shortstack.graphs.kv_map import producers
from shortstack.graphs.layer_weights import matrix_parts
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import ModelSpec
from shortstack.quant.kv_scales import kv_scale
from shortstack.quant.layers import LayerGraph, Lent, Taps, Text, Weight
from shortstack.quant.method import Method
from shortstack.quant.methods.awq import scale_layer
from shortstack.quant.methods.k_quant import k_quant
from shortstack.quant.methods.offsets import with_offsets
from shortstack.quant.methods.stats import InputStats, InputStatsBuilder, output_error
from shortstack.quant.preset import Assignment, Format
from shortstack.quant.side_product import Fate, Tuning, beside, find_sides
from shortstack.quant.source import Source

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rounded:
    """One rounded part of the model.

    Attributes:
        tensors: What is to be stored, by name: blocks, or floats as the bundle stores them.
        errors: Relative error of each rounded matrix, by name: of its output on the calibration text, or of its weights
            where there was none.
        fates: What became of a fine-tuning that rounding would have erased, by the name of the matrix; only where one
            was found.
    """

    tensors: Mapping[str, Weight]
    errors: Mapping[str, float]
    fates: Mapping[str, Fate] = field(default_factory=dict)


@dataclass(slots=True)
class LayerwiseRounding:
    """Rounds one model.

    Attributes:
        source: Its floats.
        assignment: The format of each matrix.
        method: How to round.
        rows: Calibration text, int64 [texts, seq]; None rounds without looking at text.
        kv_scales: Whether to find the scales of an int8 cache too; needs ``rows``.
        tuning: What to do about a fine-tuning that rounding would erase.
        follows_floats: Round each layer for the inputs that the float layers below give it, not the rounded ones.
        hidden: The residual stream of the calibration text, [texts, seq, hidden], after the layers rounded so far.
    """

    source: Source
    assignment: Assignment
    method: Method
    rows: npt.NDArray[np.int64] | None
    kv_scales: bool = False
    tuning: Tuning = "keep"
    follows_floats: bool = False
    hidden: Floats | None = field(default=None, init=False)
    _lent: Lent = field(default_factory=dict, init=False)
    _text: Text | None = field(default=None, init=False)
    _exit_stats: dict[int, InputStats] = field(default_factory=dict, init=False)

    def layers(self) -> Iterator[Rounded]:
        """Round layer after layer."""
        spec, plan = self.source.spec, self.source.bundle.manifest.plan
        # Other exits' heads multiply something else than the normalised stream: they are rounded without text.
        bare = {e.exit_layer for e in plan.exits if e.branch == "none" and e.norm == "final"}
        heads = bare & self.assignment.draft_heads.keys()
        if self.rows is not None:
            self.hidden = self.source.embedded(self.rows)
            self._text = self.source.text(self.rows)
        for layer in range(spec.num_hidden_layers):
            yield self._layer(layer)
            if layer + 1 in heads and self.hidden is not None and self.method.uses_text:
                self._exit_stats[layer + 1] = self._head_stats()

    def heads(self) -> Iterator[Rounded]:
        """Round embedding, LM head and the exits' own heads; after :meth:`layers`."""
        spec, matrices = self.source.spec, self.assignment.matrices
        uses_text = self.hidden is not None and self.method.uses_text
        stats = self._head_stats() if uses_text else None
        head = names.EMBED_TOKENS if spec.tie_word_embeddings else names.LM_HEAD
        weight = self.source.matrix(head)
        if self.assignment.first_rows is not None:
            count, wanted = self.assignment.first_rows
            first = names.first_rows(head)
            yield self._matrices({first: weight[:count]}, {first: wanted}, {first: stats} if stats else {})
            weight = weight[count:]
        yield self._matrices({head: weight}, {head: matrices[head]}, {head: stats} if stats else {})
        if not spec.tie_word_embeddings and names.EMBED_TOKENS in matrices:
            name = names.EMBED_TOKENS
            yield self._matrices({name: self.source.matrix(name)}, {name: matrices[name]}, {})
        for depth, wanted_head in self.assignment.draft_heads.items():
            own = names.exit_weight(depth, "head.weight")
            weight = self.source.matrix(own if own in self.source else head)
            yield self._matrices(
                {own: weight}, {own: wanted_head}, {own: seen} if (seen := self._exit_stats.get(depth)) else {}
            )

    def exits(self) -> Iterator[Rounded]:
        """Round the exits' own matrices other than heads; biases, norms and gates stay floats."""
        source = self.source
        for exit_spec in source.bundle.manifest.plan.exits:
            for part in stored_parts(source.spec, exit_spec):
                name = names.exit_weight(exit_spec.exit_layer, part)
                wanted = self.assignment.exit_matrices.get(name)
                if wanted is not None:
                    yield self._matrices({name: source.matrix(name)}, {name: wanted}, {})
                elif part not in ("head.weight", HEAD_IDS):
                    yield Rounded({name: source.floats(name)}, {})
            if exit_spec.branch == "mlp":
                norm = [
                    names.exit_weight(exit_spec.exit_layer, part)
                    for part in mlp_norm(source.spec, exit_spec.exit_layer)
                ]
                yield Rounded({name: source.floats(name) for name in norm}, {})

    def _layer(self, layer: int) -> Rounded:
        source, spec = self.source, self.source.spec
        floats = source.layer(layer)
        wanted = {name: f for name in floats if (f := self.assignment.matrices.get(name)) is not None}
        stats: dict[str, InputStats] = {}
        if self.hidden is not None and wanted and self.method.uses_text:
            graph = LayerGraph(spec, layer, floats, with_taps=True)
            stats = dict(_watch_inputs(graph, self.hidden, wanted, self._lent, self._text))
        if self.method.scales_layers and stats:
            floats, stats = _scale(floats, stats, self.assignment, spec, layer)
        weights = {name: np.ascontiguousarray(floats[name].T) for name in wanted}
        found = {} if self.tuning == "ignore" else self._find_tuning(weights, wanted)
        rounded = self._matrices(weights, wanted, stats, found)
        tensors: dict[str, Weight] = {**floats, **rounded.tensors}
        if self.hidden is not None:
            largest: dict[str, Floats] = {}

            def watch(taps: Taps) -> None:
                for part, cache in taps.cache.items():
                    peak = np.abs(cache).max(axis=(0, 2))  # [kv_heads, head_dim]
                    largest[part] = np.maximum(largest[part], peak) if part in largest else peak

            passed_on = source.layer(layer) if self.follows_floats else tensors
            watching = watch if self.kv_scales else None
            self.hidden = LayerGraph(spec, layer, passed_on).run(self.hidden, watching, self._lent, self._text)
            if self.kv_scales and layer in producers(spec.kv_map, layer, layer + 1):
                tensors |= {names.kv_scale(layer, part): kv_scale(peak) for part, peak in largest.items()}
        for name in names.rope_tables(len(spec.ropes)):
            del tensors[name]
        return Rounded(tensors, rounded.errors, rounded.fates)

    def _find_tuning(
        self, weights: Mapping[str, Floats], wanted: Mapping[str, BlockFormat]
    ) -> dict[str, tuple[Fate, Side | None]]:
        """Look for fine-tunings in matrices [out, in]; returns what was found in those that have one."""
        by_input: dict[str, list[str]] = {}
        for name in weights:
            by_input.setdefault(names.side_factor(name), []).append(name)
        found: dict[str, tuple[Fate, Side | None]] = {}
        for group in by_input.values():
            formats = [wanted[name].fitted(weights[name].shape[1]) for name in group]
            finding = find_sides([weights[name] for name in group], formats)
            if finding.fate == "kept" and self.tuning == "keep":
                found |= {name: ("kept", side) for name, side in zip(group, finding.sides, strict=True)}
            elif finding.fate != "ordinary":
                found |= dict.fromkeys(group, ("at risk", None))
        return found

    def _matrices(
        self,
        weights: Mapping[str, Floats],
        wanted: Mapping[str, Format],
        stats: Mapping[str, InputStats],
        found: Mapping[str, tuple[Fate, Side | None]] = MappingProxyType({}),
    ) -> Rounded:
        """Round matrices [out, in]."""
        tensors: dict[str, Weight] = {}
        errors: dict[str, float] = {}
        for name, weight in weights.items():
            block_format = wanted[name]
            if block_format is None:
                tensors[name] = weight
                continue
            seen = stats.get(name)
            fitted = block_format.fitted(weight.shape[1])
            fate, side = found.get(name, ("ordinary", None))
            if fate == "at risk":  # off the grid that it lies near, it survives on average
                fitted = replace(fitted, has_offsets=False, is_symmetric=False)
            base = weight if side is None else weight - side.dequantize()
            # An untied embedding multiplies nothing: its rows are looked up, so only their own error counts.
            round_matrix = k_quant if seen is None and self.method.needs_text else self.method.round
            if fitted.has_offsets:
                blocks = with_offsets(round_matrix, base, fitted, seen)
            else:
                blocks = round_matrix(base, fitted, seen)
            if side is not None:
                blocks = beside(blocks, side)
            tensors[name] = blocks
            errors[name] = output_error(weight, blocks.dequantize(), seen)
        return Rounded(tensors, errors, {name: fate for name, (fate, _) in found.items()})

    def _head_stats(self) -> InputStats:
        """Return the inputs of a head that reads the residual stream after the layers rounded so far."""
        assert self.hidden is not None
        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
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


def _scale(
    floats: Mapping[str, Floats], stats: Mapping[str, InputStats], assignment: Assignment, spec: ModelSpec, layer: int
) -> tuple[dict[str, Floats], dict[str, InputStats]]:
    """Scale a layer's channels (AWQ): tensors as they are stored, by full name, in and out."""
    prefix = names.layer_weight(layer, "")
    others = {name: tensor for name, tensor in floats.items() if not name.startswith(prefix)}
    own = {name.removeprefix(prefix): tensor for name, tensor in floats.items() if name.startswith(prefix)}
    matrices = matrix_parts(spec.weights(layer))
    turned = {part: tensor.T if part in matrices else tensor for part, tensor in own.items()}
    scaled = scale_layer(
        turned,
        {name.removeprefix(prefix): seen for name, seen in stats.items()},
        lambda part: assignment.matrices.get(prefix + part),
        spec,
        layer,
    )
    stored = {p: np.ascontiguousarray(w.T) if p in matrices else w for p, w in scaled.weights.items()}
    return (
        {prefix + part: tensor for part, tensor in stored.items()} | others,
        {prefix + part: seen for part, seen in scaled.stats.items()},
    )


def _watch_inputs(
    graph: LayerGraph, hidden: Floats, wanted: Mapping[str, Format], lent: Lent, text: Text | None
) -> Iterator[tuple[str, InputStats]]:
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

    graph.run(hidden, watch, lent, text)
    finished = {key: builder.finish() for key, builder in builders.items()}
    for name in wanted:
        yield name, finished[same[name]]
