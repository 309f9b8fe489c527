"""Gemma 4 in GGUF files: the one architecture whose layers differ in the widths of their heads and MLPs.

==================================  ===============================================================================
metadata                            config
==================================  ===============================================================================
``attention.key_length``            ``head_dim`` of layers that see everything, in ``per_layer_config``
``attention.key_length_swa``        ``head_dim``, of layers that slide
``attention.head_count_kv``         a number, or a list: ``num_key_value_heads`` of layers that slide, and in
                                    ``per_layer_config`` of those that see everything
``feed_forward_length``             a number, or a list: ``intermediate_size``, twice that in layers that use another
                                    one's keys and values (``use_double_wide_mlp``)
``attention.shared_kv_layers``      ``num_kv_shared_layers``
``embedding_length_per_layer_...``  ``hidden_size_per_layer_input``
``rope_freqs.weight``               ``partial_rotary_factor`` of layers that see everything: divisors of 1 for the
                                    frequencies that are rotated, and of 1e30 for the others
==================================  ===============================================================================

A full layer without ``attn_v`` takes its values from the k projection (``attention_k_eq_v``). Norms are stored as they
are in transformers, without the 1 of earlier Gemmas. Attention scores are not scaled, which llama.cpp has in its code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shortstack.export.checkpoint.checkpoint import ROPE_FACTORS
from shortstack.export.checkpoint.gguf_family import GgufFamily, Number, Windows
from shortstack.export.checkpoint.gguf_model import CONVERT_AGAIN, GgufModel
from shortstack.export.checkpoint.gguf_names import FOUR_NORMS, GEMMA4_ENDS, QK_NORMS, TOKEN_BRANCH, llama_names
from shortstack.export.checkpoint.gguf_rope import partial_share, rope_base
from shortstack.graphs.errors import CheckpointError

_FULL = "full_attention"
_PATTERN, _SHARED = "attention.sliding_window_pattern", "attention.shared_kv_layers"
_NOT_ROTATED = 1e20  # llama.cpp's converter writes 1e30: the angle of such a frequency is 0 at every position


def _of_layers(model: GgufModel, config: Mapping[str, Any]) -> dict[str, object]:
    """Return the fields that say how the layers differ."""
    types: Sequence[str] = config["layer_types"]
    if not isinstance(model.metadata.data.get(model.key(_PATTERN)), list) or types[-1] != _FULL:
        expected = "true or false for each layer, and false for the last"
        found = model.metadata.data.get(model.key(_PATTERN))
        raise CheckpointError(model.where(_PATTERN), found=found, expected=expected, remedy=CONVERT_AGAIN)
    shared = model.read(int, _SHARED, 0)
    if not 0 <= shared < len(types):
        raise model.metadata.wrong(model.key(_SHARED), f"0..{len(types) - 1}, fewer than the layers")
    return {
        **_heads(model, types, len(types) - shared),
        **_widths(model, len(types), shared),
        **_tokens(model),
        "num_kv_shared_layers": shared,
        "rope_parameters": _ropes(model, config["head_dim"]),
    }


def _heads(model: GgufModel, types: Sequence[str], owners: int) -> dict[str, object]:
    for key in ("key_length", "key_length_swa"):
        width, of_values = (model.positive(f"attention.{name}") for name in (key, key.replace("key", "value")))
        if width != of_values:
            where = model.where(f"attention.{key.replace('key', 'value')}")
            raise CheckpointError(where, found=of_values, expected=f"the width of the keys, {width}")
    counts = model.sizes("attention.head_count_kv", len(types), may_differ=True)
    by_type = {kind: {count for own, count in zip(types, counts, strict=True) if own == kind} for kind in types}
    if any(len(found) > 1 for found in by_type.values()):
        raise model.unsupported(
            "attention.head_count_kv", "layers of one type that differ", "one number for each type of layer"
        )
    first = next((layer for layer, kind in enumerate(types[:owners]) if kind == _FULL), None)
    of_full = {"head_dim": model.positive("attention.key_length"), "num_key_value_heads": counts[-1]}
    return {
        "num_key_value_heads": next((n for n, kind in zip(counts, types, strict=True) if kind != _FULL), counts[-1]),
        "per_layer_config": {str(layer): of_full for layer, kind in enumerate(types) if kind == _FULL},
        "attention_k_eq_v": first is not None and not model.has(f"blk.{first}.attn_v"),
    }


def _widths(model: GgufModel, layers: int, shared: int) -> dict[str, object]:
    widths = model.sizes("feed_forward_length", layers, may_differ=True)
    is_double = shared > 0 and widths[-1] != widths[0]
    usual = (widths[0],) * (layers - shared) + ((1 + is_double) * widths[0],) * shared
    if widths != usual:
        raise model.unsupported(
            "feed_forward_length", "layers of other widths", "one width, or twice that in layers that share K,V"
        )
    return {"use_double_wide_mlp": is_double}


def _tokens(model: GgufModel) -> dict[str, object]:
    key, table = "embedding_length_per_layer_input", "per_layer_token_embd.weight"
    width = model.read(int, key, 0)
    if width < 0:
        raise model.metadata.wrong(model.key(key), "0 for none, or a width")
    rows = {"vocab_size_per_layer_input": model.tensors[table].shape[0]} if table in model.tensors else {}
    return {"hidden_size_per_layer_input": width, **rows}


def _ropes(model: GgufModel, head_dim: int) -> dict[str, object]:
    full = model.positive("attention.key_length")
    for key, width in (("rope.dimension_count", full), ("rope.dimension_count_swa", head_dim)):
        if model.positive(key, width) != width:
            raise model.unsupported(key, "partial rotary embedding", f"the head size {width}")
    kind, factor = model.read(str, "rope.scaling.type", "none"), model.number("rope.scaling.factor", 1.0)
    if kind != "none" or factor not in (0.0, 1.0):
        raise model.unsupported("rope.scaling.type", "scaled rotary embedding", "none")
    if ROPE_FACTORS not in model.tensors:
        raise CheckpointError(
            f"{model.metadata.file} has no tensor {ROPE_FACTORS}, which says what full layers rotate",
            remedy=CONVERT_AGAIN,
        )
    factors = model.read_tensor(ROPE_FACTORS).reshape(-1)
    rotated = int(np.count_nonzero(factors == 1))
    if (
        factors.size != full // 2
        or not rotated
        or np.any(factors[:rotated] != 1)
        or np.any(~(factors[rotated:] >= _NOT_ROTATED))
    ):
        raise CheckpointError(
            f"{model.metadata.file}: tensor {ROPE_FACTORS}",
            found=f"{factors.size} numbers, {rotated} of them 1",
            expected=f"{full // 2} numbers, 1 and behind these 1e30",
            remedy=CONVERT_AGAIN,
        )
    theta = rope_base(model, "rope.freq_base", 10000.0)
    return {
        _FULL: {
            "rope_type": "proportional",
            "rope_theta": theta,
            "partial_rotary_factor": partial_share(2 * rotated, full),
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": rope_base(model, "rope.freq_base_swa", theta)},
    }


GEMMA4 = GgufFamily(
    model_type="gemma4_text",
    transformers_class="Gemma4ForCausalLM",
    names=llama_names(FOUR_NORMS, QK_NORMS, TOKEN_BRANCH, ends=GEMMA4_ENDS),
    numbers={"final_logit_softcapping": Number("final_logit_softcapping", 0.0)},
    fixed={"hidden_activation": "gelu_pytorch_tanh"},
    has_rope=False,
    windows=Windows(0, is_required=True),
    ignores=(_SHARED,),
    in_config=(ROPE_FACTORS,),
    has_layer_kinds=True,
    extend=_of_layers,
)
