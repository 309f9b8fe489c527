"""Rotary embedding tables: cos and sin per position and frequency, equal to those that transformers computes.

The last bit of an inverse frequency matters: at position 8000 it moves the angle by 5e-4. So the frequencies are
computed with torch in float32, in the same order of operations as in transformers' ``modeling_rope_utils.py``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.layer_spec import Rope

FloatArray = npt.NDArray[np.float32]


def rope_tables(
    rope: Rope, length: int, factors: FloatArray | None = None, context: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """Compute the cos and sin tables of positions ``0..length-1``.

    Args:
        rope: The rotary embedding.
        length: Number of positions.
        factors: The divisors [head_dim / 2] where ``rope.scaling.kind`` is ``factors``; None for any other.
        context: The longest context that the tables are for, in positions, which chooses between the divisors of
            ``longrope``; None is ``length``.

    Returns:
        cos and sin, each float32 [length, head_dim / 2]; 1 and 0 in the columns that are not rotated.

    Raises:
        CheckpointError: ``factors`` is missing, of another shape, or not positive, or an angle is infinite.
        ValueError: ``factors`` is given to a model that does not use it.
    """
    import torch  # imported here because it takes seconds, and only the tables need it

    frequencies = _inverse_frequencies(rope, factors, length if context is None else context)
    if not float(frequencies.max()) * length <= torch.finfo(torch.float32).max:  # NaN is not, either
        raise CheckpointError(
            "the model's rotary frequencies are too large for float32",
            found=f"rope_theta {rope.theta:g} and factor {rope.scaling.factor:g}",
            expected="a base and a factor near those of other models, such as 10000 and 8",
        )
    # [length, 1] * [dims / 2] -> [length, dims / 2]
    angles = torch.arange(length, dtype=torch.int64)[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    if (factor := rope.scaling.attention_factor) != 1.0:
        cos, sin = cos * factor, sin * factor
    kept = ((0, 0), (0, (rope.head_dim - rope.dims) // 2))
    return np.pad(cos.numpy(), kept, constant_values=1.0), np.pad(sin.numpy(), kept)


def is_long(rope: Rope, context: int) -> bool:
    """Whether ``longrope`` takes the divisors of long contexts."""
    return context > rope.scaling.original_max_position_embeddings


def inverse_frequencies(rope: Rope, factors: FloatArray | None = None, context: int = 0) -> FloatArray:
    """Compute by how much the angle of each frequency grows per position, float32 [dims / 2].

    Formulas, with f_i = theta^(-2i / dims) (RoFormer, https://arxiv.org/abs/2104.09864, section 3.2):

    * ``linear``: f_i / factor (position interpolation, https://arxiv.org/abs/2306.15595).
    * ``llama3``: f_i for wavelengths 2 pi / f_i below original / high_freq_factor, f_i / factor above
      original / low_freq_factor, and a linear blend in original / wavelength between (Llama 3.1,
      https://github.com/meta-llama/llama-models, ``apply_scaling``).
    * ``factors``: f_i / factors_i (ggml's ``ggml_rope_ext`` with ``freq_factors``).
    * ``yarn``: f_i where it turns more than beta_fast times in the original context, f_i / factor where it turns less
      than beta_slow times, and a blend that is linear in i between (https://arxiv.org/abs/2309.00071, section 3.2).
    * ``longrope``: f_i / short_factors_i or f_i / long_factors_i.
    * ``proportional``: theta^(-2i / head_dim) for i < dims / 2.

    Args:
        rope: The rotary embedding.
        factors: As in :func:`rope_tables`.
        context: As in :func:`rope_tables`.

    Raises:
        CheckpointError: ``factors`` is missing, of another shape, or not positive.
        ValueError: ``factors`` is given to a model that does not use it.
    """
    frequencies: FloatArray = _inverse_frequencies(rope, factors, context).numpy()
    return frequencies


def _inverse_frequencies(rope: Rope, factors: FloatArray | None, context: int) -> Any:
    import torch

    scaling = rope.scaling
    width = rope.head_dim if scaling.kind == "proportional" else rope.dims
    powers = rope.theta ** (torch.arange(0, rope.dims, 2, dtype=torch.float) / width)
    if scaling.kind == "longrope":
        divisors = scaling.long_factors if is_long(rope, context) else scaling.short_factors
        return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * powers)
    frequencies = 1.0 / powers
    if scaling.kind == "factors":
        return frequencies / torch.from_numpy(_checked(factors, rope.dims // 2))
    if factors is not None:
        raise ValueError(f"rotary scaling of kind {scaling.kind} takes no factors")
    if scaling.kind in ("linear", "proportional"):
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, rope)
    if scaling.kind == "yarn":
        return _yarn(powers, rope)
    return frequencies


def _yarn(powers: Any, rope: Rope) -> Any:
    import torch

    scaling = rope.scaling

    def column(turns: float) -> float:
        """Return the column whose frequency turns so many times in the original context."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.dims * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = column(scaling.beta_fast), column(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return (1.0 / (scaling.factor * powers)) * (1 - kept) + (1.0 / powers) * kept


def _llama3(frequencies: Any, rope: Rope) -> Any:
    import torch

    scaling = rope.scaling
    original = scaling.original_max_position_embeddings
    longest = original / scaling.low_freq_factor
    shortest = original / scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    smooth = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    between = ~(wavelengths < shortest) & ~(wavelengths > longest)
    return torch.where(between, blended, scaled)


def _checked(factors: FloatArray | None, count: int) -> FloatArray:
    if factors is None:
        raise CheckpointError("the model divides its rotary frequencies by factors, and the checkpoint has none")
    if factors.shape != (count,) or not np.all(np.isfinite(factors)) or not np.all(factors > 0):
        raise CheckpointError(
            "the factors of the model's rotary frequencies",
            found=f"shape {list(factors.shape)}",
            expected=f"{count} positive numbers",
        )
    return np.ascontiguousarray(factors, dtype=np.float32)
