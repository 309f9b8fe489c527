"""The model in PyTorch: embedding, layers, final norm, head; hidden states at any depth; layer dropout.

Parameters carry the names of a Hugging Face Llama checkpoint, which :mod:`shortstack.export.twin.folder` reads and
writes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shortstack.export.rope import rope_tables
from shortstack.export.twin.layer import KeyValue, Layer, RMSNorm
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Boundary:
    """What the stack holds after some layers.

    Attributes:
        hidden: The residual stream [batch, seq, hidden].
        middle: The residual stream between attention and MLP of the last of these layers: what an MLP exit reads.
    """

    hidden: Tensor
    middle: Tensor


class Decoder(nn.Module):
    """Embedding, layers and final norm: what a checkpoint calls ``model``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(
            Layer(spec, is_consumer=producer != layer) for layer, producer in enumerate(spec.kv_map)
        )
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Twin(nn.Module):
    """A decoder-only model with its hidden states at every depth.

    Args:
        spec: The model.
        rope_factors: Divisors of the rotary frequencies, if ``spec.rope_scaling.kind`` is ``factors``.

    Attributes:
        layer_dropout: Per layer, the probability that a sample skips it in training mode; see LayerSkip,
            https://arxiv.org/abs/2404.16710, section 4.1.1.

    Raises:
        UnsupportedError: A layer uses the K,V of a layer above it.
    """

    def __init__(self, spec: ModelSpec, rope_factors: npt.NDArray[np.float32] | None = None) -> None:
        super().__init__()
        above = [layer for layer, producer in enumerate(spec.kv_map) if producer > layer]
        if above:
            raise UnsupportedError(
                f"layers {above} use keys and values of layers above them",
                found=list(spec.kv_map),
                expected="kv_map[i] <= i",
            )
        self.spec = spec
        self.rope_factors = rope_factors
        self.model = Decoder(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.layer_dropout: Sequence[float] = (0.0,) * spec.num_hidden_layers
        self._lent = {producer for layer, producer in enumerate(spec.kv_map) if producer != layer}
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def head_weight(self) -> Tensor:
        """The LM head's weight [vocab, hidden]; the embedding if they are tied."""
        return self.model.embed_tokens.weight if self.spec.tie_word_embeddings else self.lm_head.weight

    def boundaries(self, input_ids: Tensor, depths: Collection[int]) -> dict[int, Boundary]:
        """Return what the stack holds at each depth; layers above the deepest one do not run.

        Args:
            input_ids: Token ids [batch, seq], padded behind.
            depths: Numbers of layers run, each 1..L.

        Raises:
            ValueError: A depth is outside the model.
        """
        if not all(1 <= depth <= self.spec.num_hidden_layers for depth in depths):
            raise ValueError(f"depths {sorted(depths)} of a model with {self.spec.num_hidden_layers} layers")
        rotary = self._rotary_of(input_ids)
        x: Tensor = self.model.embed_tokens(input_ids).float()  # the stream stays in float32 under autocast
        middle = x
        found: dict[int, Boundary] = {}
        lent: dict[int, KeyValue] = {}
        for index, layer in enumerate(self.model.layers[: max(depths)]):
            producer = self.spec.kv_map[index]
            if index in self._lent or producer != index:
                x, middle, key_value = layer(x, rotary, lent.get(producer))
                lent[index] = key_value
            else:
                x, middle = self._maybe_skipped(index, layer, x, rotary)
            if index + 1 in depths:
                found[index + 1] = Boundary(x, middle)
        return found

    def _maybe_skipped(self, index: int, layer: nn.Module, x: Tensor, rotary: KeyValue) -> tuple[Tensor, Tensor]:
        """Run a layer on the samples that do not skip it."""
        probability = self.layer_dropout[index] if self.training else 0.0
        if probability <= 0.0:
            above, middle, _ = layer(x, rotary)
            return above, middle
        kept = torch.nonzero(torch.rand(len(x), device=x.device) >= probability).flatten()
        if len(kept) == len(x):
            above, middle, _ = layer(x, rotary)
            return above, middle
        if not len(kept):
            return x, x
        above, middle, _ = layer(x[kept], rotary)
        return x.index_copy(0, kept, above.to(x.dtype)), x.index_copy(0, kept, middle.to(x.dtype))

    def state(self, hidden: Tensor) -> Tensor:
        """Return the final norm of a residual stream: what the head multiplies."""
        return self.model.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return final norm and head of a residual stream, [..., hidden] -> [..., vocab]."""
        return nn.functional.linear(self.state(hidden), self.head_weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of every position, [batch, seq] -> [batch, seq, vocab]."""
        depth = self.spec.num_hidden_layers
        return self.logits(self.boundaries(input_ids, (depth,))[depth].hidden)

    def _rotary_of(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        if self._rotary is None or length > len(self._rotary[0]) or self._rotary[0].device != input_ids.device:
            cos, sin = rope_tables(self.spec, max(length, 512), self.rope_factors)
            self._rotary = torch.from_numpy(cos).to(input_ids.device), torch.from_numpy(sin).to(input_ids.device)
        cos_table, sin_table = self._rotary
        return cos_table[:length], sin_table[:length]  # [seq, head_dim / 2]
