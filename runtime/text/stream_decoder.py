"""Turns token ids into text one at a time, for streaming: text comes out as soon as no later token can change it.

Holds the state of one text; the vocabulary is :class:`shortstack.runtime.text.tokenizer.Tokenizer`. Knows nothing about
stop strings (:mod:`shortstack.runtime.text.stop`) or about why a generation ends. The kind of tokenizer decides how the
text of a token is found:

=================  =========================================  ======================================================
kind               a token is                                 how its text is found
=================  =========================================  ======================================================
byte-level BPE     bytes (GPT-2, Llama 3, SmolLM2, Qwen)      incremental UTF-8 decoder
byte fallback      text, or one byte ``<0xE2>`` (Llama 2)     bytes as above, text by window
anything else      text (Metaspace, WordPiece, ...)           window: decode([context, new]) minus decode([context])
=================  =========================================  ======================================================

The window is needed where the text of a token depends on its neighbours: SentencePiece drops the leading space of the
first token only, for example. With every method the thousandth token costs as much as the first.
"""

from __future__ import annotations

import codecs

from shortstack.runtime.text.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_UTF8_BYTES = 4


class StreamDecoder:
    """Decodes one token sequence piece by piece; joined, the pieces equal ``tokenizer.decode`` of the whole.

    Never emits half a character: at most three bytes wait until their character is complete. Bytes that cannot begin or
    continue a character become U+FFFD (one per maximal invalid part, as in ``tokenizer.decode``) once that is certain.

    There is one deliberate difference. If one byte of a run is wrong, the byte-fallback decoder of ``tokenizer.decode``
    turns *all* bytes of the run into U+FFFD, even complete characters, which a stream has shown already. Here only the
    wrong bytes become U+FFFD.

    Args:
        tokenizer: The vocabulary.
        skip_special_tokens: Whether special tokens add no text. If so, the bytes before and after a special token join
            up, as in ``decode``.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # the last tokens whose text is out; empty only at the start of the text
        self._held: list[int] = []  # tokens decoded by window whose text is not out yet

    def push(self, token_id: int) -> str:
        """Add one token and return the text that became final; it is often empty."""
        if token_id in self._skipped:
            return ""
        token_bytes = self._tokenizer.token_bytes(token_id)
        if token_bytes is None:
            return self._utf8.decode(b"", True) + self._push_text(token_id)
        if not token_bytes:
            return ""  # an id without a token, from the embedding's padding rows
        if not self._context and not self._held and self._tokenizer.has_text_tokens and token_bytes.isascii():
            return self._push_text(token_id)  # a decoder may strip the text's first space, even if it is `<0x20>`
        text = self._release() + self._utf8.decode(token_bytes)
        self._context = [token_id]
        return text

    def hidden_text(self, token_id: int) -> str:
        """Return the text of a token that :meth:`push` leaves out because it is special; empty for all others."""
        return self._tokenizer.special_text(token_id) if token_id in self._skipped else ""

    def flush(self) -> str:
        """End the text and return the part held back; an incomplete character becomes U+FFFD."""
        return self._release() + self._utf8.decode(b"", True)

    def _push_text(self, token_id: int) -> str:
        self._held.append(token_id)
        if len(self._held) < _MAX_UTF8_BYTES and self._window_text().endswith(_REPLACEMENT):
            # Either a genuine U+FFFD, or an incomplete character, which some decoders show this way. A character is
            # complete after four bytes at the latest, and so after four tokens.
            return ""
        return self._release()

    def _window_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]

    def _release(self) -> str:
        if not self._held:
            return ""
        text = self._window_text()
        self._context, self._held = self._held, []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
