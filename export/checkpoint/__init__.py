"""Opens any checkpoint: a Hugging Face or Megatron folder, a hub id or a GGUF file, all behind one interface."""

from __future__ import annotations

from pathlib import Path

from shortstack.export.checkpoint.checkpoint import Checkpoint, Progress
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.path_kind import PathKind, is_hub_id, looks_like_megatron, path_kind

__all__ = ["Checkpoint", "Config", "Progress", "open_checkpoint"]


def open_checkpoint(source: str, *, revision: str | None = None, follow_links: bool = False) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        source: A folder with ``config.json`` and safetensors, a ``.gguf`` file, a folder with one ``.gguf`` file, or a
            folder that Megatron or EE-LLM saved to. Otherwise a hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``,
            which is downloaded into the hub's cache. A path that exists on disk is never looked up on the hub.
        revision: Branch, tag or commit of a hub id.
        follow_links: Follow links that lead out of a folder. Those of the hub's cache are always followed.

    Raises:
        CheckpointError: There is no such checkpoint, it cannot be fetched, or it is damaged.
        UnsupportedError: This version cannot read its form.
    """
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        raise CheckpointError(f"{source!r} cannot be read ({error})", remedy="check the path") from None
    if is_file:
        return _open_file(path, source)
    if is_folder:
        return _open_folder(path, source, follow_links)
    if not is_hub_id(source):
        raise CheckpointError(
            f"{source!r} does not exist and is not a hub id",
            expected="a folder, a .gguf file or organisation/name",
            remedy="check the path",
        )
    from shortstack.export.checkpoint.hub import download

    return _hugging_face(download(source, revision), source)


def _open_file(path: Path, source: str) -> Checkpoint:
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{path} is a file", expected="a .gguf file or a folder", remedy="name the folder that holds config.json"
        )
    return _gguf(path, source)


def _open_folder(path: Path, source: str, follow_links: bool) -> Checkpoint:
    if path_kind(path) is PathKind.BUNDLE:
        raise CheckpointError(
            f"{path} is a bundle", expected="a checkpoint", remedy="name the checkpoint that it was made from"
        )
    gguf_files = sorted(path.glob("*.gguf"))
    has_safetensors = any(path.glob("*.safetensors"))
    is_complete = has_safetensors and (path / "config.json").exists()  # else they may be the exits of a checkpoint
    if not gguf_files and not is_complete and looks_like_megatron(path):
        return _megatron(path, source, follow_links)
    if not gguf_files or has_safetensors:
        return _hugging_face(path, source, follow_links)
    if len(gguf_files) > 1:
        listed = ", ".join(file.name for file in gguf_files[:5])
        raise CheckpointError(f"{path} holds {len(gguf_files)} .gguf files ({listed})", remedy="name one of them")
    return _gguf(gguf_files[0], source)


def _gguf(file: Path, source: str) -> Checkpoint:
    from shortstack.export.checkpoint.gguf import GgufCheckpoint

    return GgufCheckpoint(file, source)


def _megatron(folder: Path, source: str, follow_links: bool) -> Checkpoint:
    from shortstack.export.checkpoint.megatron import MegatronCheckpoint

    return MegatronCheckpoint(folder, source, follow_links=follow_links)


def _hugging_face(folder: Path, source: str, follow_links: bool = False) -> Checkpoint:
    from shortstack.export.checkpoint.hf import HuggingFaceCheckpoint

    return HuggingFaceCheckpoint(folder, source, follow_links=follow_links)
