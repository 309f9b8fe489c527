"""A trained drafter in PyTorch, in float32: the formula of :mod:`shortstack.graphs.drafter_spec`, without a cache.

All rows of a text run anew each time, each pair at its own position. It shares the layer with the twin of models
(:mod:`shortstack.export.twin.layer`), and no code with the graphs. What compares drafters
(:mod:`shortstack.export.parity.drafter`) needs a :class:`~shortstack.export.twin.drafter_parts.TwinOfDrafter`.
:class:`DrafterTwin` is that of layers that draft together; the others are :mod:`shortstack.export.twin.drafter_stages`
and :mod:`shortstack.export.twin.assistant`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.drafter_parts import (
    Drafted,
    DraftedText,
    DrafterWeights,
    LayersTwin,
    ModelParts,
    TwinRound,
    as_tensor,
    rotary_tables,
    with_given,
)
from shortstack.export.twin.layer import soft_capped
from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import (
    FINAL_NORM,
    FUSE,
    HEAD,
    INPUT,
    INPUT_BIAS,
    STATE_NORM,
    TOKEN_NORM,
    feature_norms,
)


class DrafterTwin(LayersTwin):
    """A drafter whose layers draft together, with keys and values of their own; arguments as in :class:`LayersTwin`."""

    def __init__(self, spec: DrafterSpec, weights: DrafterWeights, model: ModelParts) -> None:
        super().__init__(spec, weights, model)
        self._head = self._parts[HEAD] if spec.has_own_head else as_tensor(model.head)

    def all_rows(self, text: DraftedText) -> list[Drafted]:
        """See :meth:`TwinOfDrafter.all_rows`."""
        return [self.rows(text.states[: len(text.tokens) - 1], text.tokens[1:])]

    def round(self, text: DraftedText, length: int) -> TwinRound:
        """See :meth:`TwinOfDrafter.round`."""
        return _Round(self, text.states[: length - 1], text.tokens[1:length])

    @torch.no_grad()
    def fused(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Return the states [seq, hidden] of true rows.

        Args:
            taps: What the model leaves, by port, [seq, model's hidden] each.
        """
        if not self.spec.features:
            return taps[names.DRAFT_STATE]
        found = [taps[names.feature(depth)] for depth in self.spec.features]
        norms = feature_norms(self.spec)
        if self.spec.feature_norm == "each":
            found = [self._norm(x, part) for x, part in zip(found, norms, strict=True)]
        joined = torch.cat(found, dim=-1)
        if self.spec.feature_norm == "all":
            joined = self._norm(joined, norms[0])
        return functional.linear(joined, self._parts[FUSE])

    @torch.no_grad()
    def rows(self, states: Tensor, ids: Sequence[int], heads: int | None = None) -> Drafted:
        """Run all rows of a text.

        Args:
            states: u of each row, [seq, hidden]: fused ones of true rows, then what the rows before gave.
            ids: The token of each pair.
            heads: How many of the last rows get logits; None for all.

        Returns:
            The states of all rows, and the logits of the last ``heads``.
        """
        spec = self.spec
        token = self._embedding[torch.tensor(ids)] * spec.embed_scale
        if spec.has_token_norm:
            token = self._norm(token, TOKEN_NORM)
        normed = self._norm(states, STATE_NORM) if spec.has_state_norm else states
        pair = torch.cat([normed, token] if spec.state_first else [token, normed], dim=-1)
        rotaries = rotary_tables(spec, self._model, self._factors, torch.arange(len(ids)))
        if spec.is_stacked:
            first, x = self._layers[0], normed if spec.normed_stream else states
            reads = pair[None]
            attended = first.self_attn(reads, rotaries, first.self_attn.key_value(reads, rotaries))
            stream, rest = first.above(x[None], reads, attended)[1], self._layers[1:]
        else:
            stream, rest = functional.linear(pair, self._parts[INPUT], self._parts.get(INPUT_BIAS))[None], self._layers
        for layer in rest:
            stream = layer(stream, rotaries)[0]
        read = self._norm(stream[0], FINAL_NORM) if spec.has_final_norm else stream[0]
        logits = functional.linear(read if heads is None else read[len(read) - heads :], self._head)
        if not spec.has_own_head:
            ends = self._model.spec.ends
            logits = soft_capped(logits * ends.logit_scale, ends.logit_softcap)
        return Drafted(read if spec.feedback == "normed" else stream[0], logits)


class _Round:
    def __init__(self, twin: DrafterTwin, states: Tensor, ids: Sequence[int]) -> None:
        self._twin, self._states, self._ids = twin, states, ids

    def draft(self, before: Sequence[int], given: Tensor | None = None) -> Drafted:
        """See :meth:`TwinRound.draft`."""
        self._states = with_given(self._states, given)
        found = self._twin.rows(self._states, [*self._ids, *before], heads=1)
        self._states = torch.cat([self._states, found.states[-1:]])
        return found
