"""A bundle on disk: open one with its checks, or write one so that a killed export leaves nothing half-done.

Knows nothing about ONNX or tensors; sizes, hashes and names only.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shortstack.graphs import names
from shortstack.graphs.errors import BundleError
from shortstack.graphs.exchange import exchange
from shortstack.graphs.links import stays_inside
from shortstack.graphs.manifest import FileEntry, Manifest, read_manifest, with_files
from shortstack.graphs.path_kind import PathKind, bundle_name, export_command, not_a_bundle, path_kind
from shortstack.graphs.plan import Segment
from shortstack.graphs.write_file import replace_file

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest."""

    folder: Path
    manifest: Manifest

    def graph_path(self, segment: Segment, *, is_packed: bool = False) -> Path:
        """Return the ONNX file of one segment."""
        file = names.packed_file if is_packed else names.segment_file
        return self.folder / file(segment.start, segment.end)


def open_bundle(folder: str | Path, *, verify_hashes: bool = False) -> Bundle:
    """Open a bundle and check its files against bundle.json, which may all be links, as in the hub's cache.

    A link that leads elsewhere than there is followed if what it leads to has the hash that bundle.json says: a bundle
    of somebody else must not read files whose content he does not know.

    Args:
        folder: The bundle.
        verify_hashes: Also hash every file; takes about a second per gigabyte.

    Raises:
        BundleError: Naming every file that is missing, of another size, or (on request) of another hash.
    """
    folder = Path(folder)
    if (kind := path_kind(folder)) is not PathKind.BUNDLE:
        made_of = (folder, bundle_name(folder)) if kind.is_model else ("CHECKPOINT", "OUT")
        remedy = f"make a bundle with `{export_command(*made_of, '--exit-layer', 'E')}`"
        raise BundleError(not_a_bundle(folder), remedy=remedy)
    manifest = read_manifest(folder / names.MANIFEST_FILE)
    problems: list[str] = []
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, bundle.json says {entry.bytes}")
        elif (verify_hashes or _leads_out(path, folder)) and sha256_file(path) != entry.sha256:
            problems.append(f"{name} has another sha256 than bundle.json says")
    if problems:
        raise BundleError(
            f"{folder}: {'; '.join(problems)}", remedy="copy the bundle again as a whole, or re-export it"
        )
    return Bundle(folder, manifest)


def _leads_out(path: Path, folder: Path) -> bool:
    return path.is_symlink() and not stays_inside(path, folder)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_files(folder: Path, only: Container[str] | None = None) -> dict[str, FileEntry]:
    """Return size and hash of the files in a folder, by default of all except bundle.json."""
    return {
        path.name: FileEntry(path.stat().st_size, sha256_file(path))
        for path in sorted(folder.iterdir())
        if path.name != names.MANIFEST_FILE and (only is None or path.name in only)
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json."""
    _write_json(folder / names.MANIFEST_FILE, manifest.to_json())


def check_writable(folder: Path) -> None:
    """Check that files can be put into a bundle; cheap, so that it can be asked before long work.

    Raises:
        OSError: They cannot.
    """
    with tempfile.TemporaryFile(dir=folder):  # permissions tell nothing of a read-only disk, nor root of permissions
        pass


def put_file(bundle: Bundle, name: str, content: bytes) -> Bundle:
    """Add a file to a finished bundle, or replace one that a bundle can be without, such as a report.

    Whenever this stops, bundle.json describes what is there: it forgets the file before the file changes, and lists it
    again afterwards. Nothing else in bundle.json changes, its format version included.

    Args:
        bundle: The bundle as it is on disk.
        name: The file.
        content: What it will hold.

    Returns:
        The bundle with the file.

    Raises:
        BundleError: bundle.json cannot be read any more.
        OSError: The folder cannot be written.
    """
    path, files = bundle.folder / names.MANIFEST_FILE, bundle.manifest.files
    others = {other: entry for other, entry in files.items() if other != name}
    entry = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    written = dict(sorted({**others, name: entry}.items()))
    after = with_files(path, written)
    if name in files:
        _write_json(path, with_files(path, others))
    replace_file(bundle.folder / name, content)
    _write_json(path, after)
    return Bundle(bundle.folder, replace(bundle.manifest, files=written))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def staged_folder(out: Path, *, overwrite: bool = False, work: str | None = None) -> Iterator[Path]:
    """Yield an empty sibling of ``out``; give it the name ``out`` when the block ends, remove it when it raises.

    Whenever this stops, the name stands for the whole bundle before or for the whole one after.

    Args:
        out: Where the bundle will be. May exist as an empty folder.
        overwrite: Replace an existing bundle there. Anything that is not a bundle is never replaced.
        work: A hash of what is being done. What a killed process has left of the very same work is yielded as it is,
            not empty: :data:`names.UNFINISHED_FILE` in it has the field ``key``. Everything else is removed.

    Raises:
        BundleError: ``out`` is in the way, or its folder cannot be written.
    """
    out = Path(os.path.abspath(out))
    staging = out.parent / f".{out.name}.partial-{os.getpid()}"
    is_found = work is not None and _take_over(out, staging, work)
    _clear_up(out, staging if is_found else None)
    try:
        check_free(out, overwrite)
    except BundleError:
        if is_found:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=is_found)
    except OSError as error:
        raise BundleError(f"{out.parent} cannot be written: {error}", remedy="choose another folder") from None
    try:
        yield staging
        _put_in_place(staging, out, overwrite)
    except OSError as error:  # a full disk names no file
        raise BundleError(f"{out} cannot be written: {error}", remedy="make room, or choose another folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _take_over(out: Path, staging: Path, work: str) -> bool:
    """Give what a killed process has left of the same work the name of this process; return whether there was any."""
    for partial in sorted(out.parent.glob(f".{glob.escape(out.name)}.partial-*")):
        if partial.is_symlink() or not _is_abandoned(partial):
            continue
        # Another process may be as quick, and a damaged file may hold anything.
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            state = json.loads((partial / names.UNFINISHED_FILE).read_bytes())
            if state.get("key") == work:
                partial.rename(staging)
                return True
    return False


def _put_in_place(staging: Path, out: Path, overwrite: bool) -> None:
    """Give a finished folder its name; what had it is removed afterwards, and is whole until then.

    Without ``overwrite`` a bundle that came there meanwhile stays: a folder can be renamed onto an empty one only.
    """
    try:
        check_free(out, overwrite)  # once more: the export took its time
        if not overwrite or not out.exists():
            staging.rename(out)
        elif not exchange(staging, out):
            _set_aside(staging, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise BundleError(
                f"{out} was written by another process meanwhile", remedy="choose another name, or pass --overwrite"
            ) from None
        raise BundleError(f"{out} cannot be put in place: {error}", remedy="choose another folder") from None


def _set_aside(staging: Path, out: Path) -> None:
    """Replace a bundle by two renames; between them only ``.OUT.old-PROCESS`` is there: see :func:`_clear_up`."""
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    if out.exists():
        out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_up(out: Path, taken_over: Path | None) -> None:
    """Restore the bundle that a killed process had set aside, and remove what nobody goes on with."""
    name = glob.escape(out.name)
    for old in sorted(out.parent.glob(f".{name}.old-*")):
        if _is_abandoned(old):
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(out)
    for partial in out.parent.glob(f".{name}.partial-*"):
        if partial != taken_over and _is_abandoned(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    process = path.name.rpartition("-")[2]
    return not process.isdecimal() or not _is_running(int(process))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def check_free(out: Path, overwrite: bool) -> None:
    """Check that a bundle may be written to ``out``; cheap, so that it can be asked before long work.

    Raises:
        BundleError: Something is in the way.
    """
    out = Path(os.path.abspath(out))
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise BundleError(f"{out} exists and is not a folder", remedy="choose another name")
    if out == Path.cwd():
        raise BundleError(f"{out} is the current folder", remedy="choose another name, or run from another folder")
    if not any(out.iterdir()):
        return
    if not (out / names.MANIFEST_FILE).is_file():
        raise BundleError(f"{out} is a folder with other files in it", remedy="choose another name")
    if not overwrite:
        raise BundleError(f"{out} already holds a bundle", remedy="pass --overwrite to replace it")
