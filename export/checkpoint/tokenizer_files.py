"""Completes the text files next to a model: the chat template as its own file, and always a generation config."""

from __future__ import annotations

import json

from shortstack.export.checkpoint.config import Config, parse_json_object
from shortstack.export.checkpoint.resolved_tokenizer import resolve_tokenizer
from shortstack.export.checkpoint.vocabulary_files import BINARY_FILES
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def complete_files(
    found: dict[str, bytes], config: Config, where: str, *, is_resolved: bool = True
) -> dict[str, bytes]:
    """Return the text files of a bundle, given those of a checkpoint.

    Args:
        found: The checkpoint's files, content by name.
        config: The model's config, for ``bos_token_id`` and ``eos_token_id``.
        where: The checkpoint's path, for messages.
        is_resolved: The files say all there is of the tokenizer; otherwise transformers is asked.

    Raises:
        CheckpointError: A file among them is damaged, or a field that the runtime reads has an unknown form.
        DependencyError: A package that reads one of them is not installed.
    """
    files = {name: content if name in BINARY_FILES else _plain_utf8(content) for name, content in found.items()}
    for name in files:
        if name.endswith(".json"):
            content = Config(parse_json_object(files[name], f"{where}/{name}"), f"{where}/{name}")
            if name == names.GENERATION_CONFIG_FILE:
                for key in _TOKEN_IDS:
                    content.read_token_ids(key)
    if not is_resolved:
        files = resolve_tokenizer(files, config.read(str, "model_type", None), config.read(int, "vocab_size", None))
    if names.CHAT_TEMPLATE_FILE not in files and names.TOKENIZER_CONFIG_FILE in files:
        name = f"{where}/tokenizer_config.json"
        template = chat_template(Config(parse_json_object(files[names.TOKENIZER_CONFIG_FILE], name), name))
        if template is not None:
            files[names.CHAT_TEMPLATE_FILE] = template.encode()
    if names.GENERATION_CONFIG_FILE not in files:
        files[names.GENERATION_CONFIG_FILE] = generation_config(config)
    return files


def chat_template(tokenizer_config: Config) -> str | None:
    """Return the chat template of a ``tokenizer_config.json``: a string, or the template named "default" of a list.

    Raises:
        CheckpointError: The field has another form.
    """
    value = tokenizer_config.data.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    expected = "a string, or a list of {name, template} objects"
    if not isinstance(value, list):
        raise tokenizer_config.wrong("chat_template", expected)
    by_name: dict[str, str] = {}
    for entry in value:
        match entry:
            case {"name": str(name), "template": str(template)}:
                by_name[name] = template
            case _:
                raise tokenizer_config.wrong("chat_template", expected)
    if by_name and "default" not in by_name:
        raise CheckpointError(
            tokenizer_config.where("chat_template"),
            found=f"templates named {', '.join(sorted(by_name))}",
            expected='one named "default"',
            remedy="put the template to use into chat_template.jinja next to the file",
        )
    return by_name.get("default")


def generation_config(config: Config) -> bytes:
    """Build a ``generation_config.json`` from the special token ids of ``config``.

    Raises:
        CheckpointError: A token id in ``config`` is neither an id nor a list of ids.
    """
    data: dict[str, int | list[int]] = {}
    for key in _TOKEN_IDS:
        ids = config.read_token_ids(key)
        if ids:
            data[key] = ids[0] if len(ids) == 1 else list(ids)
    return (json.dumps(data, indent=2) + "\n").encode()


def _plain_utf8(content: bytes) -> bytes:
    """Return a text file without a byte order mark, and in UTF-8 if it is in another encoding that JSON may have.

    What cannot be read stays as it is, for the reader to name.
    """
    try:
        return content.decode(json.detect_encoding(content)).removeprefix("\ufeff").encode()
    except UnicodeError:
        return content
