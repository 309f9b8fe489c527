"""Reads a model in the layout of Mistral's own code, as if it were a Hugging Face checkpoint of ``mistral``.

::

    params.json                  dim, n_layers, head_dim, ... (_PARAMS)
    consolidated.safetensors     the weights, or, with consolidated.safetensors.index.json, in shards
                                 consolidated-00001-of-00013.safetensors
    tekken.json                  the tokenizer, or tokenizer.model, also as tokenizer.model.v3

Mistral's code rotates the neighbouring columns (2i, 2i + 1) of a head. So the rows of wq and wk move to where
transformers has them. ``params.json`` says neither which token ends a text nor, often, how long a text may be. The end
is ``</s>``, if the vocabulary has it, and the length that of transformers' converter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from shortstack.export.checkpoint.checkpoint import Progress, StoredBlocks, StoredExit, hash_files, unknown_tensor
from shortstack.export.checkpoint.config import LARGEST_SIZE, Config, positive
from shortstack.export.checkpoint.gguf_transforms import unpermute
from shortstack.export.checkpoint.hf import HuggingFaceCheckpoint, read_config
from shortstack.export.checkpoint.tokenizer_files import complete_files
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.spec import ModelSpec

PARAMS_FILE = "params.json"
WEIGHTS_FILE = "consolidated.safetensors"
INDEX_FILE = "consolidated.safetensors.index.json"

_PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
"""transformers' name of each size."""
_NUMBERS = {"norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"}
_CONTEXTS = ("max_position_embeddings", "max_seq_len")
_OTHERS = ("sliding_window", "tied_embeddings", "model_type", "max_batch_size")
_CONTEXT = 32768
_MODULES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attention.w{role}": f"self_attn.{role}_proj" for role in "qkvo"},
    **{f"feed_forward.w{number}": f"mlp.{role}_proj" for number, role in ((1, "gate"), (2, "down"), (3, "up"))},
}
_ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
_END_OF_TEXT = "</s>"
_OTHER_LAYOUT = "export the same model in transformers' layout, with a config.json"


class ConsolidatedCheckpoint:
    """A folder with ``params.json`` and ``consolidated.safetensors``; the methods are those of ``Checkpoint``.

    Args:
        folder: The folder.
        source: The name that the user gave, if it is not the folder itself.
        follow_links: Follow links that lead out of the folder.

    Raises:
        CheckpointError: A file is missing, damaged or outside the folder, or a param is missing or wrong.
        UnsupportedError: A param asks for something that this version does not compute.
    """

    def __init__(self, folder: Path, source: str | None = None, *, follow_links: bool = False) -> None:
        self.source = str(folder) if source is None else source
        self.folder_or_file = folder
        params = read_config(folder, PARAMS_FILE, follow_links=follow_links)
        self.config = Config(hugging_face_config(params), f"{folder / PARAMS_FILE} as a config of mistral")
        self._stored = HuggingFaceCheckpoint(
            folder, source, follow_links=follow_links, weights=(WEIGHTS_FILE, INDEX_FILE), config=self.config
        )
        self._names = {_name(stored): stored for stored in sorted(self._stored.names())}
        if twice := sorted(self._stored.names() - set(self._names.values())):
            raise CheckpointError(
                f"{folder} holds {len(twice)} tensors under two names, such as {twice[0]} and {_name(twice[0])}",
                remedy="remove the file that does not belong to this model",
            )
        heads, kv_heads = (self.config.read(int, f"num_{kind}_heads") for kind in ("attention", "key_value"))
        self._rotated = {"q_proj": heads, "k_proj": kv_heads}

    def names(self) -> frozenset[str]:
        """Return transformers' names of all tensors; one that has none keeps its own, and is refused as extra."""
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return self._stored.shape(self._stored_name(name))

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Read one tensor as C-contiguous float32, the rows of q and k as transformers has them."""
        value = self._stored.tensor(self._stored_name(name))
        heads = self._rotated.get(name.split(".")[-2]) if name.startswith("model.layers.") else None
        return value if heads is None else np.ascontiguousarray(unpermute(value, heads))

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return None: this reader accepts only tensors that are stored as floats."""
        self._stored_name(name)
        return None

    def exits(self, spec: ModelSpec) -> tuple[StoredExit, ...]:
        """Return an empty tuple: the layout has no exits."""
        return ()

    def files(self) -> dict[str, bytes]:
        """Return the content of the tokenizer's files that exist, and always a generation config."""
        found = self._stored.stored_files()
        own_end = names.GENERATION_CONFIG_FILE in found
        files = complete_files(found, self.config, str(self.folder_or_file), is_resolved=False)
        if not own_end and (end := _end_of_text(files)) is not None:
            files[names.GENERATION_CONFIG_FILE] = (json.dumps({"eos_token_id": end}, indent=2) + "\n").encode()
        return files

    def digest(self, progress: Progress | None = None) -> str:
        """Return the SHA-256 over ``params.json`` and the weight files, each preceded by its name and size."""
        files = (self.folder_or_file / PARAMS_FILE, *self._stored.weight_files)
        return hash_files(files, label=True, progress=progress)

    def _stored_name(self, name: str) -> str:
        if name not in self._names:
            raise unknown_tensor(name, self.folder_or_file)
        return self._names[name]


def hugging_face_config(params: Config) -> dict[str, object]:
    """Return the fields of a ``config.json`` of ``mistral`` that ``params.json`` stands for.

    Raises:
        CheckpointError: A param is missing or has the wrong type or size.
        UnsupportedError: A param asks for something else than Mistral's dense layers.
    """
    kind = params.read(str, "model_type", "transformer")
    known = {*_PARAMS, *_NUMBERS, *_CONTEXTS, *_OTHERS}
    foreign = [name for name, value in params.data.items() if name not in known and value not in (None, False)]
    if kind != "transformer" or foreign:
        raise UnsupportedError(
            params.where("model_type") if kind != "transformer" else f"{params.file}: {', '.join(foreign[:10])}",
            found=repr(kind) if kind != "transformer" else "what may change what the model computes",
            expected="transformer" if kind != "transformer" else f"no more than {', '.join(sorted(known))}",
            remedy=_OTHER_LAYOUT,
        )
    config: dict[str, object] = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config |= {theirs: positive(params, ours) for ours, theirs in _PARAMS.items()}
    for ours, theirs in _NUMBERS.items():
        config[theirs] = params.read(float, ours)
    context = next((name for name in _CONTEXTS if name in params), None)
    config["max_position_embeddings"] = _CONTEXT if context is None else positive(params, context)
    config["sliding_window"] = _window(params)
    config["tie_word_embeddings"] = params.read(bool, "tied_embeddings", False)
    return config


def _window(params: Config) -> int | None:
    """Return how many positions each layer sees, a number or a text of digits; None for all."""
    value = params.data.get("sliding_window")
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value):
        value = int(value)
    if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
        raise params.wrong("sliding_window", "a positive number of positions, or null")
    return value


def _name(stored: str) -> str:
    """Return transformers' name of a tensor, or its own if transformers has none."""
    if (layer := _LAYER.fullmatch(stored)) is not None and layer[2] in _MODULES:
        return f"model.layers.{layer[1]}.{_MODULES[layer[2]]}.weight"
    end = _ENDS.get(stored.removesuffix(".weight"))
    return stored if end is None or not stored.endswith(".weight") else f"{end}.weight"


def _end_of_text(files: Mapping[str, bytes]) -> int | None:
    """Return the id of the token that ends a text; None where the vocabulary has none, or there is no tokenizer."""
    try:
        return Tokenizer.from_str(files[names.TOKENIZER_FILE].decode()).token_to_id(_END_OF_TEXT)
    except Exception:  # the library raises no narrower error; the export reports what is wrong with the file
        return None
