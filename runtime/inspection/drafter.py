"""A bundle's trained drafter, described."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.graphs import names
from shortstack.graphs.assistant_contract import computed_logits
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.manifest import Manifest
from shortstack.runtime.inspection.sizes import (
    BYTES_PER_VALUE,
    draft_bytes,
    drafter_bytes,
    layers_bytes,
    read_bytes,
    stored_as,
)


@dataclass(frozen=True, slots=True)
class DrafterReport:
    """A trained drafter beside the model.

    Attributes:
        spec: What it is.
        rows: Rows of its head that a draft computes.
        stored_as: How its layers are stored.
        weight_bytes: What it has of its own.
        draft_cost: f: a further draft in plain steps, predicted from the weight bytes that both read.
        cache_bytes_per_token: Of its own layers; 0 where they read the model's keys and values.
    """

    spec: DrafterSpec
    rows: int
    stored_as: str
    weight_bytes: int
    draft_cost: float
    cache_bytes_per_token: int


def drafter_report(manifest: Manifest) -> DrafterReport | None:
    """Return what a bundle's trained drafter is; None without one."""
    drafter, spec = manifest.plan.drafter, manifest.spec
    if drafter is None:
        return None
    owning = () if drafter.shared else drafter.layers
    values = sum(2 * own.attention.kv_heads * own.attention.cache_head_dim for own in owning)
    matrix = names.drafter_weight("layers.0.attn.o_proj.weight")
    return DrafterReport(
        spec=drafter,
        rows=computed_logits(spec, drafter),
        stored_as=stored_as(manifest, matrix),
        weight_bytes=drafter_bytes(manifest),
        draft_cost=round(draft_bytes(manifest) / (layers_bytes(manifest) + read_bytes(manifest, None)), 6),
        cache_bytes_per_token=values * BYTES_PER_VALUE[manifest.dtype],
    )
