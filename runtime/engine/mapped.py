"""Arrays whose memory is taken when it is first written."""

from __future__ import annotations

import mmap

import numpy as np


def mapped_zeros(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
    """Return an array of zeros whose pages are taken when they are written."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, size, flags=flags) if hasattr(mmap, "MAP_PRIVATE") else mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page, 2 MB, would be taken for the first position of each head
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
