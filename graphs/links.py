"""Which links may be followed: those that stay in a folder, and those of the hub's own cache, in any of its forms.

The cache keeps a model as ``models--org--name/snapshots/COMMIT/``, a folder of links into ``models--org--name/blobs/``.
Either folder may itself be a link, to a larger disk for instance. A folder that only looks like a cache may have a link
``blobs`` to any place, so there a file must have the name of a blob: the hash of its content.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a path in a folder, with all links followed, lies in it or in the blobs that belong to it.

    Args:
        path: The path, which need not exist.
        folder: The folder that the user named.

    Raises:
        OSError: Links lead in a circle, or a folder cannot be looked at.
    """
    target = Path(os.path.realpath(path, strict=path.exists()))
    resolved = Path(os.path.realpath(folder))
    snapshots = [at for at in (Path(os.path.abspath(folder)), resolved) if at.parent.name == "snapshots"]
    return target.is_relative_to(resolved) or any(_is_blob(target, at.parent.parent) for at in snapshots)


def _is_blob(target: Path, model: Path) -> bool:
    """Whether a file lies in the blobs of a model in the cache; where those lie elsewhere, its name must be a hash."""
    blobs = Path(os.path.realpath(model / "blobs"))
    is_beside = blobs == Path(os.path.realpath(model)) / "blobs"
    return target.parent == blobs and (is_beside or _BLOB.fullmatch(target.name) is not None)
