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

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.errors import RequestError

Branch = Literal["none", "linear", "mlp", "block"]
Norm = Literal["final", "own", "none"]
HeadKind = Literal["shared", "own", "low_rank"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "branch": get_args(Branch),
    "norm": get_args(Norm),
    "head": get_args(HeadKind),
}
_LINEAR_ONLY = ("linear_mlp", "sees_token", "sees_state")


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """What turns the residual stream at one boundary into a prediction: a branch, a norm and an LM head.

    With h the residual stream at the boundary, m the one between attention and MLP of the layer below it, e the token's
    embedding, s the state of the position before, and unit(x) = x / rms(x)::

        branch  none     x = h
                linear   x = W u + b (+ a gated MLP of u), u = [unit(h), unit(e) if sees_token, s if sees_state]
                mlp      x = m + MLP(norm(m)), the norm being the one of the layer below the boundary
                block    x = a decoder layer of h, with attention and a cache of its own
        norm    y = final norm | own norm | x itself
        head    logits = LM head | own head | B (A y), of all rows or of some

    The *state* of a position is unit(residual stream after all layers); an exit that sees states also gives unit(x),
    its guess of the state of its own position.

    Attributes:
        exit_layer: Number of layers run before the exit.
        draft_vocab: Rows of a head trimmed to the most useful token ids; None keeps the whole vocabulary.
        branch: ``none``, ``linear``, ``mlp`` or ``block``.
        norm: ``final`` (the model's), ``own`` or ``none``.
        head: ``shared`` (the model's LM head, or rows of it), ``own`` or ``low_rank``.
        head_rank: Of a low-rank head: the width between its two matrices; else 0.
        linear_mlp: Inner width of the gated MLP that is added to a linear branch; 0 without one.
        sees_token: A linear branch reads the token's embedding.
        sees_state: A linear branch reads the state of the position before.
        has_gate: A linear confidence gate, sigmoid(w unit(h) + b), as in CALM (https://arxiv.org/abs/2207.07061).

    Raises:
        RequestError: An option that does not exist, or that the branch or the head does not have.
    """

    exit_layer: int
    draft_vocab: int | None = None
    branch: Branch = "none"
    norm: Norm = "final"
    head: HeadKind = "shared"
    head_rank: int = 0
    linear_mlp: int = 0
    sees_token: bool = False
    sees_state: bool = False
    has_gate: bool = False

    def __post_init__(self) -> None:
        where = f"exit after {self.exit_layer} layers"
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RequestError(f"{where}: {name}", found=repr(getattr(self, name)), expected=" or ".join(choices))
        if (self.head_rank > 0) != (self.head == "low_rank") or self.head_rank < 0:
            expected = "1 or more" if self.head == "low_rank" else f"0 with a head of the kind {self.head}"
            raise RequestError(f"{where}: head_rank", found=self.head_rank, expected=expected)
        if self.linear_mlp < 0:
            raise RequestError(f"{where}: linear_mlp", found=self.linear_mlp, expected="0 or more")
        set_in_vain = [name for name in _LINEAR_ONLY if getattr(self, name)]
        if self.branch != "linear" and set_in_vain:
            raise RequestError(
                f"{where}: only a linear branch has {', '.join(set_in_vain)}", found=f"branch {self.branch}"
            )

    @property
    def is_plain(self) -> bool:
        """Whether the exit has no weights of its own: the final norm and the LM head, or rows of it."""
        return self == ExitSpec(self.exit_layer, self.draft_vocab)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExitSpec:
        """Rebuild an exit from its fields, all of which must be there.

        Raises:
            ValueError: A field is missing, unknown or of another type.
            RequestError: A value that does not exist.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping) or data.keys() != set(known):
            raise ValueError(f"an exit has the fields {', '.join(known)}, not {data!r}")
        for name, value in data.items():
            if type(value) not in _JSON_TYPES[name]:  # not isinstance: True is an int
                raise ValueError(f"{name} is {value!r}")
        return cls(**data)


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "exit_layer": (int,),
    "draft_vocab": (int, type(None)),
    **dict.fromkeys(("branch", "norm", "head"), (str,)),
    **dict.fromkeys(("head_rank", "linear_mlp"), (int,)),
    **dict.fromkeys(("sees_token", "sees_state", "has_gate"), (bool,)),
}


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
        drafter: A trained drafter beside the model; None without one.
    """

    num_layers: int
    exits: tuple[ExitSpec, ...]
    drafter: DrafterSpec | None = None

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
        self._check_drafter()
        if sorted(set(layers)) != layers:
            raise RequestError(
                "--exit-layer values must be different and ascending",
                found=layers,
                expected=sorted(set(layers)),
                remedy="give each depth once",
            )

    def _check_drafter(self) -> None:
        """Refuse a drafter that reads depths which the model does not have."""
        beyond = [] if self.drafter is None else [depth for depth in self.drafter.features if depth > self.num_layers]
        if beyond:
            raise RequestError(
                "the drafter reads the residual stream at a depth that the model does not have",
                found=", ".join(map(str, beyond)),
                expected=f"1..{self.num_layers}, the number of layers run before",
                remedy="take the drafter that was trained for this model",
            )

    def features_of(self, segment: Segment) -> tuple[int, ...]:
        """Return the depths of the residual stream that a drafter reads and that the segment gives, ascending."""
        depths = () if self.drafter is None else self.drafter.features
        return tuple(depth for depth in depths if segment.start < depth <= segment.end)

    def taps_of(self, segment: Segment) -> tuple[str, ...]:
        """Return the outputs of a segment that a drafter reads."""
        features = tuple(names.feature(depth) for depth in self.features_of(segment))
        return (*features, names.DRAFT_STATE) if self.gives_state(segment) else features

    def gives_state(self, segment: Segment) -> bool:
        """Return whether the segment gives the normalised final state, for a drafter that reads it."""
        return segment.is_last and self.drafter is not None and not self.drafter.features

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The depths at which the model is cut."""
        return tuple(e.exit_layer for e in self.exits)

    @property
    def has_state(self) -> bool:
        """Whether an exit sees states, so that the last segment gives the true ones."""
        return any(e.sees_state for e in self.exits)

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
