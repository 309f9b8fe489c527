"""The model in PyTorch: embedding, layers, final norm, head; hidden states at any depth; layer dropout.

Parameters have the names of a Hugging Face Llama checkpoint, which :mod:`shortstack.export.twin.folder` reads and
writes.

Layers that use keys and values of layers above them run in *passes*. An iterated group, as
:mod:`shortstack.graphs.kv_map` defines it, starts with keys and values of zero. It runs over the whole sequence again
and again, each pass with the keys and values of the pass before. A layer that looks up sees only earlier positions. So
after n passes the first n positions equal those of decoding one token after another
(https://arxiv.org/abs/2410.14442), which is what :mod:`shortstack.export.twin.sequential` does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shortstack.export.rope import is_long, rope_tables
from shortstack.export.twin.layer import KeyValue, Layer, Norm, Rotary, Tokens, soft_capped
from shortstack.graphs.kv_map import IteratedGroup, check_boundaries, iterated_groups, producers
from shortstack.graphs.spec import ModelSpec

Rotaries = Sequence[Rotary]
Given = tuple[Rotaries, Tokens | None]
"""What all layers read besides the stream: rotary tables, and the tokens where layers have a branch on them."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """The state of the stack after a number of layers.

    Attributes:
        hidden: The residual stream [batch, seq, hidden].
        middle: The residual stream between attention and MLP of the last of these layers, which an MLP exit reads.
    """

    hidden: Tensor
    middle: Tensor


@dataclass(frozen=True, slots=True)
class Passes:
    """How often an iterated group runs in training mode; the defaults are those of LCKV.

    Attributes:
        without_gradient: Passes that only bring the keys and values close to convergence; m in the paper.
        with_gradient: Passes after them, through which gradients flow; b in the paper. With a single one, no gradient
            reaches the projections of a producer from the layers that look up to it, because these read the keys and
            values of the pass before.
    """

    without_gradient: int = 7
    with_gradient: int = 2

    def __post_init__(self) -> None:
        if self.without_gradient < 0 or self.with_gradient < 1:
            raise ValueError(f"{self}: expected at least 0 passes without gradient and 1 with it")


class Decoder(nn.Module):
    """Embedding, layers and final norm: what a checkpoint calls ``model``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.ends.learned_positions:
            self.embed_positions = nn.Embedding(spec.ends.learned_positions, spec.hidden_size)
        self.layers = nn.ModuleList(
            Layer(layer, spec.hidden_size, not spec.owns_kv(number), sees_itself=spec.sees_itself(number))
            for number, layer in enumerate(spec.layers)
        )
        branches: list[Any] = [layer.per_layer for layer in self.layers if hasattr(layer, "per_layer")]
        for branch in branches[1:]:  # checkpoints have one norm for all
            branch.norm = branches[0].norm
        self.norm = Norm(spec.hidden_size, spec.ends.final_norm)


class Twin(nn.Module):
    """A decoder-only model that gives access to its hidden states at every depth.

    Args:
        spec: The model.
        rope_factors: Divisors of the rotary frequencies, if a rotary embedding's scaling is of the kind ``factors``.

    Attributes:
        layer_dropout: Per layer, the probability that a sample skips it in training mode (LayerSkip,
            https://arxiv.org/abs/2404.16710, section 4.1.1). Layers that share keys and values, and those in an
            iterated group, are never skipped.
        passes: How often iterated groups run in training mode. In evaluation mode they run until the result is exact.
    """

    def __init__(self, spec: ModelSpec, rope_factors: npt.NDArray[np.float32] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.rope_factors = rope_factors
        self.model = Decoder(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.layer_dropout: Sequence[float] = (0.0,) * spec.num_hidden_layers
        self.passes = Passes()
        self._lent = {producer for layer, producer in enumerate(spec.kv_map) if producer != layer}
        self._groups = {group.start: group for group in iterated_groups(spec.kv_map)}
        self._rotaries: dict[tuple[bool, ...], tuple[Rotary, ...]] = {}  # by which of them take long factors

    @property
    def head_weight(self) -> Tensor:
        """The LM head's weight [vocab, hidden]; the embedding if they are tied."""
        return self.model.embed_tokens.weight if self.spec.tie_word_embeddings else self.lm_head.weight

    def boundaries(
        self, input_ids: Tensor, depths: Collection[int], *, passes: int | None = None
    ) -> dict[int, Boundary]:
        """Return the state of the stack at each depth; layers above the deepest one do not run.

        Args:
            input_ids: Token ids [batch, seq], with padding at the end.
            depths: Numbers of layers run, each 1..L.
            passes: How often iterated groups run. None follows :attr:`passes` in training mode, and runs until the
                result is exact in evaluation mode.

        Raises:
            ValueError: A depth is outside the model.
            RequestError: A depth is inside an iterated group.
        """
        if not all(1 <= depth <= self.spec.num_hidden_layers for depth in depths):
            raise ValueError(f"depths {sorted(depths)} of a model with {self.spec.num_hidden_layers} layers")
        check_boundaries(self.spec.kv_map, sorted(depths))
        given = self.rotaries(input_ids), self._tokens(input_ids)
        x = self.first_stream(input_ids).float()  # the stream stays in float32 under autocast
        found: dict[int, Boundary] = {}
        lent: dict[int, KeyValue] = {}
        done = 0
        while done < max(depths):
            if group := self._groups.get(done):
                x, middle = self._iterated(group, x, given, lent, passes)
                done = group.end
            else:
                x, middle = self._layer(done, x, given, lent)
                done += 1
            if done in depths:
                found[done] = Boundary(x, middle)
        return found

    def _layer(self, index: int, x: Tensor, given: Given, lent: dict[int, KeyValue]) -> tuple[Tensor, Tensor]:
        """Run a layer outside the iterated groups."""
        if index in self._lent or self.spec.kv_map[index] != index:
            return self._once(index, index + 1, x, given, lent)
        return self._maybe_skipped(index, self.model.layers[index], x, given)

    def _once(self, start: int, end: int, x: Tensor, given: Given, lent: dict[int, KeyValue]) -> tuple[Tensor, Tensor]:
        """Run layers ``[start, end)`` once; their producers' keys and values replace those in ``lent``."""
        middle = x
        for index in range(start, end):
            producer = self.spec.kv_map[index]
            borrowed = lent[producer] if producer != index else None
            x, middle, key_value = self.model.layers[index](x, given[0], borrowed, given[1])
            if producer == index:
                lent[index] = key_value
        return x, middle

    def _iterated(
        self, group: IteratedGroup, x: Tensor, given: Given, lent: dict[int, KeyValue], passes: int | None
    ) -> tuple[Tensor, Tensor]:
        """Run an iterated group: in training a number of passes, otherwise until nothing changes."""
        inside = producers(self.spec.kv_map, group.start, group.end)
        batch, seq = x.shape[:2]
        for producer in inside:
            attention = self.spec.layers[producer].attention
            nothing = x.new_zeros(batch, attention.kv_heads, seq, attention.head_dim)
            lent[producer] = nothing, nothing
        if self.training and passes is None:  # more passes than positions would change nothing
            passes = min(self.passes.with_gradient, seq)
            with torch.no_grad():
                for _ in range(min(self.passes.without_gradient, seq - passes)):
                    self._once(group.start, group.end, x, given, lent)
        is_exact = passes is None
        result = x, x
        for number in range(seq if passes is None else passes):
            before = [lent[producer] for producer in inside]
            result = self._once(group.start, group.end, x, given, lent)
            # Not after the first pass: it starts from placeholders, whose type may differ under autocast.
            if is_exact and number and _same(before, [lent[producer] for producer in inside]):
                break
        return result

    def _maybe_skipped(self, index: int, layer: nn.Module, x: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Run a layer on the samples that do not skip it."""
        probability = self.layer_dropout[index] if self.training else 0.0
        if probability <= 0.0:
            above, middle, _ = layer(x, given[0], None, given[1])
            return above, middle
        kept = torch.nonzero(torch.rand(len(x), device=x.device) >= probability).flatten()
        if len(kept) == len(x):
            above, middle, _ = layer(x, given[0], None, given[1])
            return above, middle
        if not len(kept):
            return x, x
        tokens = None if given[1] is None else Tokens(*(part[kept] for part in given[1]))
        above, middle, _ = layer(x[kept], given[0], None, tokens)
        return x.index_copy(0, kept, above.to(x.dtype)), x.index_copy(0, kept, middle.to(x.dtype))

    def state(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to a residual stream; the head multiplies the result."""
        return self.model.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply final norm and head to a residual stream, [..., hidden] -> [..., vocab]."""
        return self.scaled_logits(nn.functional.linear(self.state(hidden), self.head_weight))

    def scaled_logits(self, products: Tensor) -> Tensor:
        """Scale and cap the products of normalised states with a head, as the model does it."""
        scale, cap = self.spec.ends.logit_scale, self.spec.ends.logit_softcap
        return soft_capped(products if scale == 1.0 else products * scale, cap)

    def embedded(self, ids: Tensor) -> Tensor:
        """Return the scaled embeddings of tokens: [...] -> [..., hidden]."""
        scale = self.spec.ends.embed_scale
        found: Tensor = self.model.embed_tokens(ids)
        return found if scale == 1.0 else found * scale

    def _tokens(self, ids: Tensor) -> Tokens | None:
        reads_tokens = self.spec.reads_tokens(range(self.spec.num_hidden_layers))
        return Tokens(ids, self.embedded(ids)) if reads_tokens else None

    def first_stream(self, ids: Tensor, past: int = 0) -> Tensor:
        """Return what the first layer reads: [batch, seq] -> [batch, seq, hidden]; ``past`` positions are before."""
        found = self.embedded(ids)
        if not self.spec.ends.learned_positions:
            return found
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        return found + self.model.embed_positions(positions)  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of every position, [batch, seq] -> [batch, seq, vocab]."""
        depth = self.spec.num_hidden_layers
        return self.logits(self.boundaries(input_ids, (depth,))[depth].hidden)

    def rotaries(self, rows: Tensor) -> tuple[Rotary, ...]:
        """Return the tables of each rotary embedding for ``rows`` [batch, seq, ...]; they are kept between calls."""
        length = rows.shape[1]
        if not self.spec.ropes:
            return ()
        is_longer = tuple(is_long(rope, length) for rope in self.spec.ropes)
        kept = self._rotaries.get(is_longer)
        if kept is None or length > len(kept[0].cos) or kept[0].cos.device != rows.device:
            tables = (rope_tables(rope, max(length, 512), self.rope_factors, length) for rope in self.spec.ropes)
            kept = self._rotaries[is_longer] = tuple(
                Rotary(*(part.to(rows.device) for part in (*map(torch.from_numpy, pair), torch.arange(len(pair[0])))))
                for pair in tables
            )
        return tuple(Rotary(*(part[:length] for part in rotary)) for rotary in kept)


def _same(before: Sequence[KeyValue], after: Sequence[KeyValue]) -> bool:
    return all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
