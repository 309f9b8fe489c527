"""How many bytes each part of a bundle takes in weights.data and in the cache, by bundle.json alone.

For :mod:`shortstack.runtime.inspection.report`. A matrix is floats, or blocks where the bundle's precision lists it,
with scales of the activations' type. Heads are stored padded to the width that the attention kernel takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import EMBED_TOKENS, FUSE, HEAD, MODEL_NORM, stage_part, stored_drafter
from shortstack.graphs.drafter_weights import HEAD_IDS as DRAFTER_IDS
from shortstack.graphs.exit_parts import HEAD_IDS, ROWS, exit_matrices, head_rows, stored_parts
from shortstack.graphs.kv_bytes import kv_bytes_per_token
from shortstack.graphs.layer_spec import cache_head_dim
from shortstack.graphs.layer_weights import matrix_parts, stored_shapes, table_parts
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.precision import SPARE_ROWS
from shortstack.graphs.spec import DType, ModelSpec

BYTES_PER_VALUE: dict[DType, int] = {"float32": 4, "float16": 2}
ID_BYTES = 8  # an entry of a trimmed head's id map, int64
_KV_SCALE_BYTES = 4  # float32 whatever the activations are


def final_head(spec: ModelSpec) -> str:
    """Return the name of the final head's matrix."""
    return names.EMBED_TOKENS if spec.tie_word_embeddings else names.LM_HEAD


def matrix_bytes(manifest: Manifest, name: str, rows: int, width: int) -> int:
    """Return what a matrix [rows, width] takes, by its name."""
    value_bytes, block_format = BYTES_PER_VALUE[manifest.dtype], manifest.precision.weights.get(name)
    if block_format is None:
        return rows * width * value_bytes
    return block_format.stored_bytes(rows, width, value_bytes)


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What one decoder layer takes in weights.data, in bytes.

    Attributes:
        qkv: The q, k and v projections, with their biases and the scales of an int8 cache.
        o: The output projection of attention, with its bias.
        mlp: The gate, up and down projections, with their biases, and the branch on tokens with its table.
        norms: All norms, and the factor of a layer that has one.
    """

    qkv: int
    o: int
    mlp: int
    norms: int

    @property
    def total(self) -> int:
        """The whole layer."""
        return self.qkv + self.o + self.mlp + self.norms


def layer_bytes(manifest: Manifest, layer: int) -> LayerBytes:
    """Return what the parts of one layer take."""
    spec, owns_kv = manifest.spec, manifest.spec.owns_kv(layer)
    table = spec.weights(layer)
    matrices, tables = matrix_parts(table), table_parts(table)
    taken = dict.fromkeys(("attn.qkv_proj", "attn.o_proj", "mlp", "norm"), 0)
    shared: dict[str, tuple[str, int]] = {}
    for part, shape in stored_shapes(table, spec.layers[layer].attention).items():
        other = "mlp" if part.startswith("per_layer.") else "norm"  # the branch on tokens counts as a part of the MLP
        kind = "norm" if "norm" in part else next((kind for kind in taken if part.startswith(kind)), other)
        if part in tables:
            taken[kind] += matrix_bytes(manifest, names.layer_weight(layer, part), *shape)
        elif part in matrices:
            taken[kind] += matrix_bytes(manifest, names.layer_weight(layer, part), *shape)
            shared |= _of_input(manifest, names.layer_weight(layer, part), shape[1], kind)
        else:
            taken[kind] += math.prod(shape) * BYTES_PER_VALUE[manifest.dtype]
    for kind, size in shared.values():
        taken[kind] += size
    if manifest.precision.kv_cache == "int8" and owns_kv:
        # An int8 cache has a scale for each number of a position's key and value.
        taken["attn.qkv_proj"] += kv_bytes_per_token(spec, _KV_SCALE_BYTES, (layer,))
    return LayerBytes(*taken.values())


def _of_input(manifest: Manifest, name: str, width: int, kind: str) -> dict[str, tuple[str, int]]:
    """Return what a matrix shares with others of its input, by name, with its part of the layer and its bytes."""
    stored, found = manifest.precision.weights.get(name), {}
    if stored is not None and stored.side_columns:
        factor = names.side_factor(name)
        found[factor] = kind, matrix_bytes(manifest, factor, stored.side_columns, width)
    if stored is not None and stored.is_reordered:
        found[names.input_order(name)] = kind, width * ID_BYTES
    return found


def layers_bytes(manifest: Manifest) -> int:
    """Return what all layers take."""
    return sum(layer_bytes(manifest, layer).total for layer in range(manifest.spec.num_hidden_layers))


def vocabulary_bytes(manifest: Manifest, name: str) -> int:
    """Return what the embedding or the LM head takes; its first rows may have a format of their own."""
    spec, first = manifest.spec, names.first_rows(name)
    if first not in manifest.precision.weights:
        return matrix_bytes(manifest, name, spec.vocab_size, spec.hidden_size)
    count = _first_rows(manifest, name)
    return matrix_bytes(manifest, first, count, spec.hidden_size) + matrix_bytes(
        manifest, name, spec.vocab_size - count, spec.hidden_size
    )


def stored_as(manifest: Manifest, name: str) -> str:
    """Return how a matrix is stored, in words."""
    formats = manifest.precision.weights
    words = str(formats.get(name, manifest.dtype))
    first = formats.get(names.first_rows(name))
    return words if first is None else f"first rows {first}; others {words}"


def exit_head(manifest: Manifest, exit_spec: ExitSpec) -> str | None:
    """Return the name of an exit's own head matrix [rows, ...]; None if it uses the final head's."""
    if exit_spec.head == "low_rank":
        return names.exit_weight(exit_spec.exit_layer, "head.up.weight")
    own = names.exit_weight(exit_spec.exit_layer, "head.weight")
    is_own = exit_spec.head == "own" or exit_spec.draft_vocab is not None or own in manifest.precision.weights
    return own if is_own else None


def exit_head_bytes(manifest: Manifest, exit_spec: ExitSpec) -> int:
    """Return what an exit's own head matrix takes, without its id map; 0 if it uses the final head's."""
    own, spec = exit_head(manifest, exit_spec), manifest.spec
    width = exit_spec.head_rank or spec.hidden_size
    return 0 if own is None else matrix_bytes(manifest, own, head_rows(spec, exit_spec), width)


def exit_branch_bytes(manifest: Manifest, exit_spec: ExitSpec) -> int:
    """Return what else an exit has of its own: branch, norm, gate, and the projection of a low-rank head."""
    spec, value_bytes = manifest.spec, BYTES_PER_VALUE[manifest.dtype]
    matrices, taken = exit_matrices(spec, exit_spec), 0
    for part, shape in stored_parts(spec, exit_spec).items():
        if part in matrices and part not in ROWS:
            taken += matrix_bytes(manifest, names.exit_weight(exit_spec.exit_layer, part), *matrices[part])
        elif part not in (*ROWS, HEAD_IDS):
            taken += math.prod(shape) * value_bytes
    return taken


def read_bytes(manifest: Manifest, exit_spec: ExitSpec | None) -> int:
    """Return the weights that a head reads for one position, norm and branch included; None is the final head."""
    norm = manifest.spec.hidden_size * BYTES_PER_VALUE[manifest.dtype]
    if exit_spec is None:
        return norm + vocabulary_bytes(manifest, final_head(manifest.spec))
    head = exit_head_bytes(manifest, exit_spec) or vocabulary_bytes(manifest, final_head(manifest.spec))
    norm = norm if exit_spec.norm == "final" else 0  # one of its own is part of the branch
    return norm + exit_branch_bytes(manifest, exit_spec) + head


def draft_heads_bytes(manifest: Manifest) -> int:
    """Return what the exits have of their own: heads, their id maps and all else.

    Heads of the same rows and format are one tensor, but for those in blocks that were rounded for the inputs of each
    exit. bundle.json does not say which: the size of weights.data does.
    """
    exits = manifest.plan.exits
    each = [(e, exit_head(manifest, e), exit_head_bytes(manifest, e)) for e in exits]
    formats = manifest.precision.weights
    # Two trimmed heads have the same rows exactly when their id maps are the same file.
    rows = {e: manifest.files[names.draft_vocab_file(e.exit_layer)].sha256 if e.draft_vocab else "" for e in exits}
    fixed = sum({rows[e]: e.draft_vocab * ID_BYTES for e in exits if e.draft_vocab}.values())
    fixed += sum(exit_branch_bytes(manifest, e) for e in exits)
    fixed += sum(size for e, _, size in each if e.head != "shared")
    own = [(e, name, size) for e, name, size in each if name is not None and e.head == "shared"]
    shared = sum({(rows[e], formats.get(name)): size for e, name, size in own}.values())
    if not any(name in formats for _, name, _ in own):
        return fixed + shared
    apart = sum(size for _, _, size in own)
    if names.first_rows(final_head(manifest.spec)) in formats:  # nothing is left to tell by
        return fixed + apart
    left = manifest.files[names.WEIGHTS_FILE].bytes - fixed - _without_exits(manifest)
    return fixed + min(shared, apart, key=lambda heads: abs(left - heads))


def drafter_bytes(manifest: Manifest) -> int:
    """Return what a trained drafter has of its own, id map and rotary tables included; 0 without one."""
    drafter = manifest.plan.drafter
    if drafter is None:
        return 0
    parts, value_bytes = _drafter_part_bytes(manifest, drafter), BYTES_PER_VALUE[manifest.dtype]
    positions = manifest.max_length + (0 if manifest.precision.is_float else SPARE_ROWS)
    tables = positions * sum(cache_head_dim(rope.head_dim) for rope in drafter.ropes) * value_bytes
    shared_norm = names.drafter_weight(MODEL_NORM) if manifest.precision.is_float else None  # the model's, stored once
    return tables + sum(size for name, size in parts.items() if name != shared_norm)


def draft_bytes(manifest: Manifest) -> int:
    """Return the weights that a trained drafter reads for a further draft: its layers, or one of them, and the head."""
    drafter = manifest.plan.drafter
    assert drafter is not None
    looked_up = {names.drafter_weight(part) for part in (FUSE, MODEL_NORM, DRAFTER_IDS)}
    looked_up |= {names.drafter_weight(stage_part(EMBED_TOKENS, stage)) for stage in range(drafter.stages)}
    parts = _drafter_part_bytes(manifest, drafter)
    own = sum(size for name, size in parts.items() if name not in looked_up) // drafter.stages
    if drafter.centroids:  # of the head, the rows of the likeliest groups alone
        own -= parts[names.drafter_weight(HEAD)] * (drafter.centroids - drafter.top_centroids) // drafter.centroids
    return own if drafter.has_own_head else own + vocabulary_bytes(manifest, final_head(manifest.spec))


def _drafter_part_bytes(manifest: Manifest, drafter: DrafterSpec) -> dict[str, int]:
    spec, value_bytes = manifest.spec, BYTES_PER_VALUE[manifest.dtype]
    found = {}
    for name, shape in stored_drafter(drafter, spec.hidden_size, spec.vocab_size).items():
        if len(shape) == 2:
            found[name] = matrix_bytes(manifest, name, shape[0], shape[1])
        else:
            found[name] = shape[0] * (ID_BYTES if name == names.drafter_weight(DRAFTER_IDS) else value_bytes)
    return found


def other_bytes(manifest: Manifest) -> int:
    """Return what final norm, learned positions and rotary tables take, these [max_length (+ spare), head_dim / 2]."""
    spec, precision = manifest.spec, manifest.precision
    positions = manifest.max_length + (0 if precision.is_float else SPARE_ROWS)
    norms = spec.hidden_size * (1 + spec.ends.final_norm.has_bias + spec.ends.learned_positions)
    columns = sum(cache_head_dim(rope.head_dim) for rope in spec.ropes)
    return (norms + positions * columns) * BYTES_PER_VALUE[manifest.dtype]


def cache_bytes_per_token(manifest: Manifest, layers: Iterable[int]) -> int:
    """Return what one position takes in the K,V caches of these layers, which own one."""
    value_bytes = 1 if manifest.precision.kv_cache == "int8" else BYTES_PER_VALUE[manifest.dtype]
    return kv_bytes_per_token(manifest.spec, value_bytes, layers)


def block_cache_bytes_per_token(manifest: Manifest, exit_spec: ExitSpec | None) -> int:
    """Return what one position takes in the cache of an exit's block, always floats; 0 without a block."""
    if exit_spec is None or exit_spec.branch != "block":
        return 0
    return kv_bytes_per_token(manifest.spec, BYTES_PER_VALUE[manifest.dtype], (names.exit_block(exit_spec.exit_layer),))


def _without_exits(manifest: Manifest) -> int:
    """Return the size of weights.data without the exits' own heads."""
    head = 0 if manifest.spec.tie_word_embeddings else vocabulary_bytes(manifest, names.LM_HEAD)
    rest = other_bytes(manifest) + layers_bytes(manifest) + drafter_bytes(manifest)
    return rest + head + vocabulary_bytes(manifest, names.EMBED_TOKENS)


def _first_rows(manifest: Manifest, name: str) -> int:
    """Return about how many rows of a vocabulary matrix have the format of the first ones.

    bundle.json lists the two formats and not where one ends; what weights.data holds beyond all the rest tells.
    """
    spec, first = manifest.spec, names.first_rows(name)
    hidden = spec.hidden_size
    per_first, per_other = (matrix_bytes(manifest, part, 1, hidden) for part in (first, name))
    rest = other_bytes(manifest) + layers_bytes(manifest) + draft_heads_bytes(manifest) + drafter_bytes(manifest)
    if not spec.tie_word_embeddings:
        rest += matrix_bytes(manifest, names.EMBED_TOKENS, spec.vocab_size, hidden)
    beyond = manifest.files[names.WEIGHTS_FILE].bytes - rest - spec.vocab_size * per_other
    return min(spec.vocab_size, max(0, round(beyond / (per_first - per_other)))) if per_first != per_other else 0
