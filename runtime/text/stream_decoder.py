"""Token ids to text, one at a time, for streaming: a piece comes out as soon as nothing can change it any more.

Holds the state of one text; the vocabulary is :class:`shortstack.runtime.text.tokenizer.Tokenizer`. Knows nothing of
stop strings (:mod:`shortstack.runtime.text.stop`) or of why generation ends. What a token adds depends on the kind of
tokenizer:

=================  =========================================  ======================================================
kind               a token is                                 how its text is found
=================  =========================================  ======================================================
byte-level BPE     bytes (GPT-2, Llama 3, SmolLM2, Qwen)      incremental UTF-8 decoder
byte fallback      text, or one byte ``<0xE2>`` (Llama 2)     bytes as above, text by window
anything else      text (Metaspace, WordPiece, ...)           window: decode([context, new]) minus decode([context])
=================  =========================================  ======================================================

The window keeps what depends on the neighbour right, such as the space that SentencePiece drops from the first token
only. Every path costs the same for the thousandth token as for the first.
"""

from __future__ import annotations

import codecs

from shortstack.runtime.text.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_UTF8_BYTES = 4


class StreamDecoder:
    """Decodes one token sequence incrementally; the pieces joined equal ``tokenizer.decode`` of the whole.

    Never emits half a character: at most three bytes wait for the rest of theirs. Bytes that cannot begin or continue a
    character become U+FFFD (one per maximal invalid part, as in ``tokenizer.decode``) once that is certain.

    The one deliberate difference: the byte-fallback decoder turns *all* bytes of a run into U+FFFD when one of them is
    wrong, including characters that were complete and have been streamed already; here only the wrong ones become
    U+FFFD.

    Args:
        tokenizer: The vocabulary.
        skip_special_tokens: Special tokens add no text. Bytes on both sides of one belong together, as in ``decode``.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # the last tokens whose text is out; empty at the start of the text only
        self._held: list[int] = []  # tokens of the window path whose text is not out yet

    def push(self, token_id: int) -> str:
        """Adds one token and returns the text that became final, often empty."""
        if token_id in self._skipped:
            return ""
        token_bytes = self._tokenizer.token_bytes(token_id)
        if token_bytes is None:
            return self._utf8.decode(b"", True) + self._push_text(token_id)
        if not token_bytes:
            return ""  # an id without a token: padding rows of the embedding
        if not self._context and not self._held and self._tokenizer.has_text_tokens and token_bytes.isascii():
            return self._push_text(token_id)  # a decoder may strip the text's first space, also when it is `<0x20>`
        text = self._release() + self._utf8.decode(token_bytes)
        self._context = [token_id]
        return text

    def flush(self) -> str:
        """Ends the text: returns what was held back, an incomplete character as U+FFFD."""
        return self._release() + self._utf8.decode(b"", True)

    def _push_text(self, token_id: int) -> str:
        self._held.append(token_id)
        if len(self._held) < _MAX_UTF8_BYTES and self._window_text().endswith(_REPLACEMENT):
            # Either a genuine U+FFFD, or a decoder of an unknown kind that shows an incomplete character this way; such
            # a character is complete after four bytes, hence four tokens, at the latest.
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
