"""Fetches a model from the Hugging Face hub: its config, its tokenizer's files and its safetensors, nothing else.

Where there are no safetensors under transformers' names, those under Mistral's are fetched. Where there are none at all
and pickles may be read, these are.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shortstack.export.checkpoint.resolved_tokenizer import MORE_FILES
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.names import TEXT_FILES

# `*` also matches `/`: the prefix keeps copies in subfolders, such as original/model.safetensors, from being fetched.
_PATTERNS = ("config.json", *TEXT_FILES, *MORE_FILES, "model*.safetensors", "model.safetensors.index.json")
_MISTRAL_PATTERNS = ("params.json", "consolidated*.safetensors", "consolidated.safetensors.index.json")
_PICKLE_PATTERNS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def download(repo_id: str, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """Return the folder of a snapshot in the hub's cache, fetching what is not there yet.

    Args:
        repo_id: ``organisation/name``.
        revision: Branch, tag or commit; the default branch without it.
        allow_pickle: Fetch pickles if there are no safetensors.

    Raises:
        CheckpointError: There is no such model or revision, it is gated, or the hub cannot be reached.
    """
    what = f"{repo_id} at {revision}" if revision else repo_id
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(_PATTERNS)))
        for more in (_MISTRAL_PATTERNS, _PICKLE_PATTERNS if allow_pickle else ()):
            if more and not any(folder.glob("*.safetensors")):
                patterns = [*_PATTERNS, *more]
                folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        return folder
    except GatedRepoError:
        raise CheckpointError(
            f"{what} is gated on the hub",
            remedy=f"accept its licence at https://huggingface.co/{repo_id}, then run `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{what} is neither a local folder nor a model on the hub",
            remedy="check the spelling; if the model is private, run `hf auth login` first",
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{repo_id} has no revision {revision!r} on the hub",
            remedy=f"choose one of https://huggingface.co/{repo_id}/tree/main, or leave --revision out",
        ) from None
    except HFValidationError as error:
        raise CheckpointError(
            f"{what} is not a valid hub id ({_first_line(error)})",
            expected="organisation/name",
            remedy="check the spelling",
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{what} is not a local folder, is not in the hub's cache, and the hub cannot be reached",
            remedy="connect to the internet, or name a folder or .gguf file on disk",
        ) from None
    except (OSError, ValueError, RuntimeError) as error:  # network, full disk, a proxy's answer
        raise CheckpointError(
            f"{what} cannot be fetched from the hub ({_first_line(error)})",
            remedy="check the connection and the disk, then run the command again",
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
