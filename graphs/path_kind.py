"""What a path is: a bundle, a checkpoint, a GGUF file, something else, or nothing; by names only, nothing is read.

For error messages and for the readers that must choose: :func:`shortstack.graphs.bundle.open_bundle` and
:func:`shortstack.export.checkpoint.open_checkpoint`. What is a bundle by its names may still be a damaged one.
"""

from __future__ import annotations

import difflib
import enum
import itertools
import os
import re
import shlex
from collections.abc import Container, Iterable
from pathlib import Path

from shortstack.graphs import names

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CHECKPOINT_FILES = (
    "config.json",
    "model*.safetensors",
    "consolidated*.safetensors",
    "*.gguf",
    "pytorch_model*.bin",
    "consolidated.*.pth",
    names.GENAI_CONFIG_FILE,
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""How the names of torch.save files end."""
_MEGATRON_FILES = ("latest_checkpointed_iteration.txt", "mp_rank_*", "iter_*/mp_rank_*", "release/mp_rank_*")
_MOST_NEIGHBOURS = 1000  # of a path that does not exist are looked at


class PathKind(enum.Enum):
    """What a path is; the value reads well after "is"."""

    BUNDLE = "a bundle"
    CHECKPOINT = "a checkpoint"
    GGUF = "a GGUF file"
    FILE = "a file"
    FOLDER = "a folder without a model"
    HUB_ID = "a model id of the hub"
    ABSENT = "not there"

    @property
    def is_model(self) -> bool:
        """Whether it can be exported."""
        return self in (PathKind.CHECKPOINT, PathKind.GGUF, PathKind.HUB_ID)


def path_kind(path: str | Path) -> PathKind:
    """Return what a path is.

    What does not exist is a hub id where it is spelled like one and its first part is not a folder here.
    """
    if os.path.isdir(path):
        return _folder_kind(Path(path))
    if os.path.isfile(path):
        return PathKind.GGUF if Path(path).suffix.lower() == ".gguf" else PathKind.FILE
    if is_hub_id(str(path)) and not Path(path).parent.exists():
        return PathKind.HUB_ID
    return PathKind.ABSENT


def _folder_kind(folder: Path) -> PathKind:
    if (folder / names.MANIFEST_FILE).exists():
        return PathKind.BUNDLE
    if any(any(folder.glob(pattern)) for pattern in _CHECKPOINT_FILES) or looks_like_megatron(folder):
        return PathKind.CHECKPOINT
    return PathKind.FOLDER


def looks_like_megatron(folder: Path) -> bool:
    """Whether a folder is a checkpoint that Megatron saved, or one iteration of it, complete or not."""
    return any(any(folder.glob(pattern)) for pattern in _MEGATRON_FILES)


def is_consolidated(folder: Path) -> bool:
    """Whether a folder holds a model as Mistral saves it, and not also, completely or not, as transformers does."""
    names_of_transformers = ("model.safetensors", "model.safetensors.index.json")
    has_other = (folder / "config.json").exists() and any((folder / name).exists() for name in names_of_transformers)
    has_params = (folder / "params.json").exists() or not (folder / "config.json").exists()
    return has_params and not has_other and any(folder.glob("consolidated*.safetensors"))


def is_pickle(path: str | Path) -> bool:
    """Whether a file's name is that of a torch.save file."""
    return Path(path).suffix.lower() in PICKLE_SUFFIXES


def is_hub_id(source: str) -> bool:
    """Whether a text is spelled like a model id of the hub, ``organisation/name``."""
    return _HUB_ID.fullmatch(source) is not None and not source.lower().endswith((".gguf", ".safetensors"))


def bundle_name(source: str | Path) -> str:
    """Return a name for the bundle of a checkpoint, in the current folder: ``x-bundle`` for ``models/x.gguf``."""
    path = Path(source)
    name = path.name if path.name not in ("", "..") else Path(os.path.abspath(path)).name
    return f"{name.removesuffix('.gguf') or 'model'}-bundle"


def similar_path(path: str | Path, kinds: Container[PathKind], excluded: Iterable[str | Path] = ()) -> Path | None:
    """Return what lies where a path that does not exist would lie, is of these kinds, and has a similar name.

    Args:
        path: The path that does not exist.
        kinds: What it should be.
        excluded: Paths that it was not meant to be, however similar they are.
    """
    missing = Path(path)
    taken = {os.path.abspath(each) for each in excluded}
    try:
        with os.scandir(missing.parent) as entries:
            neighbours = [entry.name for entry in itertools.islice(entries, _MOST_NEIGHBOURS)]
    except (OSError, ValueError):
        return None
    for name in difflib.get_close_matches(missing.name, neighbours, n=3):
        found = missing.parent / name
        if path_kind(found) in kinds and os.path.abspath(found) not in taken:
            return found
    return None


def export_command(source: str | Path, out: str | Path, *options: str) -> str:
    """Return the command that makes a bundle, quoted for a shell."""
    return shell_line("export", str(source), str(out), *options)


def shell_line(*words: str) -> str:
    """Return a shortstack command on one line, quoted for a shell."""
    return " ".join(("shortstack", *map(_quote, words)))


def _quote(word: str) -> str:
    """Quote a word for a shell; what would break the line is escaped as bash and zsh do it."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(
        each if each.isprintable() and each not in "\\'" else each.encode("unicode_escape").decode().replace("'", "\\'")
        for each in word
    )
    return f"$'{escaped}'"


def not_a_bundle(path: str | Path) -> str:
    """Return what is wrong with a path that should be a bundle, as a clause."""
    kind = path_kind(path)
    if kind is PathKind.ABSENT:
        return f"{path} does not exist"
    if kind is PathKind.HUB_ID:
        return f"{path} does not exist, and a model of the hub is not a bundle yet"
    if kind is PathKind.FOLDER:
        return f"{path} is not a bundle: it has no {names.MANIFEST_FILE}"
    return f"{path} is {kind.value} and not a bundle"
