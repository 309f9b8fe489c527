"""The types of float tensors that are read from safetensors files, by the names that the format has for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np
import numpy.typing as npt

FLOAT_TYPES: Mapping[str, npt.DTypeLike] = MappingProxyType(
    {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,  # importing ml_dtypes is also what lets safetensors' numpy API return bfloat16
    }
)
