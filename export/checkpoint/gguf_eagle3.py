"""EAGLE-3 heads as llama.cpp's converter writes them (``conversion/llama.py``, ``src/models/eagle3.cpp``).

Its names become those of EAGLE's own checkpoints, and its metadata their config. Three things differ from these: rows
of q and k are permuted, as Llama's are; ``d2t`` holds token ids instead of offsets; and the layers that are read are
always depths, the number of layers run before. https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shortstack.export.checkpoint.gguf import GgufCheckpoint
from shortstack.export.checkpoint.gguf_family import ROTATED, GgufFamily
from shortstack.export.checkpoint.gguf_model import GgufModel
from shortstack.export.checkpoint.gguf_names import EAGLE3_DEPTHS, EAGLE3_IDS, LLAMA_NAMES

_LAYERS = ("target_layers", "extract_layers")  # the second name is the older one
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "fc": "fc",
        "output_norm": "norm",
        "output": "lm_head",
        "token_embd": "embed_tokens",
        **{
            stem: name.replace("model.layers.{layer}", "midlayer")
            for stem, name in LLAMA_NAMES.items()
            if stem.startswith("blk.")
        },
        "blk.{layer}.attn_norm_2": "midlayer.hidden_norm",
    }
)


def _fields(model: GgufModel, config: Mapping[str, Any]) -> dict[str, object]:
    if config["num_hidden_layers"] != 1:
        raise model.unsupported("block_count", "an EAGLE-3 head of several layers", 1)
    found = next((key for key in _LAYERS if model.key(key) in model.metadata.data), _LAYERS[0])
    depths = model.metadata.data.get(model.key(found))
    if not isinstance(depths, list) or not depths or not all(type(depth) is int for depth in depths):
        raise model.metadata.wrong(model.key(found), "a list of the depths that the head reads")
    return {
        "eagle_aux_hidden_state_layer_ids": depths,
        EAGLE3_DEPTHS: True,
        EAGLE3_IDS: True,
        "norm_before_residual": model.read(bool, "norm_before_residual", False),
    }


DRAFTERS: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "eagle3": GgufFamily(
            model_type="llama",
            transformers_class="LlamaForCausalLMEagle3",
            names=_NAMES,
            transforms=ROTATED,
            fixed={"hidden_act": "silu"},
            is_drafter=True,
            extend=_fields,
        )
    }
)
"""By ``general.architecture``."""


def open_gguf_drafter(file: Path, source: str) -> GgufCheckpoint:
    """Open a GGUF file of a drafter; errors as of :class:`GgufCheckpoint`."""
    return GgufCheckpoint(file, source, DRAFTERS)
