"""What a run that was killed had finished: kept beside its weights, so that the same command goes on from there.

::

    .OUT.partial-PROCESS/
        weights.data       the layers so far, and perhaps a part of the next one, which is dropped
        unfinished.json    whose work it is (a hash of source, options and versions), how many layers are whole, hashes
        stream-N.npz       the calibration text after N layers, where a method looks at text

A layer counts when unfinished.json says so, which is replaced at once, after everything that it names is on the disk.
Nothing is taken over whose hash differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.errors import BundleError, ShortstackError
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.read_file import read_json_object
from shortstack.graphs.write_file import replace_file
from shortstack.quant.methods.stats import InputStats
from shortstack.quant.rounding import Stream
from shortstack.quant.side_product import Fate

_CHUNK_BYTES = 1 << 22


@dataclasses.dataclass(slots=True)
class Unfinished:
    """The state of one run in one folder.

    Attributes:
        folder: Where the bundle is being written.
        key: Whose work it is, as :func:`work_key` says.
        layers: How many layers are whole.
        store_contents: What the weight store held after them; None for none.
        errors: Relative errors of rounded matrices so far.
        fates: Fates of fine-tunings so far.
        is_damaged: Whether something of the same work was found that is not as it was, so that all begins anew.
    """

    folder: Path
    key: str
    layers: int = 0
    store_contents: Mapping[str, Any] | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    fates: dict[str, Fate] = dataclasses.field(default_factory=dict)
    is_damaged: bool = False
    _hashes: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    _stream: str | None = None

    @classmethod
    def open(cls, folder: Path, key: str) -> Unfinished:
        """Return what a folder holds of the work with this key: nothing where anything of it is not as it was."""
        path = folder / names.UNFINISHED_FILE
        found = cls(folder, key)
        if path.is_file():
            try:
                found._read(read_json_object(path, BundleError, "remove it"))
            except (ShortstackError, OSError, ValueError, KeyError, TypeError):
                found = cls(folder, key, is_damaged=True)
        return found

    def restore(self, stream: Stream | None) -> None:
        """Put the calibration text where it was after the finished layers."""
        if stream is None or self._stream is None:
            return
        with np.load(self.folder / self._stream, allow_pickle=False) as file:
            for name in file.files:
                kind, _, rest = name.partition(".")
                if kind == "hidden":
                    stream.hidden = file[name]
                elif kind == "lent":
                    layer, part = rest.split(".")
                    stream.lent.setdefault(int(layer), {})[part] = file[name]
                elif kind == "exit":
                    depth, count = rest.split(".")
                    stream.exit_stats[int(depth)] = InputStats(file[name], int(count))

    def save(self, layers: int, store: WeightStore, stream: Stream | None) -> None:
        """Put on the disk that so many layers are whole."""
        contents = store.contents()
        start = self._hashes[-1][0] if self._hashes else 0
        self._hashes.append((contents["bytes"], _hash(self.folder / names.WEIGHTS_FILE, start, contents["bytes"])))
        before, self._stream = self._stream, None
        digest = None
        if stream is not None:
            lent = {f"lent.{layer}.{part}": kv for layer, parts in stream.lent.items() for part, kv in parts.items()}
            seen = {f"exit.{depth}.{stats.count}": stats.gram for depth, stats in stream.exit_stats.items()}
            self._stream = f"stream-{layers}.npz"
            path = self.folder / self._stream
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, hidden=stream.hidden, **lent, **seen)
                file.flush()
                os.fsync(file.fileno())
            digest = _hash(path, 0, path.stat().st_size)
        state = {
            "key": self.key,
            "layers": layers,
            "store": contents,
            "hashes": self._hashes,
            "stream": self._stream,
            "stream_sha256": digest,
            "errors": self.errors,
            "fates": self.fates,
        }
        replace_file(self.folder / names.UNFINISHED_FILE, json.dumps(state).encode())
        if before is not None:
            (self.folder / before).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove what is not part of the bundle."""
        (self.folder / names.UNFINISHED_FILE).unlink(missing_ok=True)
        for pattern in ("stream-*.npz", ".*.partial-*"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def _read(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: It is of other work, or something of it is not as it was.
        """
        weights, start = self.folder / names.WEIGHTS_FILE, 0
        if state["key"] != self.key:
            raise ValueError("other work")
        for end, digest in state["hashes"]:
            if _hash(weights, start, end) != digest:
                raise ValueError("other bytes")
            start = end
        stream = state["stream"]
        if stream is not None:
            if stream != f"stream-{state['layers']}.npz":
                raise ValueError("another file")
            path = self.folder / stream
            if _hash(path, 0, path.stat().st_size) != state["stream_sha256"]:
                raise ValueError("another stream")
        self.layers, self.store_contents, self._stream = int(state["layers"]), state["store"], stream
        self.errors, self.fates = dict(state["errors"]), dict(state["fates"])
        self._hashes = [(end, digest) for end, digest in state["hashes"]]


def work_key(*parts: object) -> str:
    """Return a hash of all that decides what a run writes: anything whose ``repr`` says all of it, and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogateescape")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _hash(path: Path, start: int, end: int) -> str:
    """Return the sha256 of some bytes of a file.

    Raises:
        ValueError: The file ends before.
    """
    digest, left = hashlib.sha256(), end - start
    with path.open("rb") as file:
        file.seek(start)
        while left > 0:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ValueError(f"{path} is too short")
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
