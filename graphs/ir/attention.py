"""Attention of one layer: packed projection, rotary grouped-query attention over the shared cache.

::

    normed [batch, seq, hidden]
      └─ MatMul qkv_proj (+ bias)        [batch, seq, (heads + 2 * kv_heads) * head_dim]; a consumer has queries alone
           └─ Split, norms of q and k    where the layer has them: the CPU's attention kernel does not take them. Norms
                                         after the rotation take it out of the kernel, too
           └─ Mul of q by position       where queries grow; that commutes with the rotation
           └─ GroupQueryAttention        past/present: one buffer, updated in place; a consumer reads its producer's
                └─ mixed values          [batch, seq, heads * head_dim]; the layer multiplies them with o_proj

Which keys a position sees, that of row r of a run being p = past + r, W the layer's window:

=======================================  =======================================================================
a producer, or a consumer of one below   max(0, p - W + 1) .. p
a consumer of one above, or where the    max(0, p - W + 1) .. p - 1: the kernel receives lengths of one position less,
diagonal is masked                       and the rows' own positions for the rotation; at p = 0 the mixed values are 0
=======================================  =======================================================================

A run that holds position 0 and has a layer of the second kind must have one row: the kernel refuses more. A consumer
above its producer reads what this run has written, one below it what the buffer held before: so a graph that is run
again on the same rows is one more pass over an iterated group (:mod:`shortstack.graphs.kv_map`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.exit_parts import BLOCK
from shortstack.graphs.ir.builder import MICROSOFT, Attribute, GraphBuilder
from shortstack.graphs.ir.heads import rope_tables, split_heads
from shortstack.graphs.ir.lengths import Lengths, Packing, one_less
from shortstack.graphs.ir.lengths import positions as positions_of
from shortstack.graphs.ir.matrix import project
from shortstack.graphs.kv_map import consumers
from shortstack.graphs.layer_spec import Attention, Layer
from shortstack.graphs.precision import KVType
from shortstack.graphs.spec import ModelSpec

_QUERY_LENGTHS = 16  # the place of query_seqlens among the inputs of GroupQueryAttention


@dataclass(frozen=True, slots=True)
class LayerSite:
    """Where a decoder layer stands: in the stack, or on top of it as the block of an exit.

    Attributes:
        layer: What it is.
        weights: What the names of its weights begin with.
        node: Prefix of its node names.
        owner: Whose cache it reads.
        owns_kv: It is the one that writes it.
        sees_itself: A position sees its own key. A window counts it whether it does or not.
        kv_scales: Names of the scales of an int8 cache, by :data:`names.KV_PARTS`; empty where the cache is floats.
        is_lent: Other layers use its keys and values.
        number: Its number in the full model; -1 for the block of an exit.
    """

    layer: Layer
    weights: str
    node: str
    owner: names.CacheOwner
    owns_kv: bool = True
    sees_itself: bool = True
    kv_scales: tuple[str, ...] = ()
    is_lent: bool = False
    number: int = -1

    def weight(self, part: str) -> str:
        """Return the name of a weight, by its part in :mod:`shortstack.graphs.layer_weights`."""
        return f"{self.weights}.{part}"


def layer_site(spec: ModelSpec, layer: int, kv_cache: KVType = "float") -> LayerSite:
    """Return the site of a layer of the stack, by its number in the full model."""
    owner = spec.kv_map[layer]
    return LayerSite(
        layer=spec.layers[layer],
        weights=names.layer_weights(layer),
        node=f"/model/layers.{layer}",
        owner=owner,
        owns_kv=owner == layer,
        sees_itself=spec.sees_itself(layer),
        kv_scales=tuple(names.kv_scale(owner, part) for part in names.KV_PARTS) if kv_cache == "int8" else (),
        is_lent=bool(consumers(spec.kv_map, layer)),
        number=layer,
    )


def exit_layer_site(spec: ModelSpec, exit_layer: int) -> LayerSite:
    """Return the site of an exit's block; its cache is always floats."""
    return LayerSite(
        layer=spec.exit_block_layer(exit_layer),
        weights=names.exit_weight(exit_layer, BLOCK),
        node=f"/exits.{exit_layer}/{BLOCK}",
        owner=names.exit_block(exit_layer),
    )


@dataclass(slots=True)
class Caches:
    """The keys and values that a graph's layers read, in the state they are in while it is built.

    Attributes:
        g: The graph.
        written: Keys and values by owner, of those that a layer has written already; the others are graph inputs.
        new_rows: In the packed form: keys and values [1, seq, kv_heads * head_dim] of a producer's rows of this run.
        rewritten: In the packed form, and beside an int8 cache: what a consumer has written of its producer's, by the
            consumer's number.
    """

    g: GraphBuilder
    written: dict[names.CacheOwner, list[ir.Value]] = field(default_factory=dict)
    new_rows: dict[names.CacheOwner, list[ir.Value]] = field(default_factory=dict)
    rewritten: dict[names.CacheOwner, list[ir.Value]] = field(default_factory=dict)

    def of(self, owner: names.CacheOwner) -> list[ir.Value]:
        """Return keys and values of an owner inside the graph, or borrowed from below it."""
        return self.written[owner] if owner in self.written else self.before(owner)

    def before(self, owner: names.CacheOwner) -> list[ir.Value]:
        """Return keys and values of an owner as the run found them."""
        is_inside = self.g.has_input(names.past(owner, names.KV_PARTS[0]))
        if is_inside:
            return [self.g.input_named(names.past(owner, part)) for part in names.KV_PARTS]
        assert isinstance(owner, int)
        return [self.g.input_named(names.shared(owner, part)) for part in names.KV_PARTS]

    def presents(self) -> dict[str, ir.Value]:
        """Return all that was written, by port name."""
        return {
            names.present(owner, part): value
            for owner, values in (self.written | self.rewritten).items()
            for part, value in zip(names.KV_PARTS, values, strict=True)
        }

    def rows_of(self, owner: int) -> list[ir.Value]:
        """Return keys and values of a producer's rows of this run, inside the graph or from below it."""
        if owner in self.new_rows:
            return self.new_rows[owner]
        return [self.g.input_named(names.new_rows(owner, part)) for part in names.KV_PARTS]


def attention(g: GraphBuilder, site: LayerSite, normed: ir.Value, lengths: Lengths, caches: Caches) -> ir.Value:
    """Append attention without its output projection.

    Args:
        g: The graph.
        site: Which layer.
        normed: The normalised residual stream [batch, seq, hidden].
        lengths: How far the run reaches.
        caches: What it reads; keys and values that it writes are added.

    Returns:
        The mixed values [batch, seq, heads * head_dim].
    """
    node, own = f"{site.node}/attn", site.layer.attention
    packed = project(g, normed, site.weight("attn.qkv_proj.weight"), f"{node}/qkv_proj")
    if own.qkv_bias:
        packed = g.op("Add", [packed, g.weight(site.weight("attn.qkv_proj.bias"))], f"{node}/qkv_proj/Add")
    if lengths.spare_row:
        packed = g.op("Pad", [packed, g.constant([0, 0, 0, 0, 1, 0])], f"{node}/spare_row")  # [batch, seq + 1, ...]
    query, key, value = split_heads(g, own, site.weight, packed, lengths, node, owns_kv=site.owns_kv)
    if lengths.packing is not None:
        return _attend_packed(g, site, [query, key, value], lengths, lengths.packing, caches)
    if site.owns_kv:
        mixed, *caches.written[site.owner] = _attend(
            g, site, f"{node}/GroupQueryAttention", [query, key, value], caches, lengths, adds_rows=True
        )
    if not (site.owns_kv and site.sees_itself):
        if site.owns_kv and key is None:  # the diagonal is masked: the node above has only written keys and values
            width = own.heads * own.cache_head_dim
            query = g.op("Slice", [packed, g.constant([0]), g.constant([width]), g.constant([2])], f"{node}/query")
        name = f"{node}/GroupQueryAttention_read" if site.owns_kv else f"{node}/GroupQueryAttention"
        mixed = _read(g, site, name, query, caches, lengths)
    if lengths.spare_row:
        first, end, axis = g.constant([0]), g.constant([-1]), g.constant([1])
        mixed = g.op("Slice", [mixed, first, end, axis], f"{node}/drop_spare_row")  # [batch, seq, ...]
    return mixed


def _attend_packed(
    g: GraphBuilder,
    site: LayerSite,
    rows: list[ir.Value | None],
    lengths: Lengths,
    packing: Packing,
    caches: Caches,
) -> ir.Value:
    """Append attention of rows of several sequences; returns the mixed values [1, seq, heads * head_dim].

    The kernel takes a chunk of new rows for each sequence and has no form that only reads. So a consumer writes the
    rows of its producer once more, after the same positions and into the same buffer: they are there already.

    Args:
        g: The graph.
        site: Which layer.
        rows: Queries, keys and values [1, seq, ...]; or all of them packed as the first.
        lengths: How far each sequence reaches.
        packing: Where its rows lie.
        caches: What it reads; keys and values that it writes are added.
    """
    node, own = f"{site.node}/attn", site.layer.attention
    if not site.owns_kv:
        assert isinstance(site.owner, int)
        rows = [rows[0], *caches.rows_of(site.owner)]
    elif isinstance(site.owner, int) and site.is_lent:
        rows = _unpacked(g, own, rows, node)
        caches.new_rows[site.owner] = [value for value in rows[1:] if value is not None]
    placed = [
        None if value is None else packing.into_slots(g, value, f"{node}/{name}")
        for name, value in zip(("query", "key", "value"), rows, strict=True)
    ]
    mixed, *written = _attend(
        g, site, f"{node}/GroupQueryAttention", placed, caches, lengths, adds_rows=True, reads_before=not site.owns_kv
    )
    if site.owns_kv:
        caches.written[site.owner] = written
    else:
        caches.rewritten[site.number] = written
    return packing.into_rows(g, mixed, own.heads * own.cache_head_dim, node)


def _unpacked(g: GraphBuilder, own: Attention, rows: list[ir.Value | None], node: str) -> list[ir.Value | None]:
    """Append the split of queries, keys and values, if it is not made yet."""
    if rows[1] is not None:
        return rows
    width, kv_width = own.heads * own.cache_head_dim, own.kv_heads * own.cache_head_dim
    sizes = g.constant([width, kv_width, kv_width])
    return [*g.ops("Split", [rows[0], sizes], f"{node}/split", ("/query", "/key", "/value"), axis=-1)]


def _read(g: GraphBuilder, site: LayerSite, name: str, query: ir.Value, caches: Caches, lengths: Lengths) -> ir.Value:
    """Append attention of queries [batch, rows, heads * head_dim] over what a cache holds, without writing to it."""
    kv_width = site.layer.attention.kv_heads * site.layer.attention.cache_head_dim
    nothing = [g.constant([0, 0]), g.constant([0, kv_width]), g.constant([1, 2])]
    empty = g.op("Slice", [query, *nothing], f"{name}/no_new_rows")  # [batch, 0, kv_heads * head_dim]
    at = None if site.sees_itself else positions_of(g, query, lengths)
    reach = lengths if site.sees_itself else one_less(g, lengths)
    mixed, *presents = _attend(g, site, name, [query, empty, empty], caches, reach, at)
    if site.kv_scales and not site.owns_kv:
        caches.rewritten[site.number] = presents
    if at is None:
        return mixed

    def make_visible() -> ir.Value:
        after_first = g.op("Greater", [at, g.constant(0)], "/model/lengths/after_first")
        return g.op("Unsqueeze", [after_first, g.constant([2])], "/model/lengths/sees_something")  # [batch, rows, 1]

    visible = g.once(("sees_something", lengths.spare_row), make_visible)
    return g.op("Mul", [mixed, g.op("CastLike", [visible, mixed], f"{name}/mask")], f"{name}/first_position")


def _attend(
    g: GraphBuilder,
    site: LayerSite,
    name: str,
    query_key_value: list[ir.Value | None],
    caches: Caches,
    lengths: Lengths,
    positions: ir.Value | None = None,
    *,
    adds_rows: bool = False,
    reads_before: bool = False,
) -> list[ir.Value]:
    """Append the kernel: the mixed values and, where keys and values are new, also what the cache is afterwards.

    Args:
        g: The graph.
        site: Which layer.
        name: The node's name.
        query_key_value: Queries, keys and values; or all of them packed as the first. Empty keys and values add none.
        caches: What it reads.
        lengths: How far it reads.
        positions: The rows' own positions, where ``lengths`` count one less.
        adds_rows: There are new keys and values.
        reads_before: The cache is read as the run found it, whatever layers below have written.
    """
    own = site.layer.attention
    rotates = own.rope is not None and not own.qk_norm_after_rope
    tables = rope_tables(g, own) if rotates else [None, None]
    inputs: list[ir.Value | None] = [
        *query_key_value,
        *(caches.before(site.owner) if reads_before else caches.of(site.owner)),
        lengths.past_end,
        lengths.total,
        *tables,
    ]
    attributes: dict[str, Attribute] = {}
    if positions is not None or site.kv_scales:
        inputs.append(positions)
    if site.kv_scales:  # attention_bias and head_sink stay empty
        inputs += [None, None, *(g.weight(scale) for scale in site.kv_scales)]
        attributes = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    if lengths.packing is not None:  # the last of the kernel's inputs; those between stay empty
        inputs += [None] * (_QUERY_LENGTHS - len(inputs))
        inputs.append(lengths.packing.query_lengths)
    if own.window:  # with lengths of one less, the kernel counts from the position before
        attributes["local_window_size"] = own.window - (positions is not None)
    if own.softcap:
        attributes["softcap"] = own.softcap
    # The kernel refuses an int8 cache without a place for what it is afterwards, also where nothing is added. A
    # consumer's is bound to the same buffer, so that nothing is copied. A layer that writes and cannot see itself reads
    # in a second node, whose place is its own: that costs a copy of the cache in each run.
    has_presents = adds_rows or bool(site.kv_scales)
    return g.ops(
        "GroupQueryAttention",
        inputs,
        name,
        ("", "/present_key", "/present_value") if has_presents else ("",),
        domain=MICROSOFT,
        num_heads=own.heads,
        kv_num_heads=own.kv_heads,
        scale=own.score_scale,
        do_rotary=int(rotates),
        rotary_interleaved=0,
        **attributes,
    )
