"""The tokenizer of a bundle: turns text and chats into token ids and back, and knows which ids end a text.

For the decoding loops and the commands. Wraps Hugging Face's ``tokenizers``, and renders chat templates with jinja2 as
transformers does. Needs neither transformers nor a network. Reads these files of a bundle folder:

======================  ========  ==========================================================================
file                    required  what is read
======================  ========  ==========================================================================
tokenizer.json          yes       everything; truncation and padding that it sets are switched off
tokenizer_config.json   no        bos_token, eos_token, ... for templates; chat_template without chat_template.jinja
chat_template.jinja     no        the chat template
generation_config.json  no        eos_token_id, bos_token_id
======================  ========  ==========================================================================

A chat template is foreign code. It runs in jinja2's immutable sandbox and sees plain JSON data only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import tokenizers

from shortstack.graphs.errors import BundleError, RequestError
from shortstack.graphs.names import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    SPECIAL_TOKENS_FIELD,
    TEXT_FILES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from shortstack.graphs.read_file import read_file, read_json_object
from shortstack.runtime.text.content_parts import with_text_contents
from shortstack.runtime.text.template_sandbox import Sandbox, TemplateLimitError, render

_REMEDY = "export the checkpoint again, or copy the file from the checkpoint into the bundle"
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", *_TEMPLATE_TOKENS})
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """Encodes and decodes text for one model. :meth:`load` makes it.

    Attributes:
        special_ids: Ids of the special tokens, which :meth:`decode` leaves out.
        eos_token_ids: Ids that end a text: those of generation_config.json, then the tokenizer's ``eos_token``.
        bos_token_id: The id that begins a text, or None.
        vocab_size: Number of tokens, including added ones. A model's embedding may have more rows (padding).
        has_text_tokens: False for byte-level BPE, where every token stands for bytes (see :meth:`token_bytes`).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        chat_template: str | None,
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        # The state of the decoder alone is a few bytes of JSON; that of the whole tokenizer is megabytes.
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        decoder_types = frozenset(_decoder_types(decoder))
        self._byte_level = "ByteLevel" in decoder_types and decoder_types <= {"ByteLevel", "Fuse", "Sequence"}
        self._byte_fallback = "ByteFallback" in decoder_types
        self._special_tokens = _special_tokens(config)
        self.has_text_tokens = not self._byte_level
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._special_texts: dict[int, str] = {
            token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self.special_ids: frozenset[int] = frozenset(self._special_texts)
        eos = [*_token_ids(generation_config, "eos_token_id"), *self._special_token_id("eos_token")]
        bos = [*self._special_token_id("bos_token"), *_token_ids(generation_config, "bos_token_id")]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(eos))
        self.bos_token_id: int | None = bos[0] if bos else None

    @classmethod
    def load(cls, folder: Path, listed: Container[str] | None = None) -> Tokenizer:
        """Read the tokenizer files of a bundle (or of a Hugging Face checkpoint folder).

        Args:
            folder: The folder.
            listed: The files that bundle.json lists; others count as absent. None: every file there is read.

        Raises:
            BundleError: tokenizer.json is missing, or one of the files is malformed.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise BundleError(f"{path} is missing", remedy=_REMEDY)
        try:
            backend = tokenizers.Tokenizer.from_str(_read_text(path))
        except (BundleError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the Rust library raises bare Exception, and panics that are not even that
            raise BundleError(
                f"{path} is malformed", found=error, expected="the JSON of the `tokenizers` library", remedy=_REMEDY
            ) from error
        # Both are left over from a training run; a prompt must be encoded whole and without padding.
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):  # of BPE; it would cut the same text differently each time
            backend.model.dropout = None
        present = {name for name in TEXT_FILES if (folder / name).is_file() and (listed is None or name in listed)}
        config = _read_json_object(folder / TOKENIZER_CONFIG_FILE) if TOKENIZER_CONFIG_FILE in present else {}
        generation = _read_json_object(folder / GENERATION_CONFIG_FILE) if GENERATION_CONFIG_FILE in present else {}
        return cls(
            backend,
            config=config,
            generation_config=generation,
            chat_template=_read_text(folder / CHAT_TEMPLATE_FILE)
            if CHAT_TEMPLATE_FILE in present
            else _template_from_config(config),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``, with the special tokens (often BOS) that the tokenizer adds to a text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not UTF-8: {error.reason} at character {error.start}") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``. Bytes that are not UTF-8 become U+FFFD; ids without a token are left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes that a token stands for, or None if it is text, whose form may depend on its neighbours.

        Every token of a byte-level BPE stands for bytes, and so do the ``<0x..>`` tokens of a byte-fallback tokenizer.
        An id without a token gives ``b""``, since :meth:`decode` leaves it out.
        """
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            try:
                return bytes([_BYTE_OF_CHAR[char] for char in token])
            except KeyError:  # an added token, written in plain text
                return token.encode("utf-8")
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return None

    def special_text(self, token_id: int) -> str:
        """Return the text of a special token, which :meth:`decode` leaves out; empty if it is not special."""
        return self._special_texts.get(token_id, "")

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a template for :meth:`render_chat`."""
        return self._chat_template is not None

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """Names of the variables that the chat template may read from outside, without those that every chat has.

        A name that it sets before, in one of its branches, may be among them.

        Raises:
            RequestError: There is no template, or it is damaged.
        """
        template = self._compiled_template  # for its errors
        found = jinja2.meta.find_undeclared_variables(template.environment.parse(self._chat_template or ""))
        return frozenset(
            found - _RESERVED_VARIABLES - self._special_tokens.keys() - template.environment.globals.keys()
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation with the model's chat template.

        Args:
            messages: JSON-like messages such as ``{"role": "user", "content": "Hi"}``, oldest first. A content may be a
                list of text parts.
            add_generation_prompt: Whether to end with the opening of the assistant's turn.
            tools: JSON schemas of tools, for templates that know them.
            variables: Further template variables, e.g. ``{"enable_thinking": False}``.

        Raises:
            RequestError: There is no template, the input is not plain JSON data, the template rejects the messages, or
                a variable has a reserved name.
        """
        template = self._compiled_template
        data = _plain_data({"messages": messages, "tools": tools, "variables": variables or {}})
        if reserved := sorted(_RESERVED_VARIABLES & data["variables"].keys()):
            raise RequestError(
                "chat template variables", found=", ".join(reserved), expected="names that are not in use already"
            )
        try:
            return render(
                template,
                {
                    **self._special_tokens,
                    **data["variables"],
                    "messages": with_text_contents(data["messages"], self._chat_template or ""),
                    "tools": data["tools"],
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                },
            )
        except RequestError:
            raise
        except (TemplateLimitError, MemoryError) as error:
            raise RequestError(
                f"the chat template was stopped: {error or 'it takes too much memory'}",
                remedy=f"give shorter messages; if it happens to short ones, too, mend {CHAT_TEMPLATE_FILE}",
            ) from error
        except Exception as error:  # foreign code: jinja2's errors, and whatever its expressions raise
            raise RequestError(
                f"the chat template refused the messages: {' '.join(str(error).split()) or type(error).__name__}",
                remedy="check roles, their order and that every `content` is a string",
            ) from error

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render a conversation (see :meth:`render_chat`) and encode it; the template itself writes BOS."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables)
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def _compiled_template(self) -> jinja2.Template:
        if self._chat_template is None:
            raise RequestError(
                "this model has no chat template",
                remedy=f"give a plain prompt, or put a {CHAT_TEMPLATE_FILE} into the bundle",
            )
        try:
            return Sandbox().from_string(self._chat_template)
        except Exception as error:  # jinja2's own, and those of Python's compiler, which reads what jinja2 writes
            raise RequestError(
                f"{CHAT_TEMPLATE_FILE} is not a valid jinja2 template: {str(error) or type(error).__name__}",
                remedy=_REMEDY,
            ) from error

    def _special_token_id(self, name: str) -> list[int]:
        token_id = self._backend.token_to_id(self._special_tokens[name]) if name in self._special_tokens else None
        return [] if token_id is None else [token_id]


def _plain_data(data: dict[str, Any]) -> dict[str, Any]:
    """Rebuild ``data`` from plain JSON types, so that a template never sees an object with methods."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(data, default=_plain_container))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"chat messages are not plain JSON data: {error}") from error
    messages = plain["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RequestError(
            "chat messages", found=repr(messages)[:80], expected="a list of objects with `role` and `content`"
        )
    if not messages:
        raise RequestError("chat messages", found="none", expected="at least one")
    return plain


def _plain_container(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is neither text, number, list nor mapping")


def _read_text(path: Path) -> str:
    try:
        return read_file(path, BundleError, _REMEDY).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} cannot be read", found=error, remedy=_REMEDY) from error


def _read_json_object(path: Path) -> dict[str, Any]:
    return read_json_object(path, BundleError, _REMEDY)


def _template_from_config(config: Mapping[str, Any]) -> str | None:
    """Read ``chat_template`` of tokenizer_config.json: one template, or a list of named ones with a ``default``."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None or isinstance(template, str):
        return template
    raise BundleError(
        f"{TOKENIZER_CONFIG_FILE}, field chat_template",
        found=type(template).__name__,
        expected="a string",
        remedy=_REMEDY,
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens by name, as templates see them: those that export resolved, else the usual ones."""
    resolved = config.get(SPECIAL_TOKENS_FIELD, {})
    if not isinstance(resolved, dict):
        raise BundleError(
            f"{TOKENIZER_CONFIG_FILE}, field {SPECIAL_TOKENS_FIELD}",
            found=type(resolved).__name__,
            expected="an object",
            remedy=_REMEDY,
        )
    usual = {name: content for name in _TEMPLATE_TOKENS if (content := _token_content(config, name)) is not None}
    return {**{name: token for name, token in resolved.items() if isinstance(token, str | list)}, **usual}


def _token_content(config: Mapping[str, Any], name: str) -> str | None:
    """Read a special token of tokenizer_config.json: a string, or an object with its text in ``content``."""
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None or isinstance(token, str):
        return token
    raise BundleError(f"{TOKENIZER_CONFIG_FILE}, field {name}", found=repr(token), expected="a string", remedy=_REMEDY)


def _token_ids(config: Mapping[str, Any], name: str) -> list[int]:
    """Read a field of generation_config.json that holds token ids: absent, null, one id or a list of ids.

    A negative id is none: that is how some configs say so.
    """
    value = config.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise BundleError(
            f"{GENERATION_CONFIG_FILE}, field {name}",
            found=repr(value),
            expected="a token id or a list of them",
            remedy=_REMEDY,
        )
    return [token_id for token_id in ids if token_id >= 0]


def _decoder_types(decoder: Mapping[str, Any] | None) -> Iterable[str]:
    """Yield the type of a decoder in tokenizer.json and, if it is a Sequence, the types of its parts."""
    if decoder is None:
        return
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _decoder_types(part)


def _byte_of_char() -> dict[str, int]:
    """Return the alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, others begin at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
