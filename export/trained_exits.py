"""Reads and writes a folder of trained exits. Reading trusts nothing; writing leaves a complete file or none.

The two files may share the folder of a checkpoint, next to ``config.json`` and ``model.safetensors``::

    exits.json           {"format_version": 1, "hidden_size", "vocab_size", "num_hidden_layers",
                          "exits": [every field of ExitSpec], ascending}
    exits.safetensors    the tensors of :mod:`shortstack.graphs.exit_parts`, matrices [out, in]

Each file is written under a temporary name and then renamed, the weights first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shortstack.export.checkpoint.float_types import FLOAT_TYPES
from shortstack.export.checkpoint.hf import member
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError, RequestError
from shortstack.graphs.exit_parts import HEAD_IDS, exit_parts
from shortstack.graphs.layer_weights import Shape
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.read_file import parse_json_object, read_file
from shortstack.graphs.spec import ModelSpec

EXITS_FILE = "exits.json"
EXIT_WEIGHTS_FILE = "exits.safetensors"
FORMAT_VERSION = 1
_FITS = ("hidden_size", "vocab_size", "num_hidden_layers")  # fields that must equal those of the model
_MAX_JSON_BYTES = 1 << 20
_RETRAIN = "write the folder again with the recipe that created it"

Array = npt.NDArray[Any]


def read_exits(folder: str | Path, spec: ModelSpec) -> tuple[tuple[ExitSpec, ...], dict[str, Array]]:
    """Read and check a folder of exits.

    Args:
        folder: The folder.
        spec: The model that the exits are for.

    Returns:
        The exits, ascending, and their tensors by :func:`names.exit_weight`: float32, C-contiguous, matrices [out, in];
        ids int64.

    Raises:
        CheckpointError: A file is missing, damaged, outside the folder, or for a model of other sizes. Or a tensor is
            missing, unknown, misshapen, not finite, or not ascending token ids; the message lists all such tensors.
    """
    folder = Path(folder)
    exits = _read_specs(_required(folder, EXITS_FILE), spec)
    shapes = {
        names.exit_weight(e.exit_layer, part): shape for e in exits for part, shape in exit_parts(spec, e).items()
    }
    if not shapes and member(folder, EXIT_WEIGHTS_FILE) is None:
        return exits, {}
    return exits, _read_tensors(_required(folder, EXIT_WEIGHTS_FILE), shapes, spec)


def write_exits(
    folder: str | Path,
    spec: ModelSpec,
    exits: Sequence[ExitSpec],
    tensors: Mapping[str, Array],
    *,
    dtype: npt.DTypeLike = np.float16,
) -> None:
    """Write a folder of exits; other files in it stay.

    Whenever this stops, ``exits.json`` describes the weights beside it, or is not there.

    Args:
        folder: The folder to write; created if it does not exist.
        spec: The model that the exits are for.
        exits: The exits, ascending.
        tensors: Their weights, as :func:`read_exits` returns them.
        dtype: Type of the stored floats.

    Raises:
        CheckpointError: :func:`read_exits` would refuse the exits, for instance because a value does not fit
            ``dtype``, or the folder cannot be written.
    """
    folder = Path(folder)
    described = {
        "format_version": FORMAT_VERSION,
        **{name: getattr(spec, name) for name in _FITS},
        "exits": [asdict(e) for e in exits],
    }
    shapes = {
        names.exit_weight(e.exit_layer, part): shape for e in exits for part, shape in exit_parts(spec, e).items()
    }
    partial = {name: folder / f".{name}.partial-{os.getpid()}" for name in (EXIT_WEIGHTS_FILE, EXITS_FILE)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: _stored(name, array, dtype) for name, array in tensors.items()}, partial[EXIT_WEIGHTS_FILE])
        partial[EXITS_FILE].write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        _read_specs(partial[EXITS_FILE], spec)
        _read_tensors(partial[EXIT_WEIGHTS_FILE], shapes, spec)
        (folder / EXITS_FILE).unlink(missing_ok=True)  # so that it never describes the weights of other exits
        for name, path in partial.items():
            os.replace(path, folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error})", remedy="choose another folder") from None
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _stored(name: str, array: Array, dtype: npt.DTypeLike) -> Array:
    with np.errstate(over="ignore"):  # a value that does not fit becomes infinite and is refused below
        kind = np.int64 if name.endswith(f".{HEAD_IDS}") else dtype
        return np.ascontiguousarray(array, dtype=kind).reshape(array.shape)


def _required(folder: Path, name: str) -> Path:
    path = member(folder, name)
    if path is None:
        raise CheckpointError(
            f"{folder} has no {name}", remedy="name the folder that a recipe of samples/recipes wrote its exits to"
        )
    return path


def _read_specs(path: Path, spec: ModelSpec) -> tuple[ExitSpec, ...]:
    content = read_file(path, CheckpointError, _RETRAIN, limit=_MAX_JSON_BYTES)
    data = parse_json_object(content, path, CheckpointError, _RETRAIN)
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: field format_version",
            found=repr(version),
            expected=FORMAT_VERSION,
            remedy="train the exits again, or install the shortstack version that wrote them",
        )
    if data.keys() != {"format_version", *_FITS, "exits"}:
        fields = ", ".join(sorted(data.keys() ^ {"format_version", *_FITS, "exits"}))
        raise CheckpointError(f"{path}: missing or unknown fields: {fields}", remedy=_RETRAIN)
    wrong = [name for name in _FITS if type(data[name]) is not int or data[name] != getattr(spec, name)]
    if wrong:
        raise CheckpointError(
            f"{path} is for another model",
            found=", ".join(f"{name} = {data[name]!r}" for name in wrong),
            expected=", ".join(f"{getattr(spec, name)}" for name in wrong),
            remedy="name the exits that were trained for this checkpoint",
        )
    if not isinstance(data["exits"], list) or not data["exits"]:
        raise CheckpointError(f"{path}: field exits", expected="a list of at least one exit", remedy=_RETRAIN)
    exits = tuple(_read_spec(path, entry, spec) for entry in data["exits"])
    layers = [e.exit_layer for e in exits]
    if sorted(set(layers)) != layers:
        raise CheckpointError(f"{path}: depths", found=layers, expected="each once, ascending", remedy=_RETRAIN)
    return exits


def _read_spec(path: Path, entry: object, spec: ModelSpec) -> ExitSpec:
    try:
        exit_spec = ExitSpec.from_json(entry)  # type: ignore[arg-type]  # checks that it is a mapping
    except (ValueError, RequestError) as error:
        raise CheckpointError(f"{path}: {error}", remedy=_RETRAIN) from None
    if not 0 < exit_spec.exit_layer < spec.num_hidden_layers:
        raise CheckpointError(
            f"{path}: exit_layer", found=exit_spec.exit_layer, expected=f"1..{spec.num_hidden_layers - 1}"
        )
    if exit_spec.draft_vocab is not None and not 2 <= exit_spec.draft_vocab <= spec.vocab_size:
        raise CheckpointError(
            f"{path}: draft_vocab", found=exit_spec.draft_vocab, expected=f"null or 2..{spec.vocab_size}"
        )
    return exit_spec


def _read_tensors(path: Path, shapes: Mapping[str, Shape], spec: ModelSpec) -> dict[str, Array]:
    found: dict[str, Array] = {}
    problems: list[str] = []
    try:
        with safe_open(path, framework="np") as file:
            stored = set(file.keys())
            problems += [f"{name} is missing" for name in sorted(shapes.keys() - stored)]
            problems += [f"{name} belongs to no exit" for name in sorted(stored - shapes.keys())]
            for name in sorted(shapes.keys() & stored):
                part = file.get_slice(name)
                shape, kind = tuple(part.get_shape()), str(part.get_dtype())
                is_ids = name.endswith(f".{HEAD_IDS}")
                if shape != shapes[name]:
                    problems.append(f"{name} is {list(shape)}, not {list(shapes[name])}")
                elif kind not in (("I64",) if is_ids else FLOAT_TYPES):
                    problems.append(f"{name} has the type {kind}")
                else:
                    array = file.get_tensor(name)
                    found[name] = array if is_ids else np.ascontiguousarray(array, np.float32).reshape(shape)
                    if is_ids and not _are_ids(array, spec.vocab_size):
                        problems.append(f"{name} is not ascending token ids below {spec.vocab_size}")
                    elif not is_ids and not np.isfinite(found[name]).all():
                        problems.append(f"{name} has values that are not finite")
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error})", remedy=_RETRAIN) from None
    if problems:
        shown = "; ".join(problems[:10]) + (f"; {len(problems) - 10} more" if len(problems) > 10 else "")
        raise CheckpointError(f"{path}: {shown}", remedy=_RETRAIN)
    return found


def _are_ids(ids: Array, vocab_size: int) -> bool:
    return bool(ids[0] >= 0 and ids[-1] < vocab_size and (ids[1:] > ids[:-1]).all())
