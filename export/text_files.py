"""Checks that the runtime loads the text files of a bundle, before the long work of writing it.

Parity aside, this is the only file of the room that opens the runtime: its wing for text, which needs no onnxruntime.
Whether a tokenizer loads is for its one reader to say.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from shortstack.export.checkpoint.config import parse_json_object
from shortstack.export.checkpoint.resolved_tokenizer import CHAT, Reference, reference_of
from shortstack.graphs import names
from shortstack.graphs.errors import BundleError, CheckpointError, RequestError
from shortstack.graphs.genai_config import TextEnds
from shortstack.runtime.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def check_text_files(source: str, files: Mapping[str, bytes]) -> None:
    """Load the tokenizer as the runtime will.

    Args:
        source: The checkpoint, for messages.
        files: The bundle's text files, content by name.

    Raises:
        CheckpointError: There is no tokenizer, or the runtime would refuse the files.
    """
    if names.TOKENIZER_FILE not in files:
        raise CheckpointError(
            f"{source} has no {names.TOKENIZER_FILE}",
            remedy="save it next to the weights: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    tokenizer = _load(source, files)
    reference = reference_of(files)
    if reference is not None and (difference := _first_difference(tokenizer, reference)):
        log.warning("%s: the bundle's tokenizer differs from transformers': %s", source, difference)


def text_ends(source: str, files: Mapping[str, bytes]) -> TextEnds:
    """Return the tokens around a text, as the runtime has them; arguments and errors as :func:`check_text_files`."""
    tokenizer = _load(source, files)
    name = names.GENERATION_CONFIG_FILE
    sampling = parse_json_object(files[name], f"{source}/{name}") if name in files else {}
    return TextEnds(tokenizer.eos_token_ids, tokenizer.bos_token_id, sampling)


def _load(source: str, files: Mapping[str, bytes]) -> Tokenizer:
    with tempfile.TemporaryDirectory(prefix="shortstack-") as name:
        folder = Path(name)
        for file in names.TEXT_FILES:
            if file in files:
                (folder / file).write_bytes(files[file])
        try:
            return Tokenizer.load(folder)
        except BundleError as error:
            raise CheckpointError(
                f"{source} would become a bundle that does not load: {error.problem.replace(f'{folder}/', '')}",
                remedy="mend the file in the checkpoint",
            ) from None


def _first_difference(tokenizer: Tokenizer, reference: Reference) -> str | None:
    for text, wanted in zip(reference.texts, reference.ids, strict=True):
        found = tokenizer.encode(text)
        if found != list(wanted):
            return f"{text!r} becomes {found[:20]} and not {list(wanted[:20])}"
    if not tokenizer.has_chat_template:
        return None
    try:
        chat = tokenizer.render_chat(CHAT)  # within bounds; only then transformers', which knows none
    except RequestError as error:
        return f"a chat of three messages is not rendered: {error.problem}"
    try:
        wanted_chat = reference.render_chat()
    except Exception as error:
        return f"transformers refuses a chat of three messages ({error}), which becomes {chat!r}"
    return None if chat == wanted_chat else f"a chat becomes {chat!r} and not {wanted_chat!r}"
