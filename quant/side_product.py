"""What rounding would erase of a fine-tuning, and how it is kept: a product of low rank beside the blocks.

Weights that came from a quantized file lie on its grid. Whoever merges an adapter into them, or tunes them a little,
moves each by less than half a step, and rounding on the same grid moves it back: the error that is left *is* the
fine-tuning. That error gives itself away, for errors of rounding have two marks that it lacks:

- They are spread over the whole step. Weights near a grid leave less.
- They are noise, whose energy lies in no direction more than in another. What an adapter adds has a low rank.

Where an error has a low rank, that part is stored as a side product B A and the rest is rounded. What is rounded then
are the weights of the quantized file, so their blocks stay what they were. Approximating rounding errors by a low rank
is known from ZeroQuant-V2 (Yao et al. 2023, arXiv 2303.08302) and LQER (Zhang et al. 2024, arXiv 2402.02446), rounding
and approximating in turns from LoftQ (Li et al. 2023, arXiv 2310.08659).

Errors are judged without the mean of each block: a grid that is shifted against that of the file leaves such means, and
they say nothing about a fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from shortstack.graphs.ir.block_tensor import BlockTensor, Side, into_blocks, nearest
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods.offsets import rounded_to_nearest
from shortstack.quant.methods.stats import Floats
from shortstack.quant.rows import by_rows, cached_rows

Fate = Literal["ordinary", "kept", "at risk"]
FATES: tuple[Fate, ...] = ("kept", "at risk")  # what a matrix of a fine-tuned model can have
Tuning = Literal["keep", "off-grid", "ignore"]
TUNINGS: tuple[Tuning, ...] = get_args(Tuning)
"""What is done about a fine-tuning that rounding would erase: side products where it has a low rank and another grid
elsewhere; another grid everywhere; nothing."""

# Root mean square of the errors, in those of weights spread evenly over each step: 1 for weights that know no grid.
_NEAR = 0.6
_ON_THE_GRID = 0.03  # bfloat16 copies of a 4-bit file have about 0.02
_KEPT = 0.5  # what a side product must leave of the errors; of noise in 576 x 576 rank 32 leaves 0.9
_HOPELESS = 0.75  # the same after the first turn
_RANK = 32
_LARGEST_SHARE = 0.25  # of the smaller side of a matrix: what is more than that is no low rank
_TURNS = 3
_SPARE = 16  # further directions that the search for the strongest ones keeps
_POWERS = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about the matrices of one input.

    Attributes:
        fate: ``ordinary``: no grid, or the weights of a grid themselves. ``kept``: a fine-tuning, which the side
            products keep. ``at risk``: the weights lie near a grid and what moved them has no low rank.
        sides: One for each matrix where ``fate`` is ``kept``, with the same right factor.
    """

    fate: Fate
    sides: tuple[Side, ...] = ()


def find_sides(weights: Sequence[Floats], formats: Sequence[BlockFormat]) -> Finding:
    """Look for a fine-tuning that rounding to nearest would erase.

    Args:
        weights: Matrices [out, in] that multiply the same input.
        formats: The format of each, without side products.
    """
    width = weights[0].shape[1]
    size = formats[0].block_size
    if width % size or any(block_format.block_size != size for block_format in formats):
        return Finding("ordinary")
    energies = [_energies(w, f) for w, f in zip(weights, formats, strict=True)]
    before, expected = (sum(each) for each in zip(*energies, strict=True))
    distance = float(np.sqrt(before / max(expected, 1e-30)))
    if not _ON_THE_GRID < distance < _NEAR:
        return Finding("ordinary")
    # Fine steps resolve a fine-tuning; what they lose without a low rank is what storing in bfloat16 lost.
    is_coarse = any(block_format.code_type.gains_from_offsets for block_format in formats)
    lost = Finding("at risk" if is_coarse else "ordinary")
    rounded = [rounded_to_nearest(w, f) for w, f in zip(weights, formats, strict=True)]
    errors = _stacked_errors(weights, rounded)
    rank, ends = max(_RANK, size), np.cumsum([len(w) for w in weights])[:-1].tolist()
    if rank > _LARGEST_SHARE * min(errors.shape):
        return lost
    for turn in range(_TURNS):
        left, right = _strongest(errors, rank)
        product = left @ right
        errors = _errors_beside(weights, np.split(product, ends), formats)
        if turn == 0 and _spread_energy(errors - product, size) > _HOPELESS**2 * before:
            return lost
    sides = _stored(errors, ends, rank, formats)
    products = [side.dequantize() for side in sides]
    after = _errors_beside(weights, products, formats) - np.concatenate(products)
    return Finding("kept", sides) if _spread_energy(after, size) <= _KEPT**2 * before else lost


def _energies(weight: Floats, block_format: BlockFormat) -> tuple[float, float]:
    """Return the energy of a matrix's rounding errors, and what it would be if weights were spread over each step."""

    def work(some: slice) -> tuple[float, float]:
        rounded = rounded_to_nearest(weight[some], block_format)
        steps = float(np.square(rounded.scales, dtype=np.float64).sum())
        return _spread_energy(weight[some] - rounded.dequantize(), size), size * steps / 12

    size = block_format.block_size
    found = by_rows(work, len(weight), cached_rows(weight.shape[1]))
    return sum(energy for energy, _ in found), sum(energy for _, energy in found)


def beside(blocks: BlockTensor, side: Side) -> BlockTensor:
    """Return a matrix in blocks with a side product."""
    return replace(blocks, format=replace(blocks.format, side_columns=side.left.shape[1]), side=side)


def _stacked_errors(weights: Sequence[Floats], rounded: Sequence[BlockTensor]) -> Floats:
    """Return what is left of all matrices, one below the other."""
    return np.concatenate([w - r.dequantize() for w, r in zip(weights, rounded, strict=True)])


def _errors_beside(weights: Sequence[Floats], products: Sequence[Floats], formats: Sequence[BlockFormat]) -> Floats:
    """Return what is left of all matrices when the blocks hold them without their products."""
    rounded = [rounded_to_nearest(w - p, f) for w, p, f in zip(weights, products, formats, strict=True)]
    return _stacked_errors(weights, rounded)


def _spread_energy(errors: Floats, size: int) -> float:
    """Return the sum of squares of errors [rows, width], without the mean of each block."""
    x = into_blocks(errors, BlockFormat(4, size))
    return float(np.square(x - x.mean(axis=2, keepdims=True), dtype=np.float64).sum())


def _strongest(matrix: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return the best factors of a rank, [rows, rank] and [rank, width], each with half of the strength.

    Found among random directions (Halko et al. 2011, arXiv 0909.4061), the same ones every time.
    """
    rows, width = matrix.shape
    count = min(rank + _SPARE, rows, width)
    found = matrix @ np.random.default_rng(0).standard_normal((width, count), np.float32)
    for _ in range(_POWERS):
        found = matrix @ np.linalg.qr(matrix.T @ np.linalg.qr(found)[0])[0]
    base = np.linalg.qr(found)[0]
    u, strength, right = np.linalg.svd(base.T @ matrix, full_matrices=False)
    half = np.sqrt(strength[:rank])
    left, right = (base @ u[:, :rank]) * half, half[:, None] * right[:rank]
    missing = rank - len(half)
    return np.pad(left, ((0, 0), (0, missing))), np.pad(right, ((0, missing), (0, 0)))


def _stored(errors: Floats, ends: list[int], rank: int, formats: Sequence[BlockFormat]) -> tuple[Side, ...]:
    """Return the side products of a rank that come closest to errors [rows, width]: factors in blocks."""
    size = formats[0].block_size
    right = nearest(_strongest(errors, rank)[1], BlockFormat(8, size, is_symmetric=True))
    left = np.linalg.lstsq(right.dequantize().T, errors.T, rcond=None)[0].T.astype(np.float32)
    kinds = [replace(f, has_offsets=False) for f in formats]
    parts = np.split(left, ends)
    return tuple(Side(nearest(np.ascontiguousarray(p), kind), right) for p, kind in zip(parts, kinds, strict=True))
