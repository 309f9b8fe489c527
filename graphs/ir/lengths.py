"""How far the positions of a run reach, as attention receives it, and what follows from it inside a graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from shortstack.graphs.ir.builder import GraphBuilder


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the rows of several sequences lie in a run, see :mod:`shortstack.graphs.packing`.

    Attributes:
        query_lengths: ``query_seqlens``, int32 [slots].
        to_slots: Of each place the row, int64 [slots, chunk].
        to_rows: Of each row the place, int64 [1, seq].
        positions: Of each row the position in its text, int64 [1, seq]; None where nothing reads it.
    """

    query_lengths: ir.Value
    to_slots: ir.Value
    to_rows: ir.Value
    positions: ir.Value | None = None

    def into_slots(self, g: GraphBuilder, rows: ir.Value, node: str) -> ir.Value:
        """Append the move of rows [1, seq, width] to their places, [slots, chunk, width]."""
        flat = g.op("Squeeze", [rows, g.constant([0])], f"{node}/rows")  # [seq, width]
        return g.op("Gather", [flat, self.to_slots], f"{node}/into_slots")

    def into_rows(self, g: GraphBuilder, places: ir.Value, width: int, node: str) -> ir.Value:
        """Append the move of places [slots, chunk, width] to their rows, [1, seq, width]."""
        flat = g.op("Reshape", [places, g.constant([-1, width])], f"{node}/places")  # [slots * chunk, width]
        return g.op("Gather", [flat, self.to_rows], f"{node}/into_rows")


@dataclass(frozen=True, slots=True)
class Lengths:
    """How far the positions of a run reach, as attention receives it.

    Attributes:
        past_end: ``seqlens_k``, int32 [batch].
        total: ``total_sequence_length``, int32 [].
        spare_row: Both count one empty row behind the run's own, which attention adds and drops again; see
            :meth:`Precision.has_spare_row`.
        packing: Where the rows of several sequences lie; None where a run has rows of one.
    """

    past_end: ir.Value
    total: ir.Value
    spare_row: bool = False
    packing: Packing | None = None


def positions(g: GraphBuilder, rows: ir.Value, lengths: Lengths) -> ir.Value:
    """Append the positions of a run's rows, the spare one included, int64 [batch, rows].

    Args:
        g: The graph.
        rows: Anything with a column per row, [batch, rows, ...].
        lengths: How far the run reaches.
    """
    if lengths.packing is not None:
        assert lengths.packing.positions is not None, "the contract has no port for positions"
        return lengths.packing.positions

    def make() -> ir.Value:
        node = "/model/lengths"
        count = g.op("Shape", [rows], f"{node}/rows", start=1, end=2)  # [1]
        scalar = g.op("Squeeze", [count], f"{node}/row_count")
        steps = g.op("Range", [g.constant(0), scalar, g.constant(1)], f"{node}/steps")  # [rows]
        end = g.op("Cast", [lengths.past_end], f"{node}/past_end", to=int(ir.DataType.INT64))
        first = g.op("Sub", [g.op("Add", [end, g.constant(1)], f"{node}/total"), count], f"{node}/first")  # [batch]
        column = g.op("Unsqueeze", [first, g.constant([1])], f"{node}/first_column")  # [batch, 1]
        return g.op("Add", [column, steps], f"{node}/positions")

    return g.once(("positions", lengths.spare_row), make)


def one_less(g: GraphBuilder, lengths: Lengths) -> Lengths:
    """Append lengths that count one position less, but never less than a run of one row has."""
    least = 1 + lengths.spare_row

    def less(value: ir.Value, least: int, name: str) -> ir.Value:
        one, bound = g.constant(1, np.int32), g.constant(least, np.int32)
        node = f"/model/lengths/{name}"
        key = ("one_less", name, lengths.spare_row)
        return g.once(key, lambda: g.op("Max", [g.op("Sub", [value, one], f"{node}/Sub"), bound], node))

    return Lengths(less(lengths.past_end, least - 1, "past_before"), less(lengths.total, least, "total_before"))


def with_spare_row(g: GraphBuilder, lengths: Lengths) -> Lengths:
    """Append lengths that count one empty row behind the run's own."""
    one, ends = g.constant(1, np.int32), (lengths.past_end, lengths.total)
    past_end, total = (g.op("Add", [end, one], f"/model/with_spare_row/{end.name}") for end in ends)
    return Lengths(past_end, total, spare_row=True)
