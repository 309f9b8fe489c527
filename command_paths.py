"""Wrong paths on the command line: what they are instead, and the very command to run.

An argument says what it must be by its type, :class:`BundlePath` or :class:`CheckpointPath`;
:class:`shortstack.command_options.Command` then calls :func:`check_paths` before the command runs. An error is one
line that ends with a command, quoted for a shell, that carries the options of the one that failed::

    error: x.gguf is a GGUF file and not a bundle. Run: shortstack export x.gguf x-bundle && shortstack inspect x-bundle

What passes may still be damaged: the readers of bundles and checkpoints look closer.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from shortstack.graphs import names
from shortstack.graphs.errors import BundleError, CheckpointError, RequestError
from shortstack.graphs.path_kind import (
    PathKind,
    bundle_name,
    export_command,
    is_hub_id,
    is_pickle,
    not_a_bundle,
    path_kind,
    shell_line,
    similar_path,
)
from shortstack.graphs.read_file import parse_json, read_file

_EXITS_FILE = "exits.json"  # describes trained exits, in a checkpoint's folder or elsewhere
_DEPTHS = {"SmolLM2-135M-Instruct.Q4_1.gguf": "8"}  # a good depth of an exit, by GGUF file; the default model's
_MOST_BYTES = 1 << 22  # of a file that is only looked at for advice
_UNKNOWN_DEPTH = "E"  # where nothing tells how many layers there are
_BUNDLES = (PathKind.BUNDLE,)
_MODEL_FILES = (PathKind.CHECKPOINT, PathKind.GGUF)
_PLACEHOLDER = "CHECKPOINT"  # where nothing tells which checkpoint was meant


class BundlePath(click.Path):
    """An argument that must be a bundle."""


class CheckpointPath(click.Path):
    """An argument that must be a checkpoint: a folder, a GGUF file or a hub id."""


def check_paths(context: click.Context) -> None:
    """Refuse arguments that are not what their types say, or that are swapped.

    Raises:
        BundleError: A bundle is wanted, and something else was given.
        CheckpointError: A checkpoint is wanted, and something else was given.
        RequestError: The arguments are swapped.
    """
    for argument in _arguments(context):
        value = str(context.params[argument.name])
        if isinstance(argument.type, BundlePath) and not value.strip():
            again = command_line(context, {argument.name: _metavar(argument)})
            raise BundleError(f"{_metavar(argument)} is empty: name the folder of a bundle. Run: {again}")
        if isinstance(argument.type, BundlePath) and path_kind(value) is not PathKind.BUNDLE:
            _refuse_if_swapped(context, argument)
            raise BundleError(_wrong_bundle(context, argument, value))
        if isinstance(argument.type, CheckpointPath):
            value = str(Path(value).expanduser()) if value.startswith("~/") else value
            kind = path_kind(value)
            if kind in (PathKind.BUNDLE, PathKind.ABSENT) and value.strip():
                _refuse_if_swapped(context, argument)
            if kind is PathKind.BUNDLE:
                raise CheckpointError(_bundle_as_checkpoint(context, argument, value))
            if remedy := _misspelled_checkpoint(context, argument, value, kind):
                raise CheckpointError(remedy)


def command_line(context: click.Context, replaced: Mapping[str, str] | None = None) -> str:
    """Return the command that is running, quoted for a shell.

    Args:
        context: Of the running command.
        replaced: Other values of arguments, by name.
    """
    values = {argument.name: str(context.params[argument.name]) for argument in _arguments(context)}
    values |= replaced or {}
    options = _given_options(context)
    arguments = list(values.values())
    if any(value.startswith("-") and value != "-" for value in arguments):
        return shell_line(context.command.name or "", *options, "--", *arguments)
    return shell_line(context.command.name or "", *arguments, *options)


def _arguments(context: click.Context) -> list[click.Argument]:
    """The arguments that were given, in their order."""
    arguments = [parameter for parameter in context.command.params if isinstance(parameter, click.Argument)]
    return [argument for argument in arguments if context.params.get(argument.name) is not None]


def _given_options(context: click.Context) -> list[str]:
    """The options of the command line, as they could have been written."""
    words: list[str] = []
    for option in context.command.params:
        if (
            not isinstance(option, click.Option)
            or context.get_parameter_source(option.name) is not ParameterSource.COMMANDLINE
        ):
            continue
        value: Any = context.params[option.name]
        flag = max(option.opts, key=len)
        if option.is_flag:
            words.append(flag if value else max(option.secondary_opts, key=len))
        else:
            for one in value if option.multiple else (value,):
                words += [flag, str(one)]
    return words


def _refuse_if_swapped(context: click.Context, wrong: click.Argument) -> None:
    """Refuse two arguments of which the second is what the first should be, and the first may be the second."""
    arguments = _arguments(context)
    if len(arguments) != 2 or wrong is not arguments[0]:
        return
    first, second = arguments
    given = {argument.name: str(context.params[argument.name]) for argument in arguments}
    kinds = [path_kind(value) for value in given.values()]
    swapped = command_line(context, {first.name: given[second.name], second.name: given[first.name]})
    if isinstance(first.type, BundlePath) and not _may_be_swapped_with_bundle(context, first, second):
        return
    if isinstance(first.type, CheckpointPath):
        if not kinds[1].is_model or (isinstance(second.type, BundlePath) and kinds[0] is not PathKind.BUNDLE):
            return
        if not isinstance(second.type, BundlePath) and kinds[1] is PathKind.HUB_ID:
            return  # the second is where to write, and that may be spelled like a hub id
        if not isinstance(second.type, BundlePath) and kinds[0] is PathKind.BUNDLE:
            if not context.params.get("overwrite"):
                swapped += " --overwrite"
            raise RequestError(
                f"{given[first.name]} is a bundle and {given[second.name]} is {kinds[1].value}: they are swapped. "
                f"To replace the bundle, run: {swapped}"
            )
        if _similar(context, first, _MODEL_FILES):
            return
    raise RequestError(f"{_metavar(first)} and {_metavar(second)} are swapped. Run: {swapped}")


def _may_be_swapped_with_bundle(context: click.Context, first: click.Argument, second: click.Argument) -> bool:
    """Whether the second argument is the bundle that the first should be; a mistyped first one is the likelier slip."""
    value = str(context.params[first.name])
    kind = path_kind(value)
    if path_kind(str(context.params[second.name])) is not PathKind.BUNDLE or kind in _MODEL_FILES:
        return False
    if _similar(context, first, _BUNDLES):
        return False
    if not isinstance(second.type, click.Path):
        return True  # a text that happens to be the path of a bundle
    if context.params.get("overwrite") or context.params.get("report_only"):
        return False  # OUT is known to exist
    return kind is PathKind.ABSENT or (kind is PathKind.FOLDER and not _bundles_in(Path(value)))


def _similar(context: click.Context, wrong: click.Argument, kinds: Container[PathKind]) -> Path | None:
    """Return what a path that does not exist may have been meant to be; never what another argument is already."""
    value = str(context.params[wrong.name])
    if path_kind(value) is not PathKind.ABSENT:
        return None
    others = [str(context.params[argument.name]) for argument in _arguments(context) if argument is not wrong]
    return similar_path(Path(value).expanduser() if value.startswith("~/") else value, kinds, others)


def _bundles_in(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if path_kind(child) is PathKind.BUNDLE)


def _wrong_bundle(context: click.Context, argument: click.Argument, value: str) -> str:
    """Say what was given where a bundle belongs, and the command to run."""
    kind = path_kind(value)
    path = Path(value)
    if kind is PathKind.FILE and path_kind(path.parent) in (PathKind.BUNDLE, PathKind.CHECKPOINT):
        value, kind = str(path.parent), path_kind(path.parent)  # a file in the folder that was meant
    if kind is PathKind.BUNDLE:
        return f"{path} is a file in a bundle. Run: {command_line(context, {argument.name: value})}"
    if kind.is_model:
        return f"{not_a_bundle(path)}. Run: {_export_first(context, argument, value)}"
    if kind is PathKind.FOLDER and (inside := _bundles_in(path)):
        listed = ", ".join(child.name for child in inside[:5])
        again = command_line(context, {argument.name: str(inside[0])})
        return f"{not_a_bundle(path)}, but it holds bundles ({listed}). Run: {again}"
    if kind is PathKind.ABSENT and (similar := _similar(context, argument, _BUNDLES)):
        return f"{not_a_bundle(path)}; {similar} does. Run: {command_line(context, {argument.name: str(similar)})}"
    out = value if kind is PathKind.ABSENT else bundle_name(value)
    export = export_command(_PLACEHOLDER, out, *_exit_options(context, _PLACEHOLDER))
    return f"{not_a_bundle(path)}. Make one: {export} && {command_line(context, {argument.name: out})}"


def _export_first(context: click.Context, argument: click.Argument, source: str) -> str:
    """Return the command that makes a bundle of a checkpoint and then does what was asked for."""
    out = bundle_name(source)
    again = command_line(context, {argument.name: out})
    if path_kind(out) is PathKind.BUNDLE:  # most likely made by this very advice
        return again
    return f"{export_command(source, out, *_exit_options(context, source))} && {again}"


def _exit_options(context: click.Context, source: str) -> list[str]:
    """Return the exits that a bundle of a checkpoint needs for the running command."""
    given = set(context.params.get("exit_layers") or ())
    strategy = context.params.get("strategy")
    needs_exit = context.params.get("compare") or strategy not in (None, "plain") or context.command.name == "calibrate"
    options: list[str] = []
    if given:
        trained = _trained_depths(source)
        if given & trained:
            options, given = ["--exits", source], given - trained
        depths = [str(depth) for depth in sorted(given)]
    elif needs_exit and Path(source, _EXITS_FILE).is_file():
        return ["--exits", source]
    else:
        depths = [_draft_depth(source)] if needs_exit else []
    return [*options, *(word for depth in depths for word in ("--exit-layer", depth))]


def _trained_depths(folder: str) -> set[int]:
    """Return the depths of the exits in a folder; none if it cannot be told."""
    try:
        return {int(one["exit_layer"]) for one in _read_json(Path(folder, _EXITS_FILE))["exits"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _draft_depth(source: str) -> str:
    """Return a good depth of an exit where it is sure to work, a quarter of the layers; else the letter E.

    In models whose layers use keys and values of other layers, not every depth works.
    """
    if path_kind(source) is PathKind.GGUF:
        return _DEPTHS.get(Path(source).name, _UNKNOWN_DEPTH)
    try:
        config = _read_json(Path(source, "config.json"))
        layers = config["num_hidden_layers"]
        is_plain = config["model_type"] == "llama" and "kv_map" not in config
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _UNKNOWN_DEPTH
    if type(layers) is not int or layers < 2 or not is_plain:
        return _UNKNOWN_DEPTH
    return str(max(1, layers // 4))


def _read_json(path: Path) -> Any:
    """Return the value of a JSON file, for advice only; one that cannot be read, or is a pipe, is a ValueError."""
    try:
        return parse_json(read_file(path, RequestError, limit=_MOST_BYTES), path, RequestError)
    except RequestError as error:
        raise ValueError(str(error)) from None


def _bundle_as_checkpoint(context: click.Context, argument: click.Argument, value: str) -> str:
    """Say what to do with a bundle where a checkpoint belongs."""
    said = f"{value} is a bundle and not a checkpoint"
    source = _made_from(value)
    again = command_line(context, {argument.name: source or _PLACEHOLDER})
    if context.command.name == "export" and not _given_options(context):
        shrink = shell_line("quantize", value, str(context.params["out"]))
        return f"{said}. To cut it elsewhere, export the checkpoint that it was made from; to shrink it, run: {shrink}"
    if source is None:
        return f"{said}. Give the checkpoint that it was made from: {again}"
    return f"{said}; it was made from {source}. Run: {again}"


def _made_from(bundle: str) -> str | None:
    """Return the checkpoint of a bundle where its name leads to one: a hub id, or a path from here or beside it."""
    try:
        source = str(_read_json(Path(bundle, names.MANIFEST_FILE))["source"]["name"]).partition(" + ")[0]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for place in (Path(source), Path(bundle).parent / source):
        if path_kind(place) in _MODEL_FILES:
            return str(place)
    return source if is_hub_id(source) else None


def _misspelled_checkpoint(context: click.Context, argument: click.Argument, value: str, kind: PathKind) -> str | None:
    """Say which checkpoint was meant by a path that is none; None where the reader of checkpoints knows better."""
    path = Path(value)
    if kind is PathKind.FILE and path_kind(path.parent) is PathKind.CHECKPOINT and not is_pickle(path):
        folder = command_line(context, {argument.name: str(path.parent)})
        return f"{value} is a file in a checkpoint: give the folder. Run: {folder}"
    if kind is PathKind.ABSENT and (similar := _similar(context, argument, _MODEL_FILES)):
        again = command_line(context, {argument.name: str(similar)})
        return f"{value} does not exist; {similar} does. Run: {again}"
    return None


def _metavar(argument: click.Argument) -> str:
    return (argument.name or "").upper()
