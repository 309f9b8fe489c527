"""Opens any checkpoint, a folder of one of several kinds, a hub id or a GGUF file, behind one interface."""

from __future__ import annotations

from pathlib import Path

from shortstack.export.checkpoint.checkpoint import Checkpoint, Progress
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.names import GENAI_CONFIG_FILE
from shortstack.graphs.path_kind import PathKind, is_consolidated, is_hub_id, is_pickle, looks_like_megatron, path_kind

__all__ = ["Checkpoint", "Config", "Progress", "open_checkpoint"]


def open_checkpoint(
    source: str, *, revision: str | None = None, follow_links: bool = False, allow_pickle: bool = False
) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        source: A folder with ``config.json`` and safetensors, a folder with Mistral's ``params.json`` and safetensors,
            a ``.gguf`` file, a folder with one, a folder that Megatron or EE-LLM saved to, or one that
            onnxruntime-genai runs. With ``allow_pickle`` also a folder with ``pytorch_model.bin``, its shards, or one
            other file of torch.save, or that file itself, next to its ``config.json``. Otherwise a hub id such as
            ``HuggingFaceTB/SmolLM2-135M-Instruct``, which is downloaded into the hub's cache. A path that exists on
            disk is never looked up on the hub.
        revision: Branch, tag or commit of a hub id.
        follow_links: Follow links that lead out of a folder. Those of the hub's cache are always followed.
        allow_pickle: Read tensors from pickles, where there are no safetensors. Code in them is never run.

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
        return _open_file(path, source, follow_links, allow_pickle)
    if is_folder:
        return _open_folder(path, source, follow_links, allow_pickle)
    if not is_hub_id(source):
        raise CheckpointError(
            f"{source!r} does not exist and is not a hub id",
            expected="a folder, a .gguf file or organisation/name",
            remedy="check the path",
        )
    from shortstack.export.checkpoint.hub import download

    folder = download(source, revision, allow_pickle=allow_pickle)
    if is_consolidated(folder):
        return _consolidated(folder, source)
    return _hugging_face(folder, source, allow_pickle=allow_pickle)


def _open_file(path: Path, source: str, follow_links: bool, allow_pickle: bool) -> Checkpoint:
    if is_pickle(path):
        from shortstack.export.checkpoint.hf import PICKLED_INDEX_FILE, only_pickles

        if not allow_pickle:
            raise only_pickles(f"{path} is a pickle")
        return _hugging_face(path.parent, source, follow_links, allow_pickle, (path.name, PICKLED_INDEX_FILE))
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{path} is a file", expected="a .gguf file or a folder", remedy="name the folder that holds config.json"
        )
    return _gguf(path, source)


def _open_folder(path: Path, source: str, follow_links: bool, allow_pickle: bool) -> Checkpoint:
    if path_kind(path) is PathKind.BUNDLE:
        raise CheckpointError(
            f"{path} is a bundle", expected="a checkpoint", remedy="name the checkpoint that it was made from"
        )
    gguf_files = sorted(path.glob("*.gguf"))
    has_safetensors = any(path.glob("*.safetensors"))
    is_complete = has_safetensors and (path / "config.json").exists()  # else they may be the exits of a checkpoint
    if not gguf_files and not is_complete and looks_like_megatron(path):
        return _megatron(path, source, follow_links)
    if (path / GENAI_CONFIG_FILE).exists() and not has_safetensors and not gguf_files:
        return _genai(path, source, follow_links)
    if is_consolidated(path):
        return _consolidated(path, source, follow_links)
    names_weights = any(map(is_pickle, path.glob("*"))) or any(path.glob("*.index.json"))
    if not gguf_files and not has_safetensors and not names_weights:
        _refuse_foreign_graph(path, follow_links)
    if not gguf_files or has_safetensors:
        return _hugging_face(path, source, follow_links, allow_pickle)
    if len(gguf_files) > 1:
        listed = ", ".join(file.name for file in gguf_files[:5])
        raise CheckpointError(f"{path} holds {len(gguf_files)} .gguf files ({listed})", remedy="name one of them")
    return _gguf(gguf_files[0], source)


def _gguf(file: Path, source: str) -> Checkpoint:
    from shortstack.export.checkpoint.gguf import GgufCheckpoint

    return GgufCheckpoint(file, source)


def _genai(folder: Path, source: str, follow_links: bool) -> Checkpoint:
    from shortstack.export.checkpoint.genai import GenaiCheckpoint

    return GenaiCheckpoint(folder, source, follow_links=follow_links)


def _refuse_foreign_graph(folder: Path, follow_links: bool) -> None:
    from shortstack.export.checkpoint.foreign_graph import graphs_in, refusal

    if graphs := graphs_in(folder):
        raise refusal(folder, graphs[0], follow_links=follow_links)


def _megatron(folder: Path, source: str, follow_links: bool) -> Checkpoint:
    from shortstack.export.checkpoint.megatron import MegatronCheckpoint

    return MegatronCheckpoint(folder, source, follow_links=follow_links)


def _consolidated(folder: Path, source: str, follow_links: bool = False) -> Checkpoint:
    from shortstack.export.checkpoint.consolidated import ConsolidatedCheckpoint

    return ConsolidatedCheckpoint(folder, source, follow_links=follow_links)


def _hugging_face(
    folder: Path,
    source: str,
    follow_links: bool = False,
    allow_pickle: bool = False,
    weights: tuple[str, str] | None = None,
) -> Checkpoint:
    from shortstack.export.checkpoint.hf import HuggingFaceCheckpoint
    from shortstack.export.checkpoint.quantized import dequantizable

    return dequantizable(
        HuggingFaceCheckpoint(folder, source, follow_links=follow_links, allow_pickle=allow_pickle, weights=weights)
    )
