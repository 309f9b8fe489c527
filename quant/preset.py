"""What a quantized bundle is to be: a preset, and the assignment of one format to each matrix that follows from it.

A preset speaks of parts, an assignment of matrices. A layer's matrix has one entry in an assignment, and a bundle
stores it once: there is no way to say that a draft runs another layer than its verification. Only an exit's own
matrices may have formats of their own, since what it proposes is judged by the final head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from shortstack.graphs import names
from shortstack.graphs.drafter_weights import drafter_matrices, is_rows
from shortstack.graphs.errors import RequestError
from shortstack.graphs.exit_parts import ROWS, exit_matrices
from shortstack.graphs.layer_weights import matrix_parts, table_parts
from shortstack.graphs.plan import SplitPlan
from shortstack.graphs.precision import CODE_TYPES, BlockFormat, KVType
from shortstack.graphs.spec import ModelSpec

Format = BlockFormat | None  # None: floats of the bundle's dtype

_BITS = {code_type.name: code_type.bits for code_type in CODE_TYPES.values()}
FORMAT_NAMES = (*_BITS, "float")


@dataclass(frozen=True, slots=True)
class Preset:
    """A named mix of formats and the method that rounds to them.

    Attributes:
        name: What the command line calls it.
        summary: One line for ``--help``.
        method: How weights are rounded, a key of :data:`shortstack.quant.method.METHODS`.
        weights: Format of every layer matrix not named below.
        head: Format of the LM head, and of the embedding where that is tied to it.
        embedding: Format of an untied embedding, and of tables of the layers whose rows are looked up.
        first_rows: How many rows of the LM head, from the first, have another format: byte-pair merges are numbered by
            falling frequency, so these are the tokens that matter most.
        first_rows_format: Which; None where ``first_rows`` is 0.
        draft_head: Format of the exits' heads; ``"as head"`` shares or follows the LM head. Other matrices
            of exits are int8 where ``weights`` are in blocks.
        parts: Formats of single matrices of every layer, by their parts in graphs/layer_weights.py.
        layers: Formats of all matrices of single layers, negative numbers counted from the top. Wins over ``parts``.
        kv_cache: Element type of the cache.

    Raises:
        RequestError: A head or an embedding with offsets, which only the products of layers have.
    """

    name: str
    summary: str
    method: str
    weights: Format
    head: Format
    embedding: Format
    first_rows: int = 0
    first_rows_format: Format = None
    draft_head: Format | str = "as head"
    parts: Mapping[str, Format] = field(default_factory=dict)
    layers: Mapping[int, Format] = field(default_factory=dict)
    kv_cache: KVType = "float"

    def __post_init__(self) -> None:
        for part in ("head", "embedding", "first_rows_format", "draft_head"):
            wanted = getattr(self, part)
            if isinstance(wanted, BlockFormat) and wanted.has_offsets:
                raise RequestError(
                    f"preset {self.name}: format of {part}", found=str(wanted), expected="a format without offsets"
                )

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized, the cache included."""
        formats = (self.weights, self.head, self.embedding, self.first_rows_format, self.draft_head)
        singles = (*self.parts.values(), *self.layers.values())
        return self.kv_cache == "float" and not any(isinstance(f, BlockFormat) for f in (*formats, *singles))

    def reshaped(self, block_size: int | None = None, is_symmetric: bool | None = None) -> Preset:
        """Return the preset with another block size or symmetry in all its formats; None keeps what each has."""

        def shaped(value: Any) -> Any:
            if isinstance(value, BlockFormat):
                symmetric = value.is_symmetric if is_symmetric is None else is_symmetric
                return replace(value, block_size=block_size or value.block_size, is_symmetric=symmetric)
            if isinstance(value, Mapping):
                return {key: shaped(wanted) for key, wanted in value.items()}
            return value

        return replace(self, **{f.name: shaped(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Assignment:
    """The format of each matrix of one bundle.

    Attributes:
        matrices: By name: embedding, untied LM head, every layer matrix. None: floats.
        draft_heads: By depth, exits whose head is a tensor of its own.
        first_rows: Rows of the LM head that have another format, and which; None where all have one.
        exit_matrices: By name: the exits' other own matrices, of branches and of low-rank heads; and the drafter's.
        tables: By name: tables of the layers, whose rows are looked up.
    """

    matrices: Mapping[str, Format]
    draft_heads: Mapping[int, Format]
    first_rows: tuple[int, BlockFormat] | None = None
    exit_matrices: Mapping[str, Format] = field(default_factory=dict)
    tables: Mapping[str, Format] = field(default_factory=dict)


def parse_format(name: str, block_size: int, is_symmetric: bool) -> Format:
    """Return the format that the command line calls by one of FORMAT_NAMES.

    Raises:
        RequestError: Another name.
    """
    if name == "float":
        return None
    if name not in _BITS:
        raise RequestError("format", found=name, expected=f"one of {', '.join(FORMAT_NAMES)}")
    return BlockFormat(_BITS[name], block_size, is_symmetric)


def assign(preset: Preset, spec: ModelSpec, plan: SplitPlan) -> Assignment:
    """Return the format of each matrix of a model.

    Raises:
        RequestError: The preset names a layer that the model does not have.
    """
    depth = spec.num_hidden_layers
    outside = [layer for layer in preset.layers if not -depth <= layer < depth]
    if outside:
        raise RequestError(
            f"preset {preset.name} names a layer that the model does not have",
            found=outside,
            expected=f"{depth} layers",
        )
    single = {layer % depth: wanted for layer, wanted in preset.layers.items()}
    matrices: dict[str, Format] = {names.EMBED_TOKENS: preset.head if spec.tie_word_embeddings else preset.embedding}
    for layer in range(depth):
        for part in matrix_parts(spec.weights(layer)):
            wanted = single[layer] if layer in single else preset.parts.get(part, preset.weights)
            matrices[names.layer_weight(layer, part)] = wanted
    if not spec.tie_word_embeddings:
        matrices[names.LM_HEAD] = preset.head
    draft_heads: dict[int, Format] = {}
    exit_formats: dict[str, Format] = {}
    # A branch is small compared with the layers below it, and rounding it costs accepted drafts: 8 bits.
    branch = None if preset.weights is None else BlockFormat(8, preset.weights.block_size)
    wanted_head = preset.head if isinstance(preset.draft_head, str) else preset.draft_head
    for exit_spec in plan.exits:
        depth_of_exit = exit_spec.exit_layer
        follows = preset.draft_head == "as head"
        is_own = exit_spec.head == "own" or (exit_spec.head == "shared" and exit_spec.draft_vocab is not None)
        if is_own or (exit_spec.head == "shared" and not follows and wanted_head != preset.head):
            draft_heads[depth_of_exit] = wanted_head
        for part in exit_matrices(spec, exit_spec):
            if part != "head.weight":
                exit_formats[names.exit_weight(depth_of_exit, part)] = wanted_head if part in ROWS else branch
    if plan.drafter is not None:
        for name in drafter_matrices(plan.drafter, spec.hidden_size, spec.vocab_size):
            exit_formats[name] = wanted_head if is_rows(name) else preset.weights
    first_rows = None
    # In a small vocabulary all rows are first rows: then one format is enough.
    if preset.first_rows_format is not None and preset.head is not None and preset.first_rows < spec.vocab_size:
        first_rows = (preset.first_rows, preset.first_rows_format)
    tables = {
        names.layer_weight(layer, part): preset.embedding
        for layer in range(depth)
        for part in table_parts(spec.weights(layer))
    }
    return Assignment(matrices, draft_heads, first_rows, exit_formats, tables)


def with_kept(assignment: Assignment, spec: ModelSpec, kept: Collection[str]) -> Assignment:
    """Return an assignment without the matrices whose blocks are kept as they are: they are not rounded."""
    head = names.EMBED_TOKENS if spec.tie_word_embeddings else names.LM_HEAD
    matrices = {name: None if name in kept else wanted for name, wanted in assignment.matrices.items()}
    return replace(assignment, matrices=matrices, first_rows=None if head in kept else assignment.first_rows)
