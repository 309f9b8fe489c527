"""A model's floats straight from its checkpoint, under the names and in the shapes of the float bundle it would become.

What quantizes a bundle reads such a bundle's tensors one at a time; this gives it the same tensors without the bundle.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from shortstack.export.assemble import OpenedModel
from shortstack.export.drafters.store import drafter_rope_tables, own_names, read_weight, stored_floats
from shortstack.export.kept_blocks import KeptBlocks
from shortstack.export.tensors import Floats, ModelTensors
from shortstack.export.weights import end_vectors, exit_arrays, stored_exit_floats, stored_rope_tables
from shortstack.graphs import names
from shortstack.graphs.drafter_weights import MODEL_NORM
from shortstack.graphs.exit_parts import HEAD_IDS, mlp_norm
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.ir.exit import full_head
from shortstack.graphs.ir.read_matrix import is_stored_as_rows
from shortstack.graphs.layer_weights import matrix_parts, stored_shapes
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.precision import Precision
from shortstack.graphs.spec import DType


class CheckpointFloats:
    """Reads a checkpoint's tensors as a quantization wants them: see ``Reader`` in ``quant/source.py``.

    Args:
        model: The checkpoint and what is to be made of it.
        manifest: The manifest of the float bundle.
        dtype: Type of what is not in blocks.
        keeps_trimmed: Whether trimmed heads that are rows of the LM head keep its blocks, where it keeps them.
    """

    def __init__(self, model: OpenedModel, manifest: Manifest, dtype: DType, *, keeps_trimmed: bool) -> None:
        self._manifest = manifest
        self._where = model.checkpoint.source
        self._max_length = model.max_length
        # What is not kept is to be rounded from floats.
        self._blocks = replace(model.blocks, requantized={}, floats=())
        self._lost = model.blocks.requantized
        self._tensors = ModelTensors(model.checkpoint, model.arch, model.spec, self._blocks, dtype)
        self._kept = frozenset(model.blocks.kept)
        self._ends = end_vectors(self._tensors)
        self._layer_parts: dict[str, tuple[int, str]] = {}  # vectors of layers
        self._matrices = {names.EMBED_TOKENS, names.LM_HEAD}
        for layer in range(model.spec.num_hidden_layers):
            table, attention = model.spec.weights(layer), model.spec.layers[layer].attention
            self._matrices |= {names.layer_weight(layer, part) for part in matrix_parts(table)}
            for part in stored_shapes(table, attention):
                self._layer_parts[names.layer_weight(layer, part)] = layer, part
        self._of_exits: dict[str, npt.NDArray[np.generic]] = {}
        self._trimmed: dict[str, npt.NDArray[np.int64]] = {}  # ids of heads that are rows of the LM head
        self._trimmed_rows: dict[bytes, Floats] = {}
        for exit_spec in model.plan.exits:
            depth = exit_spec.exit_layer
            for part, array in exit_arrays(model.spec, exit_spec, model.exit_weights).items():
                self._of_exits[names.exit_weight(depth, part)] = array
            if exit_spec.branch == "mlp":
                for part, below in mlp_norm(model.spec, depth).items():
                    self._layer_parts[names.exit_weight(depth, part)] = depth - 1, below
            if exit_spec.head == "shared" and exit_spec.draft_vocab is not None:
                ids = np.asarray(self._of_exits[names.exit_weight(depth, HEAD_IDS)], np.int64)
                self._trimmed[names.exit_weight(depth, "head.weight")] = ids
        self._drafter, self._of_drafter = model.drafter, set[str]()
        if model.drafter is not None:
            self._of_drafter = set(own_names(model.drafter.spec, model.spec))
        self._head = full_head(model.spec)
        self._kept_trimmed = frozenset(self._trimmed) if keeps_trimmed and self._head in self._kept else frozenset()
        self._last_kept: tuple[str, BlockTensor] | None = None
        self._ropes: dict[str, Floats] = {}

    @property
    def manifest(self) -> Manifest:
        """The manifest of the float bundle."""
        return self._manifest

    @property
    def where(self) -> str:
        """The checkpoint."""
        return self._where

    @property
    def kept_names(self) -> frozenset[str]:
        """The matrices that keep the checkpoint's blocks."""
        return self._kept | self._kept_trimmed

    def measured_blocks(
        self, errors: Mapping[str, float], of_outputs: Collection[str], precision: Precision
    ) -> KeptBlocks:
        """Return what became of the matrices that the checkpoint has in blocks.

        Args:
            errors: The error of each matrix that was rounded.
            of_outputs: The matrices of which this is an error of outputs.
            precision: How the bundle stores them.
        """
        for name in self._kept - self._tensors.errors.keys():  # stored by a run that was killed
            self._tensors.matrix(name)
        lost = {name: kind for name, kind in self._lost.items() if name in errors}
        formats_of = {name: precision.weights[name] for name in lost}
        known = {**self._tensors.errors, **{name: errors[name] for name in lost}}
        seen = lost.keys() & set(of_outputs)
        formats = {**self._blocks.formats, **formats_of}
        return replace(self._blocks, requantized=lost, formats=formats, errors=known, of_outputs=seen)

    def kept(self, name: str) -> BlockTensor:
        """Return the blocks [out, in] of one of these."""
        whole = self._head if name in self._trimmed else name
        if self._last_kept is None or self._last_kept[0] != whole:
            found = self._tensors.matrix(whole)
            assert isinstance(found, BlockTensor), f"{whole} should be kept in blocks"
            self._last_kept = whole, found
        blocks = self._last_kept[1]
        return blocks.rows(self._trimmed[name]) if name in self._trimmed else blocks

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return a tensor as a bundle stores it; ids are int64."""
        if self._drafter is not None and name == names.drafter_weight(HEAD_IDS):
            return np.asarray(self._drafter.part(HEAD_IDS))
        if name.endswith(f".{HEAD_IDS}"):
            return np.asarray(self._of_exits[name], np.int64)
        return self.floats(name)

    def floats(self, name: str) -> Floats:
        """Return a tensor as a bundle stores it, in float32."""
        if name in self._matrices or name in self._trimmed:
            found = self.matrix(name)
            return found if is_stored_as_rows(name) else np.ascontiguousarray(found.T)
        if name in self._layer_parts:
            layer, part = self._layer_parts[name]
            return self._tensors.layer_vector(part, layer)
        if name in self._of_exits:
            depth, part = name.removeprefix("exits.").split(".", 1)
            return np.ascontiguousarray(stored_exit_floats(part, self._of_exits[names.exit_weight(int(depth), part)]))
        if name in self._of_drafter:
            assert self._drafter is not None
            return np.ascontiguousarray(stored_floats(name, read_weight(self._drafter, name)))
        if name in self._ends:
            return self._ends[name]()
        if name == names.drafter_weight(MODEL_NORM):
            return self._ends[names.FINAL_NORM]()
        if name == names.UNIT_NORM:
            return np.ones(self._manifest.spec.hidden_size, np.float32)
        return self._rope_table(name)

    def matrix(self, name: str) -> Floats:
        """Return a matrix [out, in], C-contiguous float32."""
        if name in self._trimmed:
            return self._trimmed_head(self._trimmed[name])
        if name in self._of_exits:
            return np.ascontiguousarray(self._of_exits[name], np.float32)
        if name in self._of_drafter:
            assert self._drafter is not None
            return np.ascontiguousarray(read_weight(self._drafter, name))
        found = self._tensors.matrix(name)
        return found.dequantize() if isinstance(found, BlockTensor) else np.ascontiguousarray(found)

    def rows(self, name: str, start: int, end: int) -> Floats:
        """Return some rows of a matrix [out, in] that a bundle stores as rows."""
        if name in self._trimmed or name in self._of_exits:
            return self.matrix(name)[start:end]
        if name in self._kept:
            return self.kept(name).rows(np.arange(start, end)).dequantize()
        return self._tensors.rows(name, start, end)

    def _trimmed_head(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Return rows of the LM head, by ascending token ids; read once for all exits that have the same ones."""
        key = ids.tobytes()
        if key not in self._trimmed_rows:
            found = np.empty((len(ids), self._manifest.spec.hidden_size), np.float32)
            step = 4096
            for start in range(0, self._manifest.spec.vocab_size, step):
                first, last = np.searchsorted(ids, (start, start + step))
                if first < last:
                    end = min(start + step, self._manifest.spec.vocab_size)
                    found[first:last] = self.rows(self._head, start, end)[ids[first:last] - start]
            self._trimmed_rows = {key: found}
        return self._trimmed_rows[key]

    def _rope_table(self, name: str) -> Floats:
        if name not in self._ropes:
            for number in range(len(self._manifest.spec.ropes)):
                if name in [names.rope_table(number, part) for part in names.ROPE_PARTS]:
                    self._ropes |= stored_rope_tables(self._tensors, number, self._max_length, self._max_length)
            if self._drafter is not None:
                self._ropes |= drafter_rope_tables(self._drafter, self._manifest.spec, self._max_length)
        return self._ropes[name]
