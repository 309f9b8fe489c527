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
from shortstack.graphs.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]


def rope_tables(spec: ModelSpec, length: int, factors: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
    """Compute the cos and sin tables of positions ``0..length-1``.

    Args:
        spec: The model, of which ``rope_theta``, ``head_dim`` and ``rope_scaling`` are used.
        length: Number of positions.
        factors: The divisors [head_dim / 2] of a model whose ``rope_scaling.kind`` is ``factors``; None for any other.

    Returns:
        cos and sin, each float32 [length, head_dim / 2].

    Raises:
        CheckpointError: ``factors`` is missing, of another shape, or not positive, or an angle is infinite.
        ValueError: ``factors`` is given to a model that does not use it.
    """
    import torch  # imported here because it takes seconds, and only the tables need it

    frequencies = _inverse_frequencies(spec, factors)
    if not float(frequencies.max()) * length <= torch.finfo(torch.float32).max:  # NaN is not, either
        raise CheckpointError(
            "the model's rotary frequencies are too large for float32",
            found=f"rope_theta {spec.rope_theta:g} and factor {spec.rope_scaling.factor:g}",
            expected="a base and a factor near those of other models, such as 10000 and 8",
        )
    # [length, 1] * [head_dim / 2] -> [length, head_dim / 2]
    angles = torch.arange(length, dtype=torch.int64)[:, None].float() * frequencies
    return angles.cos().numpy(), angles.sin().numpy()


def inverse_frequencies(spec: ModelSpec, factors: FloatArray | None = None) -> FloatArray:
    """Compute by how much the angle of each frequency grows per position, float32 [head_dim / 2].

    Formulas, with f_i = theta^(-2i / head_dim) (RoFormer, https://arxiv.org/abs/2104.09864, section 3.2):

    * ``linear``: f_i / factor (position interpolation, https://arxiv.org/abs/2306.15595).
    * ``llama3``: f_i for wavelengths 2 pi / f_i below original / high_freq_factor, f_i / factor above
      original / low_freq_factor, and a linear blend in original / wavelength between (Llama 3.1,
      https://github.com/meta-llama/llama-models, ``apply_scaling``).
    * ``factors``: f_i / factors_i (ggml's ``ggml_rope_ext`` with ``freq_factors``).

    Args:
        spec: The model.
        factors: As in :func:`rope_tables`.

    Raises:
        CheckpointError: ``factors`` is missing, of another shape, or not positive.
        ValueError: ``factors`` is given to a model that does not use it.
    """
    frequencies: FloatArray = _inverse_frequencies(spec, factors).numpy()
    return frequencies


def _inverse_frequencies(spec: ModelSpec, factors: FloatArray | None) -> Any:
    import torch

    scaling = spec.rope_scaling
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float) / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    if scaling.kind == "factors":
        return frequencies / torch.from_numpy(_checked(factors, spec.head_dim // 2))
    if factors is not None:
        raise ValueError(f"rotary scaling of kind {scaling.kind} takes no factors")
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, spec)
    return frequencies


def _llama3(frequencies: Any, spec: ModelSpec) -> Any:
    import torch

    scaling = spec.rope_scaling
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
