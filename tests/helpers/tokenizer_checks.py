"""Compares the tokenizer of a bundle, as the runtime uses it, with transformers' own."""

from __future__ import annotations

from typing import Any

from shortstack.runtime.text.stream_decoder import StreamDecoder
from shortstack.runtime.text.tokenizer import Tokenizer

TEXTS = (
    "",
    " ",
    "\n",
    "\t",
    "Hello, world! It's 12345 o'clock; we'LL see. I'm, HE'S, don'T, 'tis ''",
    "123456789012 1 22 333 4444 ١٢٣ 一二三 0x1F 1e-9",
    "http://example.org/a?b=c&d=%20#e  user@example.org <html>&nbsp;</html>",
    "Größe, naïve café, Ærø, İstanbul, ẞ, ﬁne e\u0301 n\u0303 \u1e9b\u0323 ｶﾞ",
    "東京都に行きました。你好,世界!안녕하세요 세계",
    "Привет, мир! Γειά σου. שלום עולם مرحبا بالعالم हिन्दी में नमस्ते ภาษาไทย",  # noqa: RUF001 - Greek
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇯🇵 ❤️ 𓀀𝔘𝔫𝔦 \ue000 \U0010ffff",
    "def f(x):\n\tif x:\n\t\t    return  x**2   # 0x1F\r\n\n\n\nclass A:\n        pass\n\t\t\t\t",
    "   leading",
    "trailing   ",
    "          ",
    "\n\n\n\n\n",
    "a  b   c    d     e\u00a0f\u2003g\u3000h",
    "\x00\x01\x02\x07\x08\x1b[0m\x7f\x80\x9f\xad\u200b\u200d\u2028\u2029\ufeff\ufffe\uffff",
    "\u2581under\u2581\u2581score ▁▁▁ ▁",
    "<|no_token|> [INST] <<SYS>> </s",
)


def assert_equal(ours: Tokenizer, theirs: Any, texts: tuple[str, ...] = TEXTS) -> int:
    """Compare ids, text and streamed text of some texts, and of the special tokens among them; return how many."""
    special = [token.content for token in theirs.added_tokens_decoder.values()]
    some = special[:: max(1, len(special) // 100)]
    texts = (*texts, "".join(some[:40]), " ".join(some[:40]), *(f"a{token}b {token} c\n{token}" for token in some))
    for text in texts:
        for adds in (True, False):
            ids = theirs(text, add_special_tokens=adds)["input_ids"]
            assert ours.encode(text, add_special_tokens=adds) == ids, text
            for skips in (True, False):
                whole = theirs.decode(ids, skip_special_tokens=skips)
                assert ours.decode(ids, skip_special_tokens=skips) == whole, text
                assert "".join(streamed(ours, ids, skips)) == whole, text
    return len(texts)


def streamed(tokenizer: Tokenizer, ids: list[int], skips: bool) -> list[str]:
    """Return the pieces of text, one a token and one at the end."""
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skips)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]
