"""Finds and opens the files of a Megatron checkpoint; EE-LLM saves its models in the same form.

::

    latest_checkpointed_iteration.txt             a number, or "release"
    iter_0001000/  or  release/
        mp_rank_{tp:02d}/model_optim_rng.pt           one file per tensor-parallel rank, or, with a pipeline,
        mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt  one per rank and stage
    tokenizer.json ...                            not saved by Megatron: the user adds it for shortstack

The files are pickles. Only torch's restricted unpickler opens them. It builds tensors and plain containers and calls
nothing else, with two additions: :class:`argparse.Namespace`, which holds the model's options, and :class:`Ignored`,
which replaces the other objects that Megatron saves. Tensors are memory-mapped, so an optimizer's state is never read.
No link may lead out of the folder.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shortstack.graphs.errors import CheckpointError, UnsupportedError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_MAX_RANKS = 4096  # a damaged file must not make us list billions of names
_MAX_TRACKER_BYTES = 64
_MAX_LISTED = 8
_REFUSED = re.compile(r"GLOBAL (\S+)")  # how torch names what it does not allow


class Ignored:
    """Replaces an object that Megatron saves and no model needs: accepts any arguments, and keeps and does nothing."""

    def __new__(cls, *_: object) -> Ignored:
        """Accept any arguments."""
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_IGNORED = (
    "megatron.core.enums.ModelType",  # args.model_type, in every checkpoint that a training run saved
    # rng_state holds the state of numpy's generator; in numpy 2 the module has another name
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
)
_ALLOWED: list[Any] = [argparse.Namespace, *((Ignored, name) for name in _IGNORED)]

Find = Callable[[Path, str], Path | None]
"""Returns the path of a file in a folder, or None; refuses links that lead out of the folder."""


@dataclass(frozen=True, slots=True)
class RankFile:
    """One open file.

    Attributes:
        path: Its path.
        args: The model's options, untrusted like everything else.
        model: Tensors in nested dicts, memory-mapped.
        version: The file's ``checkpoint_version``.
    """

    path: Path
    args: Mapping[str, object]
    model: object
    version: object


def iteration_folder(folder: Path, find: Find) -> Path:
    """Return the folder that holds the ranks: the one that the tracker file names, or the folder itself.

    Raises:
        CheckpointError: The tracker file is missing, damaged or outside the folder, or names a folder without ranks.
    """
    if any(folder.glob("mp_rank_*")):
        return folder
    tracker = find(folder, TRACKER_FILE)
    if tracker is None:
        raise CheckpointError(
            f"{folder} has no {TRACKER_FILE} to say which of {', '.join(_iterations(folder)[:_MAX_LISTED])} to read",
            remedy="name one of these folders",
        )
    try:
        with tracker.open("rb") as file:
            content = file.read(_MAX_TRACKER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{tracker} cannot be read ({error.strerror})") from None
    text = content.decode("ascii", "replace").strip()
    if text != "release" and not re.fullmatch(r"[0-9]{1,12}", text):
        raise CheckpointError(f"{tracker}", found=repr(text), expected="the number of an iteration, or release")
    found = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not any(found.glob("mp_rank_*")):
        raise CheckpointError(
            f"{tracker} names {found.name}, and there is no such folder with mp_rank_* in it",
            found=", ".join(_iterations(folder)[:_MAX_LISTED]) or "none",
            remedy="copy the whole checkpoint, or name the folder of one iteration",
        )
    return found


def open_first(home: Path, folder: Path, find: Find) -> RankFile:
    """Open the file of the first rank.

    Args:
        home: The folder that no link may lead out of.
        folder: The folder of the ranks.
        find: Returns the path of a file in a folder.

    Raises:
        CheckpointError: The file is missing or damaged.
        UnsupportedError: It holds objects that are not unpickled.
    """
    for name in ("mp_rank_00", "mp_rank_00_000"):
        if (path := find(home, str((folder / name / RANK_FILE).relative_to(home)))) is not None:
            return _open(path)
    raise CheckpointError(
        f"{folder} has no mp_rank_00/{RANK_FILE} and no mp_rank_00_000/{RANK_FILE}",
        remedy="copy the whole checkpoint; Megatron's newer formats (torch_dist, zarr) cannot be read",
    )


def open_all(
    home: Path, folder: Path, first: RankFile, find: Find, ranks: int, stages: int
) -> tuple[tuple[RankFile, ...], ...]:
    """Open the files of all ranks.

    Args:
        home: The folder that no link may lead out of.
        folder: The folder of the ranks.
        first: The file of the first rank.
        find: Returns the path of a file in a folder.
        ranks: Number of tensor-parallel ranks.
        stages: Number of pipeline stages.

    Returns:
        The files of each stage, one per rank.

    Raises:
        CheckpointError: Files are missing, extra or damaged.
        UnsupportedError: A file holds objects that are not unpickled.
    """
    if not (ranks > 0 and stages > 0 and ranks * stages <= _MAX_RANKS):
        raise CheckpointError(
            f"{first.path}: args.tensor_model_parallel_size and args.pipeline_model_parallel_size",
            found=f"{ranks} and {stages}",
            expected=f"1 or more each, and at most {_MAX_RANKS} files",
        )
    has_stages = first.path.parent.name != "mp_rank_00"
    wanted = [
        [f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if has_stages else "") for rank in range(ranks)]
        for stage in range(stages if has_stages else 1)
    ]
    paths = [
        [find(home, str((folder / name / RANK_FILE).relative_to(home))) for name in names_of_stage]
        for names_of_stage in wanted
    ]
    flat = [name for names_of_stage in wanted for name in names_of_stage]
    missing = [name for name, path in zip(flat, (p for row in paths for p in row), strict=True) if path is None]
    extra = sorted({path.name for path in folder.glob("mp_rank_*")} - set(flat))
    if missing or extra or (stages > 1 and not has_stages):
        what = [
            f"{len(some)} {word} ({_listed(some)})" for some, word in ((missing, "missing"), (extra, "extra")) if some
        ]
        hint = "; EE-Tuning saves only the stages it trains: add the others from the checkpoint that was tuned"
        is_tuned = first.args.get("tune_exit", False) is True and bool(missing)
        raise CheckpointError(
            f"{folder} does not hold one {RANK_FILE} for each of {ranks} tensor-parallel ranks in {stages} pipeline "
            f"stages, as its args say{': ' if what else ''}{', '.join(what)}",
            remedy="copy the whole checkpoint" + (hint if is_tuned else ""),
        )
    return tuple(
        tuple(first if path == first.path else _open(path) for path in row if path is not None) for row in paths
    )


def _open(path: Path) -> RankFile:
    remedy = "copy it again, and compare its size with the one at the source"
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a complete torch.save file",
            expected="a zip archive, as torch 1.6 and later write",
            remedy=remedy,
        )
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile file can make torch raise nearly anything
        if (refused := _REFUSED.search(str(error))) is not None:
            raise UnsupportedError(
                f"{path} holds a {refused[1].rstrip('.')}, and unpickling one may run code",
                expected="tensors, numbers, strings and an argparse.Namespace",
                remedy="load a checkpoint you trust where it was made, and save it again without that object",
            ) from None
        raise CheckpointError(
            f"{path} is not a complete torch.save file ({(str(error) or type(error).__name__).splitlines()[0]})",
            remedy=remedy,
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("args"), argparse.Namespace):
        raise CheckpointError(
            f"{path} is not a checkpoint of Megatron", expected="a dict with args, an argparse.Namespace, and model"
        )
    return RankFile(path, vars(content["args"]), content.get("model"), content.get("checkpoint_version"))


def _iterations(folder: Path) -> list[str]:
    found = (path.parent.name for pattern in ("iter_*", "release") for path in folder.glob(f"{pattern}/mp_rank_*"))
    return sorted(set(found))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (
        f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    )
