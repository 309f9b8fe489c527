"""The float tensors of the bundle that is being quantized, one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import BundleError, RequestError
from shortstack.graphs.ir.finite import check_finite
from shortstack.graphs.ir.read import read_tensors
from shortstack.graphs.ir.read_matrix import is_stored_as_rows
from shortstack.graphs.spec import ModelSpec
from shortstack.quant.float_tensors import check_float_tensors
from shortstack.quant.layers import Text

_NOT_FINITE = "export the checkpoint again; if that is refused too, its weights are damaged"
Floats = npt.NDArray[np.float32]


class Source:
    """Reads a bundle's tensors.

    Args:
        bundle: The bundle.

    Attributes:
        bundle: The bundle.
        spec: Its model.

    Raises:
        RequestError: The bundle is quantized already.
        BundleError: A graph cannot be read, or tensors of the model are missing or of another shape.
    """

    def __init__(self, bundle: Bundle) -> None:
        precision = bundle.manifest.precision
        if not precision.is_float:
            raise RequestError(
                f"{bundle.folder} is quantized already",
                found=f"{len(precision.weights)} matrices in blocks, a cache of {precision.kv_cache}",
                expected="a bundle of fp32 or fp16 weights",
                remedy="quantize the bundle that it was made from, or export the checkpoint again",
            )
        self.bundle = bundle
        self.spec: ModelSpec = bundle.manifest.spec
        self._tensors = read_tensors(bundle)
        check_float_tensors(bundle, self._tensors)
        self._checked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return a tensor as it is stored.

        Raises:
            BundleError: No graph has it.
        """
        if name not in self._tensors:
            raise BundleError(
                f"{self.bundle.folder}: no graph has the tensor {name}", remedy="re-export the bundle with this version"
            )
        return self._tensors[name].numpy()

    def floats(self, name: str) -> Floats:
        """Return a tensor as it is stored, in float32.

        Raises:
            BundleError: A value of it is not a finite number.
        """
        found = np.asarray(self.array(name), np.float32)
        if name not in self._checked:
            check_finite(f"{self.bundle.folder}: tensor {name}", found, BundleError, _NOT_FINITE)
            self._checked.add(name)
        return found

    def matrix(self, name: str) -> Floats:
        """Return a matrix as [out, in], in float32."""
        stored = self.floats(name)
        return stored if is_stored_as_rows(name) else np.ascontiguousarray(stored.T)

    def layer(self, layer: int) -> dict[str, Floats]:
        """Return all float tensors of a layer and the rotary tables, as they are stored, by name."""
        prefix = names.layer_weight(layer, "")
        own = [name for name in self._tensors if name.startswith(prefix)]
        return {name: self.floats(name) for name in (*own, *names.rope_tables(len(self.spec.ropes)))}

    def embedded(self, rows: npt.NDArray[np.int64]) -> Floats:
        """Return what the first layer reads of whole texts: token ids [texts, seq] -> [texts, seq, hidden]."""
        return self.first_stream(self.floats(names.EMBED_TOKENS)[rows])

    def text(self, rows: npt.NDArray[np.int64]) -> Text | None:
        """Return what branches on tokens read of whole texts [texts, seq]; None for a model without them."""
        if not self.spec.reads_tokens(range(self.spec.num_hidden_layers)):
            return None
        scale = np.float32(self.spec.ends.embed_scale)
        return Text(rows, self.floats(names.EMBED_TOKENS)[rows] * scale)

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

    def exit_heads(self) -> Mapping[int, str]:
        """Return the name of each exit's own head tensor, by depth; exits that share the LM head have none."""
        depths = (e.exit_layer for e in self.bundle.manifest.plan.exits)
        own = {depth: names.exit_weight(depth, "head.weight") for depth in depths}
        return {depth: name for depth, name in own.items() if name in self._tensors}
