"""The quantization itself, whatever the floats come from: a source in, all files of a smaller bundle out.

Tensors are stored as they are rounded, layer by layer. After each layer, what is needed to go on from there is put on
the disk (:mod:`shortstack.quant.unfinished`), so that a killed run need not begin anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.exit_parts import HEAD_IDS
from shortstack.graphs.genai_config import TextEnds
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.ir.cast import cast
from shortstack.graphs.ir.weights import TOO_LARGE, WeightStore
from shortstack.graphs.ir.write_bundle import tool_versions, write_bundle
from shortstack.graphs.layer_weights import stored_shapes
from shortstack.graphs.origins import Origin
from shortstack.graphs.precision import SPARE_ROWS, Precision
from shortstack.graphs.spec import DType, ModelSpec
from shortstack.progress import Advance, Stage, say
from shortstack.quant.method import Method, find_method
from shortstack.quant.preset import Assignment, assign, with_kept
from shortstack.quant.record import QuantizationRecord
from shortstack.quant.rounding import LayerwiseRounding, Rounded
from shortstack.quant.search import Mix, coarsest_mix, search
from shortstack.quant.side_product import Fate
from shortstack.quant.source import Source
from shortstack.quant.spec import Quantization
from shortstack.quant.texts import Rows
from shortstack.quant.unfinished import Unfinished, work_key
from shortstack.quant.vocabulary import RowsOf, Vocabulary

KVScales = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One quantization that was checked, before any file is written.

    Attributes:
        source: The floats.
        wanted: How they are quantized.
        method: How to round.
        dtype: Type of what is not in blocks.
        rows: Calibration text, int64 [texts, seq]; None where none is needed.
        is_layerwise: Whether the layers can be run one by one.
    """

    source: Source
    wanted: Quantization
    method: Method
    dtype: DType
    rows: Rows | None
    is_layerwise: bool

    @property
    def runs_layers(self) -> bool:
        """Whether the calibration text goes through the layers."""
        return self.rows is not None and self.is_layerwise


def plan_job(source: Source, wanted: Quantization, dtype: DType, read_text: Callable[[Quantization], Rows]) -> Job:
    """Check a quantization, and read the text that it needs.

    Args:
        source: The floats.
        wanted: How they are quantized.
        dtype: Type of what is not in blocks.
        read_text: Reads the calibration text; called where text is needed.

    Raises:
        RequestError: The method is unknown, or the calibration text cannot be read.
        UnsupportedError: The method runs layers one by one, and the model's cannot be.
    """
    method = find_method(wanted.preset.method)
    is_weighed = method.uses_text or wanted.max_kl is not None
    is_layerwise = _check_layerwise(source.spec, is_weighed)
    rows = read_text(wanted) if wanted.reads_text else None
    return Job(source, wanted, method, dtype, rows, is_layerwise)


def _check_layerwise(spec: ModelSpec, is_weighed: bool) -> bool:
    """Return whether the layers of a model can be run one by one; refuse to calibrate where they cannot."""
    blind = [layer for layer in range(spec.num_hidden_layers) if not spec.sees_itself(layer)]
    if is_weighed and blind:
        raise UnsupportedError(
            f"calibration runs layer after layer, and layers {blind} use keys and values that are not there yet",
            found=f"kv_map {list(spec.kv_map)}",
            expected="a method that looks at weights only",
            remedy="add --method rtn (or hqq), without --max-kl",
        )
    return not blind


def least_formats(job: Job) -> Assignment:
    """Return the preset's format of each matrix, or the smallest mix that a search could take."""
    found = _preset_formats(job)
    return found if job.wanted.max_kl is None else coarsest_mix(job.source, found)


def choose_formats(job: Job, stage: Stage) -> Mix:
    """Return the format of each matrix: the preset's, or the cheapest mix that was found."""
    source, wanted = job.source, job.wanted
    assignment = _preset_formats(job)
    if wanted.max_kl is None:
        return Mix(assignment)
    assert job.rows is not None
    return search(source, job.method, assignment, job.rows, wanted.max_kl, stage, wanted.tuning)


def _preset_formats(job: Job) -> Assignment:
    source = job.source
    assignment = assign(job.wanted.preset, source.spec, source.manifest.plan)
    return with_kept(assignment, source.spec, source.reader.kept_names)


def write_job(
    job: Job,
    mix: Mix,
    folder: Path,
    files: Mapping[str, bytes],
    source_sha256: str | None,
    unfinished: Unfinished,
    stage: Stage,
    kv_scales: KVScales | None = None,
    ends: TextEnds | None = None,
    origins: Callable[[QuantizationRecord, Precision], Mapping[str, Origin]] = lambda record, precision: {},
) -> None:
    """Round the model and write all files of the bundle.

    Args:
        job: What is asked.
        mix: The format of each matrix.
        folder: Where the bundle is being written.
        files: The content of its other files, by name.
        source_sha256: Of the weights.data of the float bundle; None where the floats come from no bundle.
        unfinished: What an earlier run in this folder had finished.
        stage: Starts a stage of the progress bar.
        kv_scales: Scales of an int8 cache that were found before; None finds them on the way, where they are needed.
        ends: The tokens around a text, for onnxruntime-genai; None writes nothing for it.
        origins: Returns, from the record of what was rounded and from how all is stored, what matrices were in blocks
            of a checkpoint.
    """
    source, wanted, manifest = job.source, job.wanted, job.source.manifest
    is_int8_cache = wanted.preset.kv_cache == "int8"
    rounding = LayerwiseRounding(
        source,
        mix.assignment,
        job.method,
        job.rows if job.is_layerwise else None,
        is_int8_cache and job.is_layerwise,
        wanted.tuning,
    )
    writing = _Writing(job, rounding, unfinished)
    if (line := _taken_over(source, unfinished)) is not None:
        say(line)
    with WeightStore(folder, unfinished.store_contents) as store:
        errors, fates = writing.store_all(store, kv_scales or {}, stage)
    unfinished.remove()
    record = QuantizationRecord(
        preset=wanted.preset.name,
        method=wanted.preset.method,
        source_weights_sha256=source_sha256,
        calibration=None if job.rows is None else f"{_readable(wanted.calibration.name)}: {job.rows.size} tokens",
        max_kl=wanted.max_kl,
        errors=errors,
        tuning=fates,
        search=mix.searched,
        of_outputs=tuple(name for name in errors if rounding.sees_inputs(name)),
    )
    precision = Precision(store.formats, wanted.preset.kv_cache)
    result = dataclasses.replace(
        manifest,
        dtype=job.dtype,
        files={},
        tools=manifest.tools | tool_versions(),
        precision=precision,
        origins={**manifest.origins, **origins(record, precision)},
    )
    write_bundle(folder, result, store, {**files, names.QUANTIZATION_FILE: record.content()}, stage, ends)


def _readable(name: str) -> str:
    """Return a file's name as text; bytes of it that are not UTF-8, which JSON cannot hold, become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclasses.dataclass(slots=True)
class _Writing:
    """Stores the tensors of one bundle as they are rounded."""

    job: Job
    rounding: LayerwiseRounding
    unfinished: Unfinished

    def store_all(
        self, store: WeightStore, kv_scales: KVScales, stage: Stage
    ) -> tuple[dict[str, float], dict[str, Fate]]:
        """Write every tensor to the store.

        Returns:
            The relative error of each rounded matrix, and what became of fine-tunings; both by name.
        """
        source, done = self.job.source, self.unfinished
        spec, dtype = source.spec, self.job.dtype
        done.restore(self.rounding.stream)
        layers = range(done.layers, spec.num_hidden_layers)
        advance = stage(f"Rounding ({self.job.wanted.preset.method})", _weights(source, layers))
        vocabulary = Vocabulary(source, store, dtype, advance, done.errors)
        for layer in layers:
            for part in self.rounding.layer(layer):
                self._put(part, store, vocabulary, advance)
            done.save(layer + 1, store, self.rounding.stream)
        for name, scale in kv_scales.items():
            store.add(name, scale)
        for part in self.rounding.heads():
            vocabulary.put(part)
        for part in self.rounding.exits():
            self._put(part, store, vocabulary, advance)
        self._store_rest(store)
        return done.errors, done.fates

    def _put(self, part: Rounded | RowsOf, store: WeightStore, vocabulary: Vocabulary, advance: Advance) -> None:
        """Store what was rounded.

        Raises:
            UnsupportedError: The weights of a matrix are too large for a grid.
        """
        if isinstance(part, RowsOf):
            vocabulary.put(part)
            return
        dtype = self.job.dtype
        for name, error in part.errors.items():
            if not math.isfinite(error):
                raise UnsupportedError(f"matrix {name} in blocks: its error", found=error, remedy=TOO_LARGE)
        for name, tensor in part.tensors.items():
            if isinstance(tensor, BlockTensor):
                store.add_blocks(name, tensor, dtype)
                advance(tensor.codes.size)
            elif name.endswith("_scale"):
                store.add(name, tensor)  # of an int8 cache: always float32
            else:
                store.add(name, cast(name, tensor, dtype))
                advance(tensor.size)
        self.unfinished.errors |= part.errors
        self.unfinished.fates |= part.fates

    def _store_rest(self, store: WeightStore) -> None:
        """Store what is outside the layers and is not a matrix."""
        source, dtype = self.job.source, self.job.dtype
        if names.UNIT_NORM in source:
            store.add(names.UNIT_NORM, source.floats(names.UNIT_NORM).astype(dtype))
        if source.spec.ends.learned_positions:
            table = source.floats(names.EMBED_POSITIONS)
            store.add(names.EMBED_POSITIONS, cast(names.EMBED_POSITIONS, table, dtype))
        for name, norm in source.final_norm().items():
            store.add(name, cast(name, norm, dtype))
        drafter = source.manifest.plan.drafter
        for name in names.rope_tables(len(source.spec.ropes) + (0 if drafter is None else len(drafter.ropes))):
            table, fill = source.floats(name), float(name.endswith(names.ROPE_PARTS[0]))
            # A bundle before format 2 is without the spare row.
            missing = max(0, source.manifest.max_length + SPARE_ROWS - len(table))
            store.add(name, cast(name, np.pad(table, ((0, missing), (0, 0)), constant_values=fill), dtype))
        if drafter is not None and drafter.has_head_ids:
            name = names.drafter_weight(HEAD_IDS)
            store.add(name, np.asarray(source.reader.array(name)))
        known: dict[bytes, str] = {}  # id maps of trimmed heads: equal ones once
        for exit_spec in source.manifest.plan.exits:
            if exit_spec.draft_vocab is None:
                continue
            name = names.exit_weight(exit_spec.exit_layer, HEAD_IDS)
            ids = np.asarray(source.reader.array(name))
            if (same := known.setdefault(ids.tobytes(), name)) == name:
                store.add(name, ids)
            else:
                store.alias(name, same)


def _taken_over(source: Source, unfinished: Unfinished) -> str | None:
    """Return one sentence about what of a killed run is taken over, and what is left to do; None without such a run."""
    if unfinished.is_damaged:
        return "what a killed run has left is damaged: nothing of it is taken over, all layers are rounded anew"
    if unfinished.store_contents is None:
        return None
    depth, done = source.spec.num_hidden_layers, unfinished.layers
    left = _weights(source, range(done, depth)) / _weights(source, range(depth))
    what = f"{depth - done} layers and the vocabulary" if done < depth else "the vocabulary"
    return (
        f"going on after a killed run: {done} of {depth} layers are taken over "
        f"({unfinished.store_contents['bytes'] / 1e6:.1f} MB); left: {what}, {left:.0%} of the weights"
    )


def _weights(source: Source, layers: range) -> int:
    """Return about how many weights there are to be rounded: those of some layers, and the vocabulary."""
    spec = source.spec
    of_layers = sum(
        math.prod(shape)
        for layer in layers
        for shape in stored_shapes(spec.weights(layer), spec.layers[layer].attention).values()
    )
    return of_layers + spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)


def job_key(job: Job, assignment: Assignment, *source: object) -> str:
    """Return a hash of all that decides what a job writes.

    Args:
        job: What is asked.
        assignment: The format of each matrix.
        source: All that says which floats they are, and the versions of the tools.
    """
    wanted = job.wanted
    rows = b"" if job.rows is None else job.rows.tobytes()
    options = (wanted.preset, wanted.tuning, wanted.max_kl, wanted.calibration.name, job.dtype)
    return work_key(*source, options, assignment, rows)
