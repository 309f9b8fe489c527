"""The floats that are being quantized, wherever they come from: a bundle, or straight from a checkpoint.

A *reader* gives single tensors under the names of a bundle. :class:`Source` asks it for what rounding needs, a layer
or some rows of a vocabulary at a time, so both kinds of source give the same blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.ir.read_matrix import is_stored_as_rows
from shortstack.graphs.layer_weights import stored_shapes, table_parts
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.spec import ModelSpec
from shortstack.quant.float_tensors import float_tensors
from shortstack.quant.layers import Text

Floats = npt.NDArray[np.float32]
SLICE_ROWS = 4096
"""Rows of a vocabulary matrix that are read and rounded at a time."""


class Reader(Protocol):
    """Gives the tensors of a float bundle, one at a time, whether or not there is such a bundle.

    Names, types and shapes are those of :func:`shortstack.quant.float_tensors.float_tensors`.
    """

    @property
    def manifest(self) -> Manifest:
        """What bundle.json says, or would say, of the float bundle; its files do not matter."""

    @property
    def where(self) -> str:
        """The folder or file that the floats come from, for messages."""

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return a tensor as a bundle stores it, of any type."""

    def floats(self, name: str) -> Floats:
        """Return a tensor as a bundle stores it, in float32.

        Raises:
            ShortstackError: It cannot be read, or a value of it is not a finite number.
        """

    def matrix(self, name: str) -> Floats:
        """Return a matrix [out, in], C-contiguous float32; errors as in :meth:`floats`."""

    def rows(self, name: str, start: int, end: int) -> Floats:
        """Return some rows of a matrix [out, in] that a bundle stores as rows; errors as in :meth:`floats`."""

    @property
    def kept_names(self) -> frozenset[str]:
        """The matrices that are in blocks already and keep these as they are."""

    def kept(self, name: str) -> BlockTensor:
        """Return the blocks [out, in] of one of these; errors as in :meth:`floats`."""


class Source:
    """The floats of one model.

    Args:
        reader: Where they come from.

    Attributes:
        manifest: What bundle.json says of them.
        spec: The model.
        reader: Where they come from.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.manifest: Manifest = reader.manifest
        self.spec: ModelSpec = self.manifest.spec
        self._tensors = float_tensors(self.manifest)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, of a matrix [out, in]."""
        shape = self._tensors[name].shape
        return shape[::-1] if len(shape) == 2 and not is_stored_as_rows(name) else shape

    def floats(self, name: str) -> Floats:
        """Return a tensor as a bundle stores it, in float32."""
        return self.reader.floats(name)

    def matrix(self, name: str) -> Floats:
        """Return a matrix [out, in], C-contiguous float32."""
        return self.reader.matrix(name)

    def row_slices(self, name: str, start: int, end: int) -> Iterator[Floats]:
        """Yield the rows of a matrix that is stored as rows, :data:`SLICE_ROWS` at a time."""
        for first in range(start, end, SLICE_ROWS):
            yield self.reader.rows(name, first, min(first + SLICE_ROWS, end))

    def digest(self, name: str, start: int, end: int) -> bytes:
        """Return a hash of some rows of a matrix that is stored as rows."""
        digest = hashlib.sha256()
        for rows in self.row_slices(name, start, end):
            digest.update(np.ascontiguousarray(rows).data)
        return digest.digest()

    def layer_vectors(self, layer: int) -> list[str]:
        """Return the names of the tensors of a layer that are neither matrices nor tables."""
        shapes = stored_shapes(self.spec.weights(layer), self.spec.layers[layer].attention)
        return [names.layer_weight(layer, part) for part, shape in shapes.items() if len(shape) == 1]

    def tables(self, layer: int) -> list[str]:
        """Return the names of the tables of a layer whose rows are looked up."""
        return [names.layer_weight(layer, part) for part in table_parts(self.spec.weights(layer))]

    def layer(self, layer: int, text: Text | None = None) -> dict[str, Floats]:
        """Return the float tensors of a layer and the rotary tables, as they are stored, by name.

        Args:
            layer: Which layer.
            text: A text that the layer is to be run over. Of tables that are looked up, only its rows are returned;
                without a text the tables are left out.
        """
        shapes = stored_shapes(self.spec.weights(layer), self.spec.layers[layer].attention)
        own = [names.layer_weight(layer, part) for part in shapes]
        tables = self.tables(layer)
        found = {name: self.floats(name) for name in own if name not in tables}
        if text is not None:
            found |= {name: self.looked_up(name, text.used) for name in tables}
        return found | {name: self.floats(name) for name in names.rope_tables(len(self.spec.ropes))}

    def looked_up(self, name: str, ids: npt.NDArray[np.int64]) -> Floats:
        """Return the rows of some ids, [..., width], of a matrix that is stored as rows."""
        shape = self.shape(name)
        out = np.empty((ids.size, shape[1]), np.float32)
        flat = ids.reshape(-1)
        for start in range(0, shape[0], SLICE_ROWS):
            here = (flat >= start) & (flat < start + SLICE_ROWS)
            if here.any():
                out[here] = self.reader.rows(name, start, min(start + SLICE_ROWS, shape[0]))[flat[here] - start]
        return out.reshape(*ids.shape, shape[1])

    def embedded(self, rows: npt.NDArray[np.int64]) -> Floats:
        """Return what the first layer reads of whole texts: token ids [texts, seq] -> [texts, seq, hidden]."""
        return self.first_stream(self.looked_up(names.EMBED_TOKENS, rows))

    def text(self, rows: npt.NDArray[np.int64]) -> Text | None:
        """Return what branches on tokens read of whole texts [texts, seq]; None for a model without them."""
        if not self.spec.reads_tokens(range(self.spec.num_hidden_layers)):
            return None
        scale = np.float32(self.spec.ends.embed_scale)
        used, places = np.unique(rows, return_inverse=True)
        embeddings = self.looked_up(names.EMBED_TOKENS, rows) * scale
        return Text(places.reshape(rows.shape).astype(np.int64), embeddings, used)

    def first_stream(self, embeddings: Floats) -> Floats:
        """Return rows of the embedding [texts, seq, hidden] as the first layer reads them."""
        ends = self.spec.ends
        stream = embeddings if ends.embed_scale == 1.0 else embeddings * np.float32(ends.embed_scale)
        if ends.learned_positions:
            stream = stream + self.floats(names.EMBED_POSITIONS)[: stream.shape[1]]
        return stream

    def final_norm(self) -> dict[str, Floats]:
        """Return the weight of the final norm, and its bias if it has one, by name."""
        has_bias = self.spec.ends.final_norm.has_bias
        parts = (names.FINAL_NORM, names.FINAL_NORM_BIAS) if has_bias else (names.FINAL_NORM,)
        return {name: self.floats(name) for name in parts}
