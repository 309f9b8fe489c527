"""What a bundle of floats must store, tensor by tensor, and what its graphs hold instead.

bundle.json vouches for the bytes of a graph, not for their sense: a sealed bundle may lack a tensor, or have it in
another shape. All differences are said at once, before any work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import FUSE, MODEL_NORM, feature_norms, is_rows, stage_of, stored_drafter
from shortstack.graphs.errors import BundleError
from shortstack.graphs.exit_parts import HEAD_IDS, ROWS, mlp_norm, stored_parts
from shortstack.graphs.ir.exit import uses_unit_norm
from shortstack.graphs.ir.read import StoredTensor
from shortstack.graphs.layer_spec import cache_head_dim
from shortstack.graphs.layer_weights import Shape, matrix_parts, stored_shapes
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.plan import ExitSpec, Segment

_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class FloatTensor:
    """One tensor that a bundle of floats must store.

    Attributes:
        graph: A file whose graph has it.
        dtype: Its type.
        shape: Its shape, as it is stored. Rotary tables may have more rows.
    """

    graph: str
    dtype: str
    shape: Shape


def float_tensors(manifest: Manifest) -> dict[str, FloatTensor]:
    """Return the tensors that a bundle of floats stores, by name."""
    spec, plan = manifest.spec, manifest.plan
    matrix, vector = (spec.vocab_size, spec.hidden_size), (spec.hidden_size,)
    first, last = plan.segments[0], plan.segments[-1]
    found: dict[str, FloatTensor] = {}

    def add(segment: Segment, shapes: Mapping[str, Shape]) -> None:
        graph = names.segment_file(segment.start, segment.end)
        for name, shape in shapes.items():
            found[name] = FloatTensor(graph, "int64" if name.endswith(HEAD_IDS) else manifest.dtype, shape)

    add(first, {names.EMBED_TOKENS: matrix})
    if positions := spec.ends.learned_positions:
        add(first, {names.EMBED_POSITIONS: (positions, spec.hidden_size)})
    for segment in plan.segments:
        for layer in range(segment.start, segment.end):
            attention = spec.layers[layer].attention
            shapes = stored_shapes(spec.weights(layer), attention)
            matrices = matrix_parts(spec.weights(layer))
            for part, shape in shapes.items():
                add(segment, {names.layer_weight(layer, part): _turned(shape) if part in matrices else shape})
            if attention.rope is not None:
                table = (manifest.max_length, cache_head_dim(spec.ropes[attention.rope].head_dim) // 2)
                tables = [names.rope_table(attention.rope, part) for part in names.ROPE_PARTS]
                add(segment, {name: table for name in tables if name not in found})
        if (exit_spec := plan.exit_of(segment)) is not None:
            add(segment, dict(_exit_tensors(manifest, exit_spec)))
    if spec.ends.final_norm.has_bias:
        add(last, {names.FINAL_NORM_BIAS: vector})
    add(last, {names.FINAL_NORM: vector} | ({} if spec.tie_word_embeddings else {names.LM_HEAD: matrix}))
    if uses_unit_norm(plan):
        add(last if plan.has_state else first, {names.UNIT_NORM: vector})
    if plan.drafter is not None:
        found |= _drafter_tensors(manifest, plan.drafter)
    return found


def _drafter_tensors(manifest: Manifest, drafter: DrafterSpec) -> dict[str, FloatTensor]:
    spec, last = manifest.spec, manifest.plan.segments[-1]
    of_part = {FUSE: names.FUSE_FILE, MODEL_NORM: names.segment_file(last.start, last.end)}
    of_part |= dict.fromkeys(feature_norms(drafter), names.FUSE_FILE)
    graphs = {names.drafter_weight(part): graph for part, graph in of_part.items()}
    found = {}
    for name, shape in stored_drafter(drafter, spec.hidden_size, spec.vocab_size).items():
        dtype = "int64" if name.endswith(HEAD_IDS) else manifest.dtype
        stored = shape if is_rows(name) else _turned(shape)
        graph = names.drafter_file(stage_of(drafter, name.removeprefix(names.drafter_weight(""))))
        found[name] = FloatTensor(graphs.get(name, graph), dtype, stored)
    for number, rope in enumerate(drafter.ropes, len(spec.ropes)):
        table = (manifest.max_length, cache_head_dim(rope.head_dim) // 2)
        tables = [names.rope_table(number, part) for part in names.ROPE_PARTS]
        found |= dict.fromkeys(tables, FloatTensor(names.DRAFTER_FILE, manifest.dtype, table))
    return found


def _exit_tensors(manifest: Manifest, exit_spec: ExitSpec) -> Iterator[tuple[str, Shape]]:
    spec, depth = manifest.spec, exit_spec.exit_layer
    for part, shape in stored_parts(spec, exit_spec).items():
        yield names.exit_weight(depth, part), shape if part in ROWS else _turned(shape)
    if exit_spec.branch == "mlp":
        yield from ((names.exit_weight(depth, part), (spec.hidden_size,)) for part in mlp_norm(spec, depth))
    if exit_spec.head == "shared" and exit_spec.draft_vocab is not None:  # rows of the LM head
        yield names.exit_weight(depth, "head.weight"), (exit_spec.draft_vocab, spec.hidden_size)


def _turned(shape: Shape) -> Shape:
    """Return the shape of a matrix [out, in] as it is stored, [in, out]; of a vector the same."""
    return shape[::-1]


def check_float_tensors(bundle: Bundle, stored: Mapping[str, StoredTensor]) -> None:
    """Check that the graphs have every tensor, in the right type and shape.

    Args:
        bundle: A bundle of floats.
        stored: What its graphs have.

    Raises:
        BundleError: Naming the tensors that are missing or differ, each with a graph that should have it.
    """
    wanted = float_tensors(bundle.manifest)
    problems = []
    for name, tensor in wanted.items():
        if (found := stored.get(name)) is None:
            problems.append(f"{tensor.graph} has no tensor {name} in {names.WEIGHTS_FILE}")
        elif not _fits(name, tensor, found):
            expected = f"{tensor.dtype} {list(tensor.shape)}"
            problems.append(f"{tensor.graph}: tensor {name}: found {found.dtype} {list(found.shape)}, not {expected}")
    if not problems:
        return
    more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
    unknown = [name for name in stored if name not in wanted]
    raise BundleError(
        f"{bundle.folder}: {'; '.join(problems[:_MOST_NAMED])}{more}",
        found=f"others that no graph of this model has: {', '.join(unknown)}" if unknown else None,
        expected="the tensors of the model in bundle.json",
        remedy="copy the bundle again as a whole, or re-export it",
    )


def _fits(name: str, wanted: FloatTensor, found: StoredTensor) -> bool:
    shape = found.shape
    if name.startswith("rope.") and len(shape) == 2:
        shape = (min(shape[0], wanted.shape[0]), shape[1])
    return found.dtype == wanted.dtype and shape == wanted.shape
