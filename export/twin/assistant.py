"""An assistant in PyTorch: layers that read the model's keys and values; see :mod:`shortstack.graphs.drafter_spec`.

A row at position P sees the model's positions before P, in a window those whose distance to P is below it. It shares
with other twins what surrounds attention in a layer, and the queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.drafter_parts import (
    Drafted,
    DraftedText,
    LayersTwin,
    as_tensor,
    rotary_tables,
    with_given,
)
from shortstack.export.twin.layer import Attention, KeyValue, Rotary, soft_capped
from shortstack.graphs import names
from shortstack.graphs.drafter_weights import (
    CENTROIDS,
    FINAL_NORM,
    HEAD,
    INPUT,
    INPUT_BIAS,
    OUTPUT,
    STATE_NORM,
    TOKEN_NORM,
)


class AssistantTwin(LayersTwin):
    """The :class:`~shortstack.export.twin.drafter_parts.TwinOfDrafter` of an assistant."""

    def fused(self, taps: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`TwinOfDrafter.fused`."""
        return taps[names.DRAFT_STATE]

    def all_rows(self, text: DraftedText) -> list[Drafted]:
        """See :meth:`TwinOfDrafter.all_rows`: row p knows the token at p + 1, and stands there."""
        count = len(text.tokens)
        return [self.rows(text.states[: count - 1], text.tokens[1:], torch.arange(1, count), text.keys_values)]

    def round(self, text: DraftedText, length: int) -> _AssistantRound:
        """See :meth:`TwinOfDrafter.round`."""
        return _AssistantRound(self, text, length)

    @torch.no_grad()
    def rows(
        self, states: Tensor, ids: Sequence[int], positions: Tensor, keys_values: Mapping[int, KeyValue]
    ) -> Drafted:
        """Run rows, none of which sees another.

        Args:
            states: u of each row, [seq, state].
            ids: The token of each row.
            positions: Where each row stands, 1 or more, int64 [seq].
            keys_values: By layer of the model, of all positions before the last of these, or more.
        """
        spec = self.spec
        token = self._embedding[torch.tensor(ids)] * spec.embed_scale
        if spec.has_token_norm:
            token = self._norm(token, TOKEN_NORM)
        if spec.has_state_norm:
            states = self._norm(states, STATE_NORM)
        pair = torch.cat([states, token] if spec.state_first else [token, states], dim=-1)
        x = functional.linear(pair, self._parts[INPUT], self._parts.get(INPUT_BIAS))[None]  # [1, seq, hidden]
        rotaries = rotary_tables(spec, self._model, self._factors, positions)
        for layer, owner in zip(self._layers, spec.shared, strict=True):
            reads = layer.input_layernorm(x)
            x = layer.above(x, reads, _attended(layer.self_attn, reads, rotaries, positions, keys_values[owner]))[1]
        stream = x[0]
        y = self._norm(stream, FINAL_NORM) if spec.has_final_norm else stream
        given = y if spec.feedback == "normed" else stream
        if spec.feedback == "projected":
            given = functional.linear(y, self._parts[OUTPUT])
        if not spec.has_own_head:  # the model's reads what is as wide as the model
            ends = self._model.spec.ends
            logits = functional.linear(given, as_tensor(self._model.head)) * ends.logit_scale
            return Drafted(given, soft_capped(logits, ends.logit_softcap))
        logits = functional.linear(y, self._parts[HEAD])
        if not spec.centroids:
            return Drafted(given, logits)
        scores = functional.linear(y, self._parts[CENTROIDS])  # [seq, centroids]
        missed = scores.topk(spec.top_centroids).values[:, -1:] - scores
        missed = torch.where(missed > 0, missed / scores.std() * logits.std(), 0.0)
        return Drafted(given, logits, scores, missed.repeat_interleave(logits.shape[1] // spec.centroids, dim=1))


class _AssistantRound:
    def __init__(self, twin: AssistantTwin, text: DraftedText, length: int) -> None:
        self._twin, self._keys_values = twin, text.keys_values
        self._state, self._newest = text.states[length - 2 : length - 1], text.tokens[length - 1]
        self._position = torch.tensor([length - 1])

    def draft(self, before: Sequence[int], given: Tensor | None = None) -> Drafted:
        """See :meth:`TwinRound.draft`: all rows stand at the position of the text's newest token."""
        token, state = before[-1] if before else self._newest, with_given(self._state, given)
        found = self._twin.rows(state, [token], self._position, self._keys_values)
        self._state = found.states
        return found


def _attended(
    attention: Attention, reads: Tensor, rotaries: Sequence[Rotary], positions: Tensor, key_value: KeyValue
) -> Tensor:
    """Return what attention to the model's keys and values gives, [1, seq, hidden] -> the same."""
    spec = attention.spec
    query = attention.query(reads, rotaries)  # [1, heads, seq, head_dim]
    key, value = (part.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for part in key_value)
    distance = positions[:, None] - torch.arange(key.shape[2])  # [seq, positions of the model]
    seen = (distance > 0) & (distance < spec.window) if spec.window else distance > 0
    scores = soft_capped(query @ key.transpose(-1, -2) * spec.score_scale, spec.softcap)
    mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
