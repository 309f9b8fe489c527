"""What a bundle's trained drafter is compared with: its twin, with the published weights or those of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.arch import resolve
from shortstack.export.arch.architecture import EMBEDDING, FINAL_NORM, LM_HEAD
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.drafters import Drafter, ModelOfDrafter, open_drafter
from shortstack.export.kept_blocks import KeptBlocks
from shortstack.export.parity.bundle_weights import BundleWeights, WeightError, relative
from shortstack.export.parity.compare import differences
from shortstack.export.spec import OWN_DRAFTER
from shortstack.export.tensors import ModelTensors
from shortstack.export.twin.assistant import AssistantTwin
from shortstack.export.twin.drafter import DrafterTwin
from shortstack.export.twin.drafter_parts import DrafterWeights, ModelParts, TwinOfDrafter
from shortstack.export.twin.drafter_stages import StagesTwin
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import HEAD_IDS, MODEL_NORM, end_parts
from shortstack.graphs.errors import RequestError
from shortstack.graphs.layer_spec import Norm
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.spec import ModelSpec
from shortstack.runtime.engine.whole_text import Array

_MAX_LISTED = 6


@dataclass(frozen=True, slots=True)
class DrafterReference:
    """What a bundle's drafter is compared with.

    Attributes:
        twin: It computes; with the weights of a quantized bundle, if that is compared.
        model_norm: The weight of the model's final norm as it was trained, [hidden].
        norm: What that norm is.
        weight_errors: How far a quantized bundle's weights are from the published ones.
    """

    twin: TwinOfDrafter
    model_norm: torch.Tensor
    norm: Norm
    weight_errors: Sequence[WeightError] = ()


def load_drafter_reference(
    source: str,
    checkpoint_source: str,
    manifest: Manifest,
    *,
    revision: str | None = None,
    adapter: Path | None = None,
    follow_links: bool = False,
    weights: BundleWeights | None = None,
    allow_pickle: bool = False,
) -> DrafterReference:
    """Open a drafter and make its twin.

    Args:
        source: Its folder, GGUF file or hub id, or :data:`OWN_DRAFTER`.
        checkpoint_source: The model's checkpoint.
        manifest: The bundle.
        revision: Branch, tag or commit of the model's hub id.
        adapter: A LoRA adapter that is merged into the bundle's model.
        follow_links: Follow links that lead out of a folder.
        weights: Those of a quantized bundle, which the twin then holds; None leaves it the published ones.
        allow_pickle: Read tensors from pickles.

    Raises:
        RequestError: The bundle has no drafter, or another one.
        CheckpointError: The drafter cannot be read, or does not fit the model.
    """
    wanted = manifest.plan.drafter
    remedy = "name the drafter that the bundle was exported with"
    if wanted is None:
        raise RequestError(
            "the bundle has no trained drafter to compare",
            found=f"--drafter {source}",
            remedy="leave --drafter out, or give a bundle that was exported with it",
        )
    if (source == OWN_DRAFTER) != (wanted.kind == "mtp"):
        raise RequestError(
            "the bundle's drafter is of another kind",
            found=f"--drafter {source}",
            expected=f"--drafter {OWN_DRAFTER}"
            if wanted.kind == "mtp"
            else f"the drafter's folder or file ({wanted.kind})",
            remedy=remedy,
        )
    opened = open_checkpoint(checkpoint_source, revision=revision, follow_links=follow_links, allow_pickle=allow_pickle)
    arch, spec = resolve(opened)
    checkpoint = opened if adapter is None else AdaptedCheckpoint(opened, adapter)
    model = ModelOfDrafter(checkpoint, spec, arch)
    drafter = open_drafter(source, model, follow_links=follow_links, allow_pickle=allow_pickle)
    _check_same(wanted, drafter.spec, remedy)
    tensors = ModelTensors(checkpoint, arch, spec, KeptBlocks())
    published = published_weights(drafter, spec)
    own, errors = published, list[WeightError]()
    head = EMBEDDING if spec.tie_word_embeddings else LM_HEAD
    ends = {role: tensors.vector(role) for role in (EMBEDDING, head)} if weights is None else weights.ends()
    if weights is not None:
        own = weights.drafter()
        errors = list(compare_drafter(own, published, tensors.vector(FINAL_NORM)))
    parts = ModelParts(spec, ends[EMBEDDING], ends[head], manifest.max_length, tensors.rope_factors())
    twin = _twin(drafter.spec, replace(own, rope_factors=drafter.rope_factors()), parts)
    return DrafterReference(twin, torch.tensor(tensors.vector(FINAL_NORM)), spec.ends.final_norm, errors)


def _twin(spec: DrafterSpec, weights: DrafterWeights, model: ModelParts) -> TwinOfDrafter:
    if spec.shared:
        return AssistantTwin(spec, weights, model)
    return StagesTwin(spec, weights, model) if spec.layer_per_draft else DrafterTwin(spec, weights, model)


def _check_same(ours: DrafterSpec, theirs: DrafterSpec, remedy: str) -> None:
    found = [
        f"{where} is {mine} in the bundle and {other} in the drafter"
        for where, mine, other in differences("", asdict(ours), asdict(theirs))
    ]
    if found:
        raise RequestError(f"the bundle was made with another drafter: {'; '.join(found[:_MAX_LISTED])}", remedy=remedy)


def published_weights(drafter: Drafter, model: ModelSpec) -> DrafterWeights:
    """Read a drafter's own weights, as they were published."""
    own = end_parts(drafter.spec, model.hidden_size, model.vocab_size)
    parts = {part: drafter.part(part) for part in own if part != MODEL_NORM}
    layers = ({role: drafter.role(number, role) for role in own} for number, own in enumerate(drafter.layers))
    return DrafterWeights(parts, tuple(layers))


def compare_drafter(ours: DrafterWeights, theirs: DrafterWeights, model_norm: Array) -> Iterator[WeightError]:
    """Yield how far a bundle's weights of a drafter are from the published ones."""
    for part, value in ours.parts.items():
        if part == HEAD_IDS:
            yield WeightError(f"drafter {part}", 0.0 if np.array_equal(value, theirs.parts[part]) else float("inf"))
        else:
            published = model_norm if part == MODEL_NORM else theirs.parts[part]
            yield WeightError(f"drafter {part}", relative(value, published))
    for number, own in enumerate(ours.layers):
        for role, value in own.items():
            yield WeightError(f"drafter layer {number} {role}", relative(value, theirs.layers[number][role]))
