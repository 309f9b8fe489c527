"""Turns the metadata of a GGUF file into a ``config.json`` of its family, by the table of its architecture.

:mod:`shortstack.export.checkpoint.gguf_family` says what such a table holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from shortstack.export.checkpoint.checkpoint import MAX_LAYERS
from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.gguf_end_tokens import end_token_ids
from shortstack.export.checkpoint.gguf_family import GROWTH, GgufFamily, Windows
from shortstack.export.checkpoint.gguf_model import CONVERT_AGAIN, GgufModel
from shortstack.export.checkpoint.gguf_rope import rope_fields
from shortstack.export.checkpoint.gguf_tokenizer import token_texts
from shortstack.graphs.errors import CheckpointError, UnsupportedError

_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_UNREAD: Mapping[str, tuple[float | bool, ...]] = MappingProxyType(
    {
        "attention.causal": (True,),
        "attention.clamp_kqv": (0.0,),
        "attention.max_alibi_bias": (0.0,),
        "attention.scale": (0.0,),
        "attention.shared_kv_layers": (0,),
        _WINDOW: (0,),
        GROWTH: (0.0,),
        "attn_logit_softcapping": (0.0,),
        "embedding_scale": (0.0, 1.0),
        "final_logit_softcapping": (0.0,),
        "logit_scale": (0.0, 1.0),
        "residual_scale": (0.0, 1.0),
    }
)
"""Fields that change what a model computes, and the values with which they do not. Most architectures lack them."""


def family_of(family: GgufFamily, model: GgufModel) -> GgufFamily:
    """Return the family of a file, where one architecture stands for two."""
    if family.with_windows is not None and model.read(int, _WINDOW, 0) > 0:
        return family.with_windows
    if family.with_growth is not None and model.number(GROWTH, 0.0):
        return family.with_growth
    return family


def hugging_face_config(family: GgufFamily, model: GgufModel) -> dict[str, object]:
    """Return the fields of the config.

    Raises:
        CheckpointError: A field is missing, has the wrong type, or contradicts another one, or there is no embedding.
        UnsupportedError: The model has something that this version cannot export.
    """
    if "token_embd.weight" not in model.tensors and not family.is_drafter:
        raise CheckpointError(
            f"{model.metadata.file} has no tensor token_embd.weight", remedy="name a file that holds a whole model"
        )
    _refuse_unread(family, model)
    hidden, blocks = model.positive("embedding_length"), model.positive("block_count")
    if blocks > MAX_LAYERS:
        raise model.metadata.wrong(model.key("block_count"), f"at most {MAX_LAYERS}")
    may_differ, above = family.has_layer_kinds, _layers_above(family, model, blocks)
    layers = blocks - above
    heads = model.sizes("attention.head_count", blocks)[0]
    kv_heads = model.sizes("attention.head_count_kv", blocks, heads, may_differ=may_differ)[0]
    if heads % kv_heads:
        where, count = model.where("attention.head_count_kv"), model.key("attention.head_count")
        raise CheckpointError(where, found=kv_heads, expected=f"a divisor of {count}, {heads}", remedy=CONVERT_AGAIN)
    head_dim, context = _head_dim(family, model, hidden, heads), model.positive("context_length")
    eps, eps_key = family.norm_eps
    config: dict[str, object] = {
        "model_type": family.model_type,
        "architectures": [family.transformers_class],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": model.sizes("feed_forward_length", blocks, may_differ=may_differ)[0],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": _vocab_size(model),
        eps: model.positive_number(eps_key),
        "max_position_embeddings": context,
        "tie_word_embeddings": not model.has("output"),
        **{name: model.has(f"blk.0.{stem}.bias") for name, stem in family.biases.items()},
        **{name: model.number(number.key, number.default) for name, number in family.numbers.items()},
        **family.fixed,
    }
    if family.has_rope:
        config |= rope_fields(family, model, head_dim, context)
    if family.windows is not None:
        config |= _windows(family.windows, model, layers, blocks)
    if above:
        config["num_nextn_predict_layers"] = above
    config |= family.extend(model, config)
    config = {family.renames.get(name, name): value for name, value in config.items()}
    return {**config, **_special_tokens(model.metadata)}


def _layers_above(family: GgufFamily, model: GgufModel, blocks: int) -> int:
    """Return how many of the blocks are layers for multi-token prediction, which stand above the model's own."""
    key = "nextn_predict_layers"
    above = model.read(int, key, 0)
    if above and (family.has_layer_kinds or family.is_drafter):
        raise model.unsupported(key, f"models of architecture {model.architecture} do not have it", 0)
    if not 0 <= above < blocks:
        raise model.metadata.wrong(model.key(key), f"less than {model.key('block_count')}, {blocks}")
    return above


def _vocab_size(model: GgufModel) -> int:
    """Return the number of token ids: the rows of the embedding, if there is one."""
    if "token_embd.weight" in model.tensors:
        return model.tensors["token_embd.weight"].shape[0]
    return model.positive("vocab_size", len(token_texts(model.metadata)) or None)


def _refuse_unread(family: GgufFamily, model: GgufModel) -> None:
    """Refuse what the architecture's models do not have, so that nothing is left out in silence."""
    if model.read(int, "expert_count", 0) > 0:
        raise model.unsupported("expert_count", "mixtures of experts cannot be exported", 0)
    sections = model.metadata.data.get(model.key("rope.dimension_sections"))
    if isinstance(sections, list) and any(sections):
        raise model.unsupported("rope.dimension_sections", "a rotary embedding of images", "none")
    read = {*(number.key for number in family.numbers.values()), *family.ignores}
    for key, neutral in _UNREAD.items():
        if key in read or (key == _WINDOW and family.windows is not None):
            continue
        kind = bool if isinstance(neutral[0], bool) else float
        if model.read(kind, key, neutral[0]) not in neutral:
            raise model.unsupported(key, f"models of architecture {model.architecture} do not have it", neutral[0])


def _head_dim(family: GgufFamily, model: GgufModel, hidden: int, heads: int) -> int:
    divides = hidden % heads == 0
    rotated = model.read(int, "rope.dimension_count", None)
    default = rotated if not divides and rotated is not None and rotated > 0 else hidden // heads
    key = "attention.key_length_swa" if family.has_layer_kinds else "attention.key_length"
    head_dim = model.positive(key, default) if default > 0 else model.positive(key)
    if family.has_layer_kinds:
        return head_dim
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        if (other := model.read(int, key, head_dim)) != head_dim:
            raise UnsupportedError(
                model.where(key),
                found=other,
                expected=f"the width of the keys, {head_dim}",
                remedy="export another model",
            )
    if not family.has_head_dim and (not divides or head_dim != hidden // heads):
        raise CheckpointError(
            model.where("attention.key_length"),
            found=head_dim,
            expected=f"{model.key('embedding_length')} / {model.key('attention.head_count')}, {hidden} / {heads}",
            remedy=CONVERT_AGAIN,
        )
    return head_dim


def _windows(windows: Windows, model: GgufModel, layers: int, blocks: int) -> dict[str, object]:
    """Return the window, and which layers have it; a list of the file wins over the period of the architecture.

    Args:
        windows: What the architecture says.
        model: The file.
        layers: The model's layers.
        blocks: The same, and those above them for multi-token prediction, which the file lists too.
    """
    if windows.is_required:
        width = model.positive(_WINDOW)
    else:
        width = model.read(int, _WINDOW, windows.of_depth.get(layers, windows.default))
        if width < 0:
            raise model.metadata.wrong(model.key(_WINDOW), "a positive integer, or 0 for none")
    if width == 0:
        return {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    listed = model.metadata.data.get(model.key(_PATTERN))
    if isinstance(listed, list):
        if len(listed) != blocks or not all(type(entry) is bool for entry in listed):
            found = f"{len(listed)} entries" if len(listed) != blocks else "entries that are not true or false"
            expected = f"true or false for each of {blocks} layers"
            raise CheckpointError(model.where(_PATTERN), found=found, expected=expected, remedy=CONVERT_AGAIN)
        slides = [bool(entry) for entry in listed[:layers]]
    else:
        period = model.read(int, _PATTERN, windows.period)
        if period < 0:
            raise model.metadata.wrong(model.key(_PATTERN), "a positive integer")
        slides = [period == 0 or (layer + 1) % period != 0 for layer in range(layers)]
    return {
        "sliding_window": width,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }


def _special_tokens(metadata: Config) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, field in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        index = metadata.read(int, f"tokenizer.ggml.{field}_token_id", None)
        if index is not None:
            found[key] = index
    ends = end_token_ids(metadata, token_texts(metadata))
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    return found
