"""One decoder layer in PyTorch, with the module names of transformers, so that peft's adapters fit both.

It computes what :mod:`shortstack.graphs.ir.layer` computes: pre-norm attention with rotary embedding over grouped
heads, then a gated MLP. A sequence starts at position 0. Padding follows it, where causal attention does not look.
Which positions a layer sees depends on where its keys and values come from, see :class:`Attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from shortstack.graphs.spec import ModelSpec

KeyValue = tuple[Tensor, Tensor]
Rotary = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return unit_rms(x, self.eps) * self.weight.to(x.dtype)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, in float32."""
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with rotary embedding.

    Args:
        spec: The model.
        is_consumer: The layer uses another one's keys and values and has no k_proj and v_proj.
        window: How many positions each position sees, its own included; 0 means all.
        sees_itself: A position sees itself. If not, position 0 sees nothing, and its attention output before o_proj is
            zero (https://arxiv.org/abs/2405.10637).
    """

    def __init__(
        self, spec: ModelSpec, is_consumer: bool = False, *, window: int = 0, sees_itself: bool = True
    ) -> None:
        super().__init__()
        self.window, self.sees_itself = window, sees_itself
        self.heads, self.kv_heads, self.head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, q_rows, bias=spec.qkv_bias)
        if not is_consumer:
            self.k_proj = nn.Linear(spec.hidden_size, kv_rows, bias=spec.qkv_bias)
            self.v_proj = nn.Linear(spec.hidden_size, kv_rows, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(q_rows, spec.hidden_size, bias=spec.attention_out_bias)

    def key_value(self, x: Tensor, rotary: Rotary) -> KeyValue:
        """Return the rotated keys and the values, each [batch, kv_heads, seq, head_dim]."""
        return rotate(self._split(self.k_proj(x), self.kv_heads), rotary), self._split(self.v_proj(x), self.kv_heads)

    def forward(self, x: Tensor, rotary: Rotary, key_value: KeyValue) -> Tensor:
        """Attend to keys and values of the same positions, [batch, seq, hidden] -> the same."""
        query = rotate(self._split(self.q_proj(x), self.heads), rotary)
        groups = self.heads // self.kv_heads
        key, value = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in key_value)
        if self.sees_itself and not self.window:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            seen = seen_positions(x.shape[1], self.window, self.sees_itself, x.device)
            any_seen = seen.any(-1, keepdim=True)
            # Some kernels return NaN for a softmax over nothing. So such a row sees all, and its result becomes zero.
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen | ~any_seen)
            mixed = torch.where(any_seen, mixed, mixed.new_zeros(()))
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:-1], heads, self.head_dim).transpose(1, 2)  # [batch, heads, seq, head_dim]


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
        rotary: cos and sin, each [seq, head_dim / 2].
    """
    cos, sin = (part.to(x.dtype) for part in rotary)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One decoder layer; the arguments are those of :class:`Attention`."""

    def __init__(
        self, spec: ModelSpec, is_consumer: bool = False, *, window: int = 0, sees_itself: bool = True
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, is_consumer, window=window, sees_itself=sees_itself)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, rotary: Rotary, borrowed: KeyValue | None = None) -> tuple[Tensor, Tensor, KeyValue]:
        """Run the layer.

        Args:
            x: The residual stream below, [batch, seq, hidden].
            rotary: cos and sin, each [seq, head_dim / 2].
            borrowed: The producer's keys and values, if the layer is a consumer.

        Returns:
            The residual stream above, the residual stream between attention and MLP, and the keys and values used.
        """
        normed = self.input_layernorm(x)
        key_value = self.self_attn.key_value(normed, rotary) if borrowed is None else borrowed
        middle = x + self.self_attn(normed, rotary, key_value)
        return middle + self.mlp(self.post_attention_layernorm(middle)), middle, key_value
