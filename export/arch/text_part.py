"""Folders of models that also read pictures or sound: their language model is exported, the rest is left out.

Such a config has the language model's own in ``text_config``; its tensors have another prefix, which depends on the
version of transformers that wrote them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from shortstack.export.arch.architecture import Architecture
from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.spec import ModelSpec

_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_UNREAD = r"(model\.)?(vision_tower|vision_model|multi_modal_projector|embed_vision|audio_tower|embed_audio)\."


def text_part(model_type: str, text: Architecture) -> Architecture:
    """Return the family of whole folders whose language model is of a given family.

    Args:
        model_type: The family of the whole, as in ``config.json``.
        text: The family of the language model.
    """
    return replace(text, model_type=model_type, read_spec=partial(_read, text), prefixes=_PREFIXES, unread=_UNREAD)


def _read(text: Architecture, config: Config) -> ModelSpec:
    section = config.section("text_config")
    if section is None:
        raise CheckpointError(f"{config.where('text_config')} is missing", expected="the config of the language model")
    found = section.read(str, "model_type", text.model_type)
    if found != text.model_type:
        raise not_one_of(section.where("model_type"), found, (text.model_type,))
    shared = {key: config.data[key] for key in ("tie_word_embeddings",) if key in config.data}
    return text.read_spec(Config({**shared, **section.data}, section.file, section.prefix))
