"""One decoder layer in PyTorch, with the module names of transformers' Llama, so that peft's adapters fit both.

It computes what :mod:`shortstack.graphs.ir.layer` computes; what that is, :mod:`shortstack.graphs.layer_spec` says. A
sequence starts at position 0. Padding follows it, where causal attention does not look. Which positions a layer sees
depends on where its keys and values come from, see :class:`Attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from shortstack.graphs import layer_spec

KeyValue = tuple[Tensor, Tensor]


class Rotary(NamedTuple):
    """cos and sin of some positions, each [seq, head_dim / 2], and these positions, int64 [seq]."""

    cos: Tensor
    sin: Tensor
    positions: Tensor


ACTIVATIONS: dict[layer_spec.Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
}


class Norm(nn.Module):
    """A norm over the last dimension, computed in float32; see :class:`layer_spec.Norm`."""

    def __init__(self, size: int, kind: layer_spec.Norm) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind.has_bias else None
        self.kind, self.eps = kind.kind, kind.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        out = self.unit(x) * self.weight.to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def unit(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, without weight and bias."""
        if self.kind == "layer":
            x32 = x.float()
            x = (x32 - x32.mean(-1, keepdim=True)).to(x.dtype)
        return unit_rms(x, self.eps)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, in float32."""
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Attention(nn.Module):
    """Causal attention.

    Args:
        spec: What it is.
        hidden: Width of the residual stream.
        is_consumer: The layer uses another one's keys and values and has no k_proj and v_proj.
        sees_itself: A position sees itself. If not, position 0 sees nothing, and its attention output before o_proj is
            zero (https://arxiv.org/abs/2405.10637).
    """

    def __init__(
        self, spec: layer_spec.Attention, hidden: int, is_consumer: bool = False, *, sees_itself: bool = True
    ) -> None:
        super().__init__()
        self.spec, self.sees_itself = spec, sees_itself
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, q_rows, bias=spec.qkv_bias)
        if not is_consumer:
            self.k_proj = nn.Linear(hidden, kv_rows, bias=spec.qkv_bias)
            if not spec.k_equals_v:
                self.v_proj = nn.Linear(hidden, kv_rows, bias=spec.qkv_bias)
        if spec.qk_norm is not None:
            is_wide = spec.qk_norm_over != "head"
            self.q_norm = Norm(q_rows if is_wide else self.head_dim, spec.qk_norm)
            if not is_consumer:
                self.k_norm = Norm(kv_rows if is_wide else self.head_dim, spec.qk_norm)
        self.o_proj = nn.Linear(q_rows, hidden, bias=spec.out_bias)

    def query(self, x: Tensor, rotaries: Sequence[Rotary]) -> Tensor:
        """Return the rotated queries, [batch, heads, seq, head_dim]."""
        query = self._rotated(self.q_proj(x), self.q_norm if self.spec.qk_norm is not None else None, rotaries)
        if self.spec.query_scale is None or self.spec.rope is None:
            return query
        return query * query_factors(self.spec.query_scale, rotaries[self.spec.rope].positions).to(query.dtype)

    def key_value(self, x: Tensor, rotaries: Sequence[Rotary]) -> KeyValue:
        """Return the rotated keys and the values, each [batch, kv_heads, seq, head_dim]."""
        norm = self.k_norm if self.spec.qk_norm is not None else None
        key = self.k_proj(x)
        value = self._split(key if self.spec.k_equals_v else self.v_proj(x))
        if self.spec.v_norm is not None:
            value = unit_rms(value, self.spec.v_norm.eps)
        return self._rotated(key, norm, rotaries), value

    def forward(self, x: Tensor, rotaries: Sequence[Rotary], key_value: KeyValue) -> Tensor:
        """Attend to keys and values of the same positions, [batch, seq, hidden] -> the same."""
        query = self.query(x, rotaries)
        groups = self.heads // self.kv_heads
        key, value = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in key_value)
        scale, window = self.spec.score_scale, self.spec.window
        if self.sees_itself and not window and not self.spec.softcap:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        else:
            seen = seen_positions(x.shape[1], window, self.sees_itself, x.device)
            any_seen = seen.any(-1, keepdim=True)
            # Some kernels return NaN for a softmax over nothing. So such a row sees all, and its result becomes zero.
            mask = seen | ~any_seen
            if self.spec.softcap:
                scores = soft_capped(query @ key.transpose(-1, -2) * scale, self.spec.softcap)
                mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
            else:
                mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
            mixed = torch.where(any_seen, mixed, mixed.new_zeros(()))
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _rotated(self, x: Tensor, norm: Norm | None, rotaries: Sequence[Rotary]) -> Tensor:
        is_wide = self.spec.qk_norm_over == "width"
        if norm is not None and is_wide:
            x = norm(x)
        x = self._split(x)
        is_last = self.spec.qk_norm_after_rope
        if norm is not None and self.spec.qk_norm_over == "each_head":
            x = norm.unit(x) * norm.weight.to(x.dtype).view(-1, 1, self.head_dim)
        elif norm is not None and not (is_wide or is_last):
            x = norm(x)
        if self.spec.rope is not None:
            x = rotate(x, rotaries[self.spec.rope])
        return norm(x) if norm is not None and is_last else x

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)  # [batch, heads, seq, head_dim]


def query_factors(scale: layer_spec.QueryScale, positions: Tensor) -> Tensor:
    """Return what the queries of some positions [seq] are multiplied by, float32 [seq, 1]."""
    periods = torch.floor(positions.float() / scale.original)
    return (1 + scale.beta * torch.log(1 + periods))[:, None]


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(x / cap); ``x`` itself for a cap of 0."""
    return torch.tanh(x / cap) * cap if cap else x


def seen_positions(seq: int, window: int, sees_itself: bool, device: torch.device) -> Tensor:
    """Return which positions (columns) each position (row) sees, bool [seq, seq]."""
    positions = torch.arange(seq, device=device)
    distance = positions[:, None] - positions
    seen = distance >= (0 if sees_itself else 1)
    return seen & (distance < window) if window else seen


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate column i with column i + head_dim / 2 (https://arxiv.org/abs/2104.09864, as transformers pairs them).

    Args:
        x: [batch, heads, seq, head_dim].
        rotary: The positions of the rows.
    """
    cos, sin = rotary.cos.to(x.dtype), rotary.sin.to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, spec: layer_spec.Mlp, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.is_gated:
            self.gate_proj = nn.Linear(hidden, spec.width, bias=spec.has_bias)
        self.up_proj = nn.Linear(hidden, spec.width, bias=spec.has_bias)
        self.down_proj = nn.Linear(spec.width, hidden, bias=spec.has_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        active = ACTIVATIONS[self.spec.activation]
        inner = active(self.gate_proj(x)) * self.up_proj(x) if self.spec.is_gated else active(self.up_proj(x))
        return self.down_proj(inner)  # type: ignore[no-any-return]


class Tokens(NamedTuple):
    """What a branch on tokens reads: ids [batch, seq] and scaled embeddings [batch, seq, hidden]."""

    ids: Tensor
    embeddings: Tensor


class Scalar(nn.Module):
    """A learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by it."""
        return x * self.weight


class PerLayerInput(nn.Module):
    """The branch on tokens that :class:`layer_spec.PerLayerInput` describes."""

    def __init__(self, spec: layer_spec.PerLayerInput, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab, spec.width)
        self.context = nn.Linear(hidden, spec.width, bias=False)
        self.norm = Norm(spec.width, spec.norm)
        self.gate = nn.Linear(hidden, spec.width, bias=False)
        self.out = nn.Linear(spec.width, hidden, bias=False)
        self.out_norm = Norm(hidden, spec.norm)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return the stream above, [batch, seq, hidden] -> the same."""
        context = self.norm(self.context(tokens.embeddings) * x.shape[-1] ** -0.5)
        found = (context + self.embed(tokens.ids) * self.spec.width**0.5) * 2**-0.5
        gated = ACTIVATIONS[self.spec.activation](self.gate(x)) * found
        return x + self.out_norm(self.out(gated))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One decoder layer; the arguments are those of :class:`Attention`."""

    def __init__(
        self, spec: layer_spec.Layer, hidden: int, is_consumer: bool = False, *, sees_itself: bool = True
    ) -> None:
        super().__init__()
        self.spec = spec
        self.input_layernorm = _norm(spec.before_attention, hidden)
        self.self_attn = Attention(spec.attention, hidden, is_consumer, sees_itself=sees_itself)
        self.attention_out_layernorm = _norm(spec.after_attention, hidden)
        self.post_attention_layernorm = _norm(spec.before_mlp, hidden)
        self.mlp = MLP(spec.mlp, hidden)
        self.mlp_out_layernorm = _norm(spec.after_mlp, hidden)
        if spec.per_layer_input is not None:
            self.per_layer = PerLayerInput(spec.per_layer_input, hidden)
        if spec.has_scalar:
            self.layer_scalar = Scalar()

    def forward(
        self,
        x: Tensor,
        rotaries: Sequence[Rotary],
        borrowed: KeyValue | None = None,
        tokens: Tokens | None = None,
    ) -> tuple[Tensor, Tensor, KeyValue]:
        """Run the layer.

        Args:
            x: The residual stream below, [batch, seq, hidden].
            rotaries: The tables of each rotary embedding of the model.
            borrowed: The producer's keys and values, if the layer is a consumer.
            tokens: What a branch on tokens reads, if the layer has one.

        Returns:
            The residual stream above, the residual stream between attention and MLP, and the keys and values used.
        """
        normed = self.input_layernorm(x)
        key_value = self.self_attn.key_value(normed, rotaries) if borrowed is None else borrowed
        middle, above = self.above(x, normed, self.self_attn(normed, rotaries, key_value), tokens)
        return above, middle, key_value

    def above(self, x: Tensor, normed: Tensor, attended: Tensor, tokens: Tokens | None = None) -> tuple[Tensor, Tensor]:
        """Return the residual stream between attention and MLP, and the one above the layer, [..., hidden].

        Args:
            x: The stream below.
            normed: What attention has read.
            attended: What attention returns.
            tokens: As in :meth:`forward`.
        """
        scale = self.spec.residual_scale
        middle = x + _scaled(self.attention_out_layernorm(attended), scale)
        if self.spec.is_parallel:  # with one norm for both, the MLP reads what attention has read
            read = normed if self.spec.before_mlp is None else self.post_attention_layernorm(x)
        else:
            read = self.post_attention_layernorm(middle)
        above = middle + _scaled(self.mlp_out_layernorm(self.mlp(read)), scale)
        if self.spec.per_layer_input is not None:
            assert tokens is not None, "a layer with a branch on tokens"
            above = self.per_layer(above, tokens)
        return middle, self.layer_scalar(above) if self.spec.has_scalar else above


def _norm(kind: layer_spec.Norm | None, hidden: int) -> nn.Module:
    return nn.Identity() if kind is None else Norm(hidden, kind)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale
