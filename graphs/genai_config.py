"""genai_config.json: how onnxruntime-genai runs the uncut model of a bundle.

onnxruntime-genai allocates one cache for each of ``num_hidden_layers``, ``[batch, num_key_value_heads, max_length,
head_size]``, and numbers them from 0. So here these are the layers that own a cache, and ``head_size`` is the width in
the cache. Where the shapes of caches differ, it takes them from the graph. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shortstack.graphs import names
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.kv_map import producers
from shortstack.graphs.spec import ModelSpec

GENERIC_TYPE = "decoder"
"""The type of any decoder-only model. Those that are named after a family also have what only that family's own graphs
need: phi3, for example, runs the whole text again when it grows beyond 4096 tokens."""

DEFAULT_LENGTH = 4096
"""The longest text unless the caller asks for more: the caches are allocated for all of it at once."""

_SAMPLING: Mapping[str, type | tuple[type, ...]] = {
    "temperature": (int, float),
    "top_k": int,
    "top_p": (int, float),
    "repetition_penalty": (int, float),
}


@dataclass(frozen=True, slots=True)
class TextEnds:
    """The tokens around a text.

    Attributes:
        eos: Ids that end it, the usual one first.
        bos: The id that begins it, if there is one.
        sampling: The checkpoint's own generation_config.json; what it says of sampling is taken over.
    """

    eos: tuple[int, ...]
    bos: int | None
    sampling: Mapping[str, Any]


def check_uncut(spec: ModelSpec) -> None:
    """Check that one graph of all layers computes a model in one run, whatever the number of rows.

    Raises:
        UnsupportedError: A layer does not see its own position, so that a prompt takes several runs.
    """
    if blind := [layer for layer in range(spec.num_hidden_layers) if not spec.sees_itself(layer)]:
        raise UnsupportedError(
            f"--genai: onnxruntime-genai runs a prompt once, and layers {blind} need several runs",
            found=f"kv_map {list(spec.kv_map)}",
            expected="layers that use their own keys and values, or those of a layer below",
            remedy="leave out --genai",
        )


def genai_config(spec: ModelSpec, max_length: int, ends: TextEnds) -> bytes:
    """Return the content of genai_config.json.

    Args:
        spec: The model.
        max_length: The longest context of the bundle, in tokens.
        ends: The tokens around a text. Without a token that ends it, a text has no end but its length.
    """
    owners = producers(spec.kv_map, 0, spec.num_hidden_layers)
    first = spec.cache_attention(owners[0])
    eos = [token for token in ends.eos if 0 <= token < spec.vocab_size]
    ids: dict[str, Any] = {"eos_token_id": eos[0] if len(eos) == 1 else eos}
    pad = ends.sampling.get("pad_token_id")
    is_pad = type(pad) is int and 0 <= pad < spec.vocab_size
    ids["pad_token_id"] = pad if is_pad else next(iter(eos), 0)
    if ends.bos is not None:
        ids["bos_token_id"] = ends.bos
    template = "%d"
    config = {
        "model": {
            **ids,
            "type": GENERIC_TYPE,
            "vocab_size": spec.vocab_size,
            "context_length": max_length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": names.GENAI_GRAPH_FILE,
                "hidden_size": spec.hidden_size,
                "num_hidden_layers": len(owners),
                "num_attention_heads": first.heads,
                "num_key_value_heads": first.kv_heads,
                "head_size": first.cache_head_dim,
                "inputs": {
                    "input_ids": names.INPUT_IDS,
                    "attention_mask": names.ATTENTION_MASK,
                    **{f"past_{part}_names": names.past(template, part) for part in names.KV_PARTS},
                },
                "outputs": {
                    "logits": names.LOGITS,
                    **{f"present_{part}_names": names.present(template, part) for part in names.KV_PARTS},
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(max_length, DEFAULT_LENGTH),
            "num_beams": 1,
            "past_present_share_buffer": True,
            **{name: ends.sampling[name] for name in _SAMPLING if _is_number(ends.sampling.get(name), name)},
        },
    }
    return (json.dumps(config, indent=1) + "\n").encode()


def _is_number(value: object, name: str) -> bool:
    return isinstance(value, _SAMPLING[name]) and not isinstance(value, bool)
