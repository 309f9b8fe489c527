"""The floats of a bundle that is being quantized, mapped from its weights.data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import BundleError, RequestError
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.ir.finite import check_finite
from shortstack.graphs.ir.read import read_tensors
from shortstack.graphs.ir.read_matrix import is_stored_as_rows
from shortstack.graphs.manifest import Manifest
from shortstack.quant.float_tensors import check_float_tensors

Floats = npt.NDArray[np.float32]
_NOT_FINITE = "export the checkpoint again; if that is refused too, its weights are damaged"


class BundleFloats:
    """Reads a bundle's tensors; the methods are those of :class:`shortstack.quant.source.Reader`.

    Args:
        bundle: The bundle.

    Attributes:
        bundle: The bundle.

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
        self._tensors = read_tensors(bundle)
        check_float_tensors(bundle, self._tensors)
        self._checked: set[str] = set()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def where(self) -> str:
        """The bundle's folder."""
        return str(self.bundle.folder)

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return a tensor as it is stored, of any type.

        Raises:
            BundleError: No graph has it.
        """
        if name not in self._tensors:
            raise BundleError(
                f"{self.bundle.folder}: no graph has the tensor {name}", remedy="re-export the bundle with this version"
            )
        return self._tensors[name].numpy()

    def floats(self, name: str) -> Floats:
        """Return a tensor as it is stored, in float32."""
        found = np.asarray(self.array(name), np.float32)
        if name not in self._checked:
            check_finite(f"{self.bundle.folder}: tensor {name}", found, BundleError, _NOT_FINITE)
            self._checked.add(name)
        return found

    def matrix(self, name: str) -> Floats:
        """Return a matrix [out, in], in float32."""
        stored = self.floats(name)
        return stored if is_stored_as_rows(name) else np.ascontiguousarray(stored.T)

    def rows(self, name: str, start: int, end: int) -> Floats:
        """Return some rows of a matrix that is stored as rows, in float32."""
        found = np.asarray(self.array(name)[start:end], np.float32)
        check_finite(f"{self.bundle.folder}: tensor {name}", found, BundleError, _NOT_FINITE)
        return found

    @property
    def kept_names(self) -> frozenset[str]:
        """Nothing: no matrix of a float bundle is in blocks."""
        return frozenset()

    def kept(self, name: str) -> BlockTensor:
        """Not called: there is nothing."""
        raise KeyError(name)
