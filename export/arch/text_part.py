"""Folders of models that also read pictures or sound: their language model is exported, the rest is left out.

Such a config has the language model's own in ``text_config``; its tensors have another prefix, which depends on the
version of transformers that wrote them. Whether the LM head is the embedding, the whole config says first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shortstack.export.arch.architecture import Architecture
from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.spec import ModelSpec

_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_UNREAD = r"(model\.)?(vision_tower|vision_model|multi_modal_projector|embed_vision|audio_tower|embed_audio)\."


def text_part(model_type: str, *texts: Architecture) -> Architecture:
    """Return the family of whole folders whose language model is of a given family.

    Args:
        model_type: The family of the whole, as in ``config.json``.
        *texts: The families of the language model, the one of a config that names none first. They name their tensors
            alike.
    """
    by_type = {text.model_type: text for text in texts}

    def read(config: Config) -> ModelSpec:
        section = config.section("text_config")
        if section is None:
            where = f"{config.where('text_config')} is missing"
            raise CheckpointError(where, expected="the config of the language model")
        found = section.read(str, "model_type", texts[0].model_type)
        if found not in by_type:
            raise not_one_of(section.where("model_type"), found, by_type)
        shared = {key: config.data[key] for key in ("tie_word_embeddings",) if config.data.get(key) is not None}
        return by_type[found].read_spec(Config({**section.data, **shared}, section.file, section.prefix))

    def write(spec: ModelSpec) -> dict[str, Any]:
        return by_type[spec.model_type].write_config(spec)

    return replace(
        texts[0], model_type=model_type, read_spec=read, write_config=write, prefixes=_PREFIXES, unread=_UNREAD
    )
