"""An exit node in PyTorch, which can be trained and is the reference for :mod:`shortstack.graphs.ir.exit`.

It computes whole sequences at once. The formulas are those of :class:`shortstack.graphs.plan.ExitSpec`. The keys of a
node's ``state_dict`` are the part names of :mod:`shortstack.graphs.exit_parts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from shortstack.export.trained_exits import read_exits, write_exits
from shortstack.export.twin.layer import MLP, Layer, Norm, unit_rms
from shortstack.export.twin.model import Boundary, Twin
from shortstack.graphs import names
from shortstack.graphs.exit_parts import head_rows, linear_inputs
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ExitOutput:
    """What an exit predicts for each position.

    Attributes:
        logits: [batch, seq, rows]; row r of a trimmed head stands for token ``head.ids[r]``.
        state: The exit's estimate of the model's state, [batch, seq, hidden]; None if it sees no state.
        gate: Confidence in 0..1, [batch, seq]; None without a gate.
    """

    logits: Tensor
    state: Tensor | None
    gate: Tensor | None


class LinearBranch(nn.Module):
    """W u + b, plus a gated MLP of u if ``inner`` is not 0; a new one passes the first ``hidden`` inputs on."""

    def __init__(self, inputs: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(hidden, inputs))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.inner = inner
        if inner:
            self.gate_proj = nn.Linear(inputs, inner, bias=False)
            self.up_proj = nn.Linear(inputs, inner, bias=False)
            self.down_proj = nn.Linear(inner, hidden, bias=False)
            nn.init.zeros_(self.down_proj.weight)

    def forward(self, u: Tensor) -> Tensor:
        """[..., inputs] -> [..., hidden]."""
        x = functional.linear(u, self.weight, self.bias)
        if self.inner:
            x = x + self.down_proj(functional.silu(self.gate_proj(u)) * self.up_proj(u))
        return x


class ExitHead(nn.Module):
    """The exit's own head, or only the ids of the LM head's rows that it uses; see :class:`ExitNode`."""

    ids: Tensor | None

    def __init__(self, spec: ModelSpec, exit_spec: ExitSpec) -> None:
        super().__init__()
        rows, rank = head_rows(spec, exit_spec), exit_spec.head_rank
        self.kind = exit_spec.head
        if exit_spec.head == "own":
            self.weight = nn.Parameter(torch.randn(rows, spec.hidden_size) * spec.hidden_size**-0.5)
        if exit_spec.head == "low_rank":
            self.down = nn.Linear(spec.hidden_size, rank, bias=False)
            self.up = nn.Linear(rank, rows, bias=False)
        self.register_buffer("ids", torch.arange(rows) if exit_spec.draft_vocab is not None else None)

    def forward(self, y: Tensor, lm_head: Tensor) -> Tensor:
        """[..., hidden] -> [..., rows]."""
        if self.kind == "low_rank":
            return self.up(self.down(y))  # type: ignore[no-any-return]
        if self.kind == "own":
            return functional.linear(y, self.weight)
        return functional.linear(y, lm_head if self.ids is None else lm_head[self.ids])


class ExitNode(nn.Module):
    """One exit of any kind.

    A new node has a linear branch that passes the residual stream on, a norm of ones, and random matrices elsewhere. A
    trimmed head starts with the first token ids; load or set ``head.ids``.

    Args:
        spec: The model.
        exit_spec: The exit.
    """

    def __init__(self, spec: ModelSpec, exit_spec: ExitSpec) -> None:
        super().__init__()
        self.spec, self.exit_spec = spec, exit_spec
        self.eps = spec.norm_eps
        if exit_spec.branch == "linear":
            self.linear = LinearBranch(linear_inputs(spec, exit_spec), spec.hidden_size, exit_spec.linear_mlp)
        if exit_spec.branch == "mlp":
            self.mlp = MLP(spec.layers[exit_spec.exit_layer - 1].mlp, spec.hidden_size)
        if exit_spec.branch == "block":
            self.block = Layer(spec.exit_block_layer(exit_spec.exit_layer), spec.hidden_size)
        if exit_spec.norm == "own":
            self.norm = Norm(spec.hidden_size, spec.ends.final_norm)
        self.head = ExitHead(spec, exit_spec)
        if exit_spec.has_gate:
            self.gate = nn.Linear(spec.hidden_size, 1)

    @property
    def ids(self) -> Tensor | None:
        """Token id of each row of a trimmed head, int64 [rows]; None when rows are token ids."""
        return self.head.ids

    def forward(self, boundary: Boundary, embeddings: Tensor | None, state: Tensor | None, twin: Twin) -> ExitOutput:
        """Evaluate the exit at every position.

        Args:
            boundary: The state of the stack at the exit's depth, [batch, seq, hidden].
            embeddings: The tokens' embeddings [batch, seq, hidden]. Only an exit that sees the token reads them.
            state: States of the positions *before*, [batch, seq, hidden], see :func:`states_before`. Only an exit that
                sees states reads them.
            twin: The model whose norm and head the exit may share.
        """
        x = self.branch(boundary, embeddings, state, twin)
        return ExitOutput(
            logits=self.logits(x, twin),
            state=unit_rms(x, self.eps) if self.exit_spec.sees_state else None,
            gate=self.confidence(boundary.hidden) if self.exit_spec.has_gate else None,
        )

    def branch(self, boundary: Boundary, embeddings: Tensor | None, state: Tensor | None, twin: Twin) -> Tensor:
        """Return x, which stands in for the residual stream after all layers; arguments as in :meth:`forward`."""
        if self.exit_spec.branch == "linear":
            return self.linear(self.linear_input(boundary.hidden, embeddings, state))  # type: ignore[no-any-return]
        if self.exit_spec.branch == "mlp":
            below = twin.model.layers[self.exit_spec.exit_layer - 1]
            assert isinstance(below, Layer)
            out: Tensor = boundary.middle + self.mlp(below.post_attention_layernorm(boundary.middle))
            return out
        if self.exit_spec.branch == "block":
            return self.block(boundary.hidden, twin.rotaries(boundary.hidden))[0]  # type: ignore[no-any-return]
        return boundary.hidden

    def linear_input(self, hidden: Tensor, embeddings: Tensor | None, state: Tensor | None) -> Tensor:
        """Return u, the input of a linear branch, [..., inputs]; arguments as in :meth:`forward`."""
        parts = [unit_rms(hidden, self.eps)]
        if self.exit_spec.sees_token:
            if embeddings is None:
                raise ValueError("the exit sees the token, so embeddings are needed")
            parts.append(unit_rms(embeddings, self.eps))
        if self.exit_spec.sees_state:
            if state is None:
                raise ValueError("the exit sees states, so state is needed")
            parts.append(state)
        return torch.cat([part.to(parts[0].dtype) for part in parts], dim=-1)

    def logits(self, x: Tensor, twin: Twin) -> Tensor:
        """Apply norm and head to the branch's result, [..., hidden] -> [..., rows]."""
        if self.exit_spec.norm == "own":
            x = self.norm(x)
        if self.exit_spec.norm == "final":
            x = twin.model.norm(x)
        return twin.scaled_logits(self.head(x, twin.head_weight))

    def confidence(self, hidden: Tensor) -> Tensor:
        """Return the gate's confidence in 0..1, [..., hidden] -> [...]."""
        return torch.sigmoid(self.gate(unit_rms(hidden, self.eps)).squeeze(-1))


def states_before(states: Tensor) -> Tensor:
    """Shift states [batch, seq, hidden] by one position: zeros come first, the last state is dropped."""
    return functional.pad(states, (0, 0, 1, 0))[..., :-1, :]


def load_exits(folder: Path, spec: ModelSpec) -> tuple[ExitNode, ...]:
    """Load the exits of a folder, ascending; errors as in :func:`read_exits`."""
    exits, tensors = read_exits(folder, spec)
    nodes = []
    for exit_spec in exits:
        node = ExitNode(spec, exit_spec)
        depth = exit_spec.exit_layer
        node.load_state_dict(
            {part: torch.from_numpy(tensors[names.exit_weight(depth, part)]) for part in node.state_dict()}
        )
        nodes.append(node)
    return tuple(nodes)


def save_exits(folder: Path, spec: ModelSpec, nodes: Iterable[ExitNode], *, dtype: npt.DTypeLike = np.float16) -> None:
    """Write exits to a folder that :func:`load_exits` and ``export --exits`` read.

    Args:
        folder: The folder to write, created if it does not exist; its other files stay.
        spec: The model.
        nodes: The exits.
        dtype: Type of the stored weights.

    Raises:
        CheckpointError: A value is not finite in ``dtype``, or the folder cannot be written.
    """
    chosen = sorted(nodes, key=lambda node: node.exit_spec.exit_layer)
    tensors = {
        names.exit_weight(node.exit_spec.exit_layer, part): value.detach().cpu().numpy()
        for node in chosen
        for part, value in node.state_dict().items()
    }
    write_exits(folder, spec, tuple(node.exit_spec for node in chosen), tensors, dtype=dtype)
