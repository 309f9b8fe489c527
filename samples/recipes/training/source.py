"""What a recipe starts from: a checkpoint as ``export`` reads it, or a config and a tokenizer to start from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.arch import ARCHITECTURES
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.config import Config, not_one_of, parse_json_object
from shortstack.export.checkpoint.hf import member
from shortstack.export.checkpoint.tokenizer_files import complete_files
from shortstack.export.twin.folder import read_passes, twin_of
from shortstack.export.twin.model import Twin
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError, RequestError
from shortstack.graphs.names import TEXT_FILES
from shortstack.graphs.read_file import read_file, read_json_object

_INITIAL_STD = 0.02  # of normal weights, transformers' default for initializer_range


@dataclass(frozen=True, slots=True)
class Source:
    """The model to train.

    Attributes:
        name: What to call it in a report: no path.
        twin: The model.
        files: The tokenizer's files.
        tokenizer: Text to ids.
        end: Ids that end a text: the first one that the generation config names.
    """

    name: str
    twin: Twin
    files: Mapping[str, bytes]
    tokenizer: Tokenizer
    end: tuple[int, ...]

    def copy(self) -> Twin:
        """Return a second twin with the same weights."""
        twin = Twin(self.twin.spec, self.twin.rope_factors)
        twin.passes = self.twin.passes
        twin.load_state_dict(self.twin.state_dict())
        return twin


def open_source(
    checkpoint: str, *, from_scratch: bool, adapter: Path | None = None, allow_pickle: bool = False
) -> Source:
    """Open what a recipe starts from.

    Args:
        checkpoint: A folder, a GGUF file or a hub id; from scratch a folder with ``config.json`` and the tokenizer.
        from_scratch: Draw random weights.
        adapter: A LoRA adapter to merge first.
        allow_pickle: Read tensors from pickles.

    Raises:
        CheckpointError: It cannot be read, or has no tokenizer.
        UnsupportedError: It is of a kind this version does not know.
    """
    if from_scratch and adapter is not None:
        raise RequestError("--adapter", expected="no --from-scratch: there is nothing to merge it into")
    if from_scratch:
        twin, files = _fresh(Path(checkpoint))
    else:
        opened = open_checkpoint(checkpoint, allow_pickle=allow_pickle)
        if adapter is not None:
            opened = AdaptedCheckpoint(opened, adapter)
        twin, files = twin_of(opened), opened.files()
    if names.TOKENIZER_FILE not in files:
        raise CheckpointError(f"{checkpoint} has no {names.TOKENIZER_FILE}", remedy="save the tokenizer next to it")
    try:
        tokenizer = Tokenizer.from_str(files[names.TOKENIZER_FILE].decode())
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{checkpoint}: {names.TOKENIZER_FILE} is not a tokenizer: {error}") from None
    generation = parse_json_object(files[names.GENERATION_CONFIG_FILE], Path(names.GENERATION_CONFIG_FILE))
    end = generation.get("eos_token_id")
    ids = end if isinstance(end, list) else [end]
    name = Path(checkpoint).name if Path(checkpoint).exists() else checkpoint
    return Source(name, twin, files, tokenizer, tuple(i for i in ids[:1] if isinstance(i, int)))


def _fresh(folder: Path) -> tuple[Twin, dict[str, bytes]]:
    config_file = member(folder, "config.json") if folder.is_dir() else None
    if config_file is None:
        raise CheckpointError(
            f"{folder} has no config.json", remedy="name a folder with config.json and tokenizer.json"
        )
    config = Config(read_json_object(config_file, CheckpointError), str(config_file))
    model_type = config.read(str, "model_type")
    if model_type not in ARCHITECTURES:
        raise not_one_of(config.where("model_type"), model_type, ARCHITECTURES)
    twin = Twin(ARCHITECTURES[model_type].read_spec(config))
    twin.passes = read_passes(config)
    std = config.read(float, "initializer_range", _INITIAL_STD)
    if std <= 0:
        raise config.wrong("initializer_range", "a positive number")
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.ndim == 2:
                # Outputs of a block are scaled by depth (GPT-2): the residual stream stays of one size.
                deep = (
                    (2 * twin.spec.num_hidden_layers) ** -0.5
                    if name.endswith(("o_proj.weight", "down_proj.weight"))
                    else 1.0
                )
                parameter.normal_(0.0, std * deep)
            elif name.endswith("bias"):
                parameter.zero_()
    found = {
        name: read_file(path, CheckpointError) for name in TEXT_FILES if (path := member(folder, name)) is not None
    }
    return twin, complete_files(found, config, str(folder))
