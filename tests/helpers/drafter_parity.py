"""Comparisons of a bundle's drafter with its twin, and bundles that are damaged to be found out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch

from shortstack.export.parity.bundle_weights import BundleWeights
from shortstack.export.parity.drafter import compare_drafts
from shortstack.export.parity.drafter_reference import load_drafter_reference
from shortstack.export.parity.drafter_report import DrafterParity
from shortstack.export.parity.reference import Reference
from shortstack.export.parity.twin_reference import TwinReference, needs_twin
from shortstack.graphs import names
from shortstack.graphs.bundle import describe_files, write_manifest
from shortstack.graphs.manifest import read_manifest
from shortstack.runtime import load

LARGEST_LOGIT, LARGEST_STATE = 2e-4, 5e-5
"""What float32 leaves between the graphs and the twin of tiny drafters, in deviations of the logits and in largest
values of a state. Measured: at most 5.1e-5 and 1.1e-5, for the fourth draft of a head without norms; 5e-6 elsewhere."""


def texts(count: int = 3, vocab: int = 300) -> list[list[int]]:
    """Return texts of 2, 15, 28, ... random tokens."""
    return [np.random.default_rng(seed).integers(3, vocab, 2 + 13 * seed).tolist() for seed in range(count)]


def compared(
    checkpoint: str, bundle: Path, drafter: str, given: list[list[int]] | None = None, greedy_tokens: int = 24
) -> DrafterParity:
    """Compare a bundle's drafter as ``shortstack parity --drafter`` does."""
    with load(bundle) as model:
        manifest = model.bundle.manifest
        weights = None if manifest.precision.is_float else BundleWeights(model.bundle)
        kind = TwinReference if needs_twin(manifest.spec, checkpoint) else Reference
        reference = kind(checkpoint, weights=weights)
        torch.set_num_threads(1)  # which a reference sets to all
        own = load_drafter_reference(drafter, checkpoint, manifest, weights=weights)
        return compare_drafts(model, reference, own, given or texts(), greedy_tokens=greedy_tokens)


def damaged(source: Path, out: Path, change: Callable[[onnx.ModelProto], None], file: str) -> Path:
    """Copy a bundle and change one of its graphs."""
    shutil.copytree(source, out)
    graph = onnx.load(out / file, load_external_data=False)
    change(graph)
    (out / file).write_bytes(graph.SerializeToString())
    write_manifest(out, replace(read_manifest(out / names.MANIFEST_FILE), files=describe_files(out)))
    return out


def swapped(first: str, second: str) -> Callable[[onnx.ModelProto], None]:
    """Exchange two values wherever nodes read them."""
    other = {first: second, second: first}

    def change(graph: onnx.ModelProto) -> None:
        count = 0
        for node in graph.graph.node:
            for i, name in enumerate(node.input):
                if name in other:
                    node.input[i] = other[name]
                    count += 1
        assert count >= 2

    return change
