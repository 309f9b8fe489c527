"""Completes the text files next to a model: the chat template as its own file, and always a generation config."""

from __future__ import annotations

import json

from shortstack.export.checkpoint.config import Config, parse_json_object
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError


def complete_files(found: dict[str, bytes], config: Config, where: str) -> dict[str, bytes]:
    """Return the text files of a bundle, given those of a checkpoint.

    Args:
        found: The checkpoint's files, content by name.
        config: The model's config, for ``bos_token_id`` and ``eos_token_id``.
        where: The checkpoint's path, for messages.

    Raises:
        CheckpointError: A JSON file among them is damaged, or the chat template has an unknown form.
    """
    files = dict(found)
    for name in (names.TOKENIZER_FILE, names.TOKENIZER_CONFIG_FILE, names.GENERATION_CONFIG_FILE):
        if name in files:
            parse_json_object(files[name], f"{where}/{name}")
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
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config.read_token_ids(key)
        if ids:
            data[key] = ids[0] if len(ids) == 1 else list(ids)
    return (json.dumps(data, indent=2) + "\n").encode()
