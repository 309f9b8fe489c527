"""Which links may be followed: those that stay in a folder, and those of the hub's own cache, in any of its forms.

The cache keeps a model as ``models--org--name/snapshots/COMMIT/``, a folder of links into ``models--org--name/blobs/``.
Either folder may itself be a link, to a larger disk for instance.
"""

from __future__ import annotations

import os
from pathlib import Path


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a path in a folder, with all links followed, lies in it or in the blobs that belong to it.

    Args:
        path: The path, which need not exist.
        folder: The folder that the user named.

    Raises:
        OSError: Links lead in a circle, or a folder cannot be looked at.
    """
    target = Path(os.path.realpath(path, strict=path.exists()))
    return any(target.is_relative_to(home) for home in _homes(folder))


def _homes(folder: Path) -> list[Path]:
    """Return the folders that files may lie in: the folder, and the blobs of the cache that it is a snapshot of."""
    resolved = Path(os.path.realpath(folder))
    snapshots = [at for at in (Path(os.path.abspath(folder)), resolved) if at.parent.name == "snapshots"]
    return [resolved, *(Path(os.path.realpath(at.parent.parent / "blobs")) for at in snapshots)]
