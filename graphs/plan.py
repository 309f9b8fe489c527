"""Where a model is cut, and which segment ends in which exit node.

::

    boundaries (4, 8) of a model with L = 12 layers

    layers   0 1 2 3 | 4 5 6 7 | 8 9 10 11
    segment     0    |    1    |     2
                exit 4    exit 8    final head

A segment is the layers between two boundaries, one ONNX graph. The first embeds tokens; the last ends in the final
head. An exit after E layers means that layers 0..E-1 ran.
"""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.graphs.errors import RequestError


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """What turns the residual stream at one boundary into a prediction: the shared final norm and an LM head.

    Attributes:
        exit_layer: Number of layers run before the exit.
        draft_vocab: Rows of a head trimmed to the most useful token ids; None keeps the whole LM head.
    """

    exit_layer: int
    draft_vocab: int | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """The layers ``[start, end)`` as one graph.

    Attributes:
        index: Position in the stack, 0 at the bottom.
        start: First layer.
        end: One past the last layer: the boundary, or L.
        is_first: Takes token ids instead of hidden states.
        is_last: Ends in the final head instead of passing hidden states on.
    """

    index: int
    start: int
    end: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The cuts of one model.

    Attributes:
        num_layers: L.
        exits: One exit node per boundary, ascending; may be empty (an uncut model).
    """

    num_layers: int
    exits: tuple[ExitSpec, ...]

    def __post_init__(self) -> None:
        layers = [e.exit_layer for e in self.exits]
        for layer in layers:
            if not 0 < layer < self.num_layers:
                raise RequestError(
                    "--exit-layer is outside the model",
                    found=layer,
                    expected=f"1..{self.num_layers - 1} for a model of {self.num_layers} layers",
                    remedy="choose a depth inside the model",
                )
        if sorted(set(layers)) != layers:
            raise RequestError(
                "--exit-layer values must be different and ascending",
                found=layers,
                expected=sorted(set(layers)),
                remedy="give each depth once",
            )

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The depths at which the model is cut."""
        return tuple(e.exit_layer for e in self.exits)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The graphs, bottom to top."""
        edges = (0, *self.boundaries, self.num_layers)
        last = len(edges) - 2
        return tuple(
            Segment(index, edges[index], edges[index + 1], is_first=index == 0, is_last=index == last)
            for index in range(last + 1)
        )

    def exit_of(self, segment: Segment) -> ExitSpec | None:
        """Return the exit node at the segment's upper boundary; None for the last segment."""
        return None if segment.is_last else self.exits[segment.index]
