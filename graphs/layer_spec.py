"""What one decoder layer is, as data: its norms, its attention, its MLP, and how they are wired.

Two modules alone ask which of these features a layer has: the ONNX builder :mod:`shortstack.graphs.ir.layer` (with
:mod:`~shortstack.graphs.ir.attention`) and the PyTorch twin :mod:`shortstack.export.twin.layer`. Everything else walks
the table of weights in :mod:`shortstack.graphs.layer_weights`. With x the residual stream::

    sequential   x = x + after_attention(attention(before_attention(x)))
                 x = x + after_mlp(mlp(before_mlp(x)))
    parallel     x = x + attention(before_attention(x)) + mlp(before_mlp(x)), or with one norm for both where
                 ``before_mlp`` is None

A norm that is None is left out. Llama has ``before_*``, OLMo 2 has ``after_*``, Gemma has all four. Standard library
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HEAD_DIM_MULTIPLE = 16  # GroupQueryAttention with rotary embedding (onnxruntime 1.32)
NormKind = Literal["rms", "layer"]
RopeKind = Literal["default", "linear", "llama3", "factors", "yarn", "longrope", "proportional"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
QKNormOver = Literal["head", "each_head", "width"]


def _above_0(**found: float) -> None:
    for name, value in found.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}, not a number above 0")


def _at_least(least: int, **found: float) -> None:
    for name, value in found.items():
        if value < least:
            raise ValueError(f"{name} is {value}, not {least} or more")


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over the last dimension, computed in float32 and multiplied by a weight.

    Attributes:
        kind: ``rms``: x / rms(x) (https://arxiv.org/abs/1910.07467). ``layer``: the mean is subtracted first
            (https://arxiv.org/abs/1607.06450).
        eps: What is added to the mean square before the root.
        has_bias: A vector is added at the end.
    """

    kind: NormKind = "rms"
    eps: float = 1e-6
    has_bias: bool = False

    def __post_init__(self) -> None:
        _above_0(eps=self.eps)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
        kind: ``default`` (none), ``linear`` (positions divided by ``factor``), ``llama3`` (the smooth by-wavelength
            rule of Llama 3.1/3.2), ``factors`` (one divisor per frequency, read from the checkpoint: GGUF's
            ``rope_freqs.weight``), ``yarn`` (https://arxiv.org/abs/2309.00071), ``longrope`` (one divisor per
            frequency for short texts and another for long ones, https://arxiv.org/abs/2402.13753), ``proportional``
            (the frequencies of the whole head, of which only the first are rotated).
        factor: Divisor of the low frequencies.
        low_freq_factor: ``llama3``: wavelengths above ``original_max_position_embeddings / low_freq_factor`` are
            divided.
        high_freq_factor: ``llama3``: wavelengths below ``original_max_position_embeddings / high_freq_factor`` are
            kept.
        original_max_position_embeddings: ``llama3``, ``yarn``, ``longrope``: the context length before stretching, in
            tokens.
        attention_factor: ``yarn``, ``longrope``: what cos and sin are multiplied by.
        beta_fast: ``yarn``: frequencies that turn more often than this in the original context are kept.
        beta_slow: ``yarn``: those that turn less often are divided.
        truncate: ``yarn``: the bounds between them are whole columns.
        short_factors: ``longrope``: divisors for contexts up to the original one.
        long_factors: ``longrope``: divisors for longer contexts.
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _above_0(
            factor=self.factor,
            attention_factor=self.attention_factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
        )
        if self.kind in ("llama3", "yarn", "longrope"):
            _at_least(1, original_max_position_embeddings=self.original_max_position_embeddings)
        for divisors in (self.short_factors, self.long_factors):
            if min(divisors, default=1.0) <= 0:
                raise ValueError(f"short_factors or long_factors has {min(divisors)}, not a number above 0")


@dataclass(frozen=True, slots=True)
class Rope:
    """One rotary embedding (https://arxiv.org/abs/2104.09864); layers share its table.

    Attributes:
        theta: Base of the frequencies.
        head_dim: Width of the heads that it rotates.
        dims: How many columns of a head it rotates, an even number; the others pass unchanged. In a bundle column i is
            rotated with column i + head_dim / 2, for i < dims / 2.
        scaling: How the frequencies are stretched.
    """

    theta: float
    head_dim: int
    dims: int
    scaling: RopeScaling = RopeScaling()

    def __post_init__(self) -> None:
        _at_least(1, theta=self.theta, head_dim=self.head_dim, dims=self.dims)
        if self.dims % 2 or self.dims > self.head_dim:
            raise ValueError(f"dims {self.dims} is not even, or more than head_dim {self.head_dim}")
        for name in ("short_factors", "long_factors"):
            count = len(getattr(self.scaling, name))
            if self.scaling.kind == "longrope" and count != self.dims // 2:
                raise ValueError(
                    f"scaling.{name} has {count} entries, not one for each of {self.dims // 2} frequencies"
                )


@dataclass(frozen=True, slots=True)
class QueryScale:
    """How queries grow with their position p: by 1 + beta * ln(1 + floor(p / original)).

    So does Llama 4 in layers without rotation, and Ministral 3 (``get_llama_4_attn_scale`` in transformers).

    Attributes:
        beta: How fast.
        original: Up to this position, in tokens, nothing changes.
    """

    beta: float
    original: int

    def __post_init__(self) -> None:
        _at_least(0, beta=self.beta)
        _at_least(1, original=self.original)


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal grouped-query attention.

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads; divides ``heads``.
        head_dim: Width of one head; not always hidden / heads.
        scale: What the products of queries and keys are multiplied by; None stands for head_dim ** -0.5.
        rope: Number of its rotary embedding in :attr:`ModelSpec.ropes`; None for none.
        window: How many positions a position sees, its own included; 0 is all.
        softcap: Scores s become softcap * tanh(s / softcap); 0 leaves them.
        qkv_bias: The q, k and v projections have biases.
        out_bias: The o projection has a bias.
        qk_norm: The norm of queries and keys; each has weights of its own.
        v_norm: The norm of each head of the values, without weights.
        k_equals_v: Values are what the k projection gives, before its norm and rotation; there is no v projection.
        qk_norm_over: ``head``: over each head, all with the same weights. ``each_head``: over each head, which has
            weights of its own. ``width``: over all heads together.
        qk_norm_after_rope: Queries and keys are normalised after they are rotated.
        query_scale: How queries grow with their position, which needs a rotary embedding; None for not at all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float | None = None
    rope: int | None = 0
    window: int = 0
    softcap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_over: QKNormOver = "head"
    v_norm: Norm | None = None
    k_equals_v: bool = False
    qk_norm_after_rope: bool = False
    query_scale: QueryScale | None = None

    def __post_init__(self) -> None:
        _at_least(1, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        _at_least(0, window=self.window, softcap=self.softcap, rope=self.rope or 0)
        if self.scale is not None:
            _above_0(scale=self.scale)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.rope is None and (self.qk_norm_after_rope or self.query_scale is not None):
            raise ValueError("qk_norm_after_rope and query_scale need a rope, and it is null")
        if self.qk_norm_after_rope and (self.qk_norm is None or self.qk_norm_over != "head"):
            raise ValueError("qk_norm_after_rope needs a qk_norm over each head")

    @property
    def score_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return float(self.head_dim**-0.5 if self.scale is None else self.scale)

    @property
    def cache_head_dim(self) -> int:
        """Width of one head in the graphs and in the cache: ``head_dim`` rounded up to what the attention kernel takes.

        The extra columns of q, k, v and rows of o are zero, so they change neither scores nor outputs.
        """
        return cache_head_dim(self.head_dim)


@dataclass(frozen=True, slots=True)
class Mlp:
    """Two projections with an activation between them, or three.

    Attributes:
        width: Rows of the first projection.
        activation: ``silu``, ``gelu`` (with erf), ``gelu_tanh`` (its approximation) or ``relu2`` (relu, squared).
        is_gated: ``down(act(gate(x)) * up(x))``; otherwise ``down(act(up(x)))``.
        has_bias: All its projections have biases.
    """

    width: int
    activation: Activation = "silu"
    is_gated: bool = True
    has_bias: bool = False

    def __post_init__(self) -> None:
        _at_least(1, width=self.width)


@dataclass(frozen=True, slots=True)
class PerLayerInput:
    """What a layer knows of each token by a table of its own, as in Gemma 3n and 4.

    With e the scaled embedding of the token, x the stream above the MLP::

        p = (norm(C e * hidden ** -0.5) + T[token] * width ** 0.5) * 2 ** -0.5
        x = x + out_norm(O (act(G x) * p))

    Attributes:
        width: Of p, and the rows of C and G.
        vocab: Rows of the table T.
        activation: act.
        norm: Both norms: of C e with ``width`` weights, and ``out_norm``.
    """

    width: int
    vocab: int
    activation: Activation
    norm: Norm

    def __post_init__(self) -> None:
        _at_least(1, width=self.width, vocab=self.vocab)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    Attributes:
        attention: Its attention.
        mlp: Its MLP.
        before_attention: The norm of what attention reads.
        after_attention: The norm of what attention returns, before it is added to the stream.
        before_mlp: The norm of what the MLP reads.
        after_mlp: The norm of what the MLP returns.
        is_parallel: Attention and MLP read the same stream.
        residual_scale: What both branches are multiplied by before they are added.
        per_layer_input: A third branch, on tokens.
        has_scalar: The stream is multiplied by a learned number at the end of the layer.
    """

    attention: Attention
    mlp: Mlp
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    is_parallel: bool = False
    residual_scale: float = 1.0
    per_layer_input: PerLayerInput | None = None
    has_scalar: bool = False


@dataclass(frozen=True, slots=True)
class Ends:
    """What stands before the first layer and after the last.

    Attributes:
        final_norm: The norm before the LM head.
        embed_scale: What embeddings are multiplied by.
        learned_positions: Rows of a table that is added to the embeddings, one per position; 0 for none.
        logit_scale: What the normalised stream is multiplied by before the head, and so the logits.
        logit_softcap: Logits z become softcap * tanh(z / softcap); 0 leaves them.
    """

    final_norm: Norm
    embed_scale: float = 1.0
    learned_positions: int = 0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    def __post_init__(self) -> None:
        _at_least(0, logit_softcap=self.logit_softcap)


def cache_head_dim(head_dim: int) -> int:
    """Round the width of a head up to what the attention kernel takes."""
    return -(-head_dim // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
