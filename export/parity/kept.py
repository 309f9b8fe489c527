"""Compares the matrices that keep a checkpoint's blocks with those blocks: no code and no scale may differ."""

from __future__ import annotations

from shortstack.export.arch.architecture import Architecture
from shortstack.export.checkpoint import Checkpoint
from shortstack.export.kept_blocks import KeptBlocks, blocks_of
from shortstack.export.parity.bundle_weights import BundleWeights, WeightError
from shortstack.export.sources import matrix_sources
from shortstack.export.stacked_blocks import relative_error
from shortstack.export.tensors import ModelTensors
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.spec import ModelSpec


def compare_kept(
    checkpoint: Checkpoint, arch: Architecture, spec: ModelSpec, weights: BundleWeights
) -> list[WeightError]:
    """Return how far each kept matrix of a bundle is from the blocks that the checkpoint has for it.

    Nearly kept matrices are compared with what export makes of the blocks, so that here, too, nothing may differ.

    Args:
        checkpoint: The checkpoint. Matrices that it has as floats, or in other blocks, are left out.
        arch: Its family.
        spec: The model.
        weights: The bundle's.
    """
    manifest = weights.bundle.manifest
    now = blocks_of(checkpoint, matrix_sources(arch, spec))
    kept = {
        name: origin.kind
        for name, origin in manifest.origins.items()
        if origin.is_kept
        and now.kept.get(name) == origin.kind
        and now.formats.get(name) == manifest.precision.weights[name]
    }
    tensors = ModelTensors(checkpoint, arch, spec, KeptBlocks(kept, formats=now.formats), manifest.dtype)
    errors = []
    for name in kept:
        blocks = tensors.matrix(name)
        assert isinstance(blocks, BlockTensor), f"{name} should be kept in blocks"
        stored = weights.matrix(name, blocks.shape)
        errors.append(WeightError(name, relative_error(blocks, stored, manifest.dtype), is_kept=True))
    return errors
