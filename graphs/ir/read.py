"""The tensors of a bundle's graphs, by name, read lazily from its weights.data."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import BundleError


def read_tensors(bundle: Bundle) -> Mapping[str, ir.TensorProtocol]:
    """Return every external tensor of a bundle; values are mapped from the file when they are asked for.

    Raises:
        BundleError: A graph cannot be read, or refers to another file than the bundle's own weights.data.
    """
    found: dict[str, ir.TensorProtocol] = {}
    for segment in bundle.manifest.plan.segments:
        path = bundle.graph_path(segment)
        try:
            model = ir.load(path)
        except Exception as error:  # protobuf's own errors have no common base
            raise BundleError(f"{path} is not an ONNX graph: {error}", remedy="re-export the bundle") from None
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if str(tensor.location) != names.WEIGHTS_FILE:  # a path out of the folder, perhaps
                raise BundleError(
                    f"{path}: tensor {name} lies in another file",
                    found=repr(str(tensor.location)),
                    expected=names.WEIGHTS_FILE,
                    remedy="re-export the bundle",
                )
            found.setdefault(name, tensor)
    return found
