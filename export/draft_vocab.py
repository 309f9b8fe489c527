"""Which token ids a trimmed exit head keeps: the most frequent ones of a text, and every id that ends or frames a turn.

Trimming is lossless after verification: a token that the draft head cannot propose is emitted by the final head
instead.
Idea: FR-Spec (arXiv 2502.14856); choosing by text of the model's own making: VocabTrim (arXiv 2506.22694).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from shortstack.graphs.errors import RequestError

DEFAULT_TEXT = Path(__file__).resolve().parent.parent / "samples" / "draft_vocab.txt"


def choose_draft_vocab(
    tokenizer_json: bytes, text_file: Path | None, size: int, vocab_size: int
) -> npt.NDArray[np.int64]:
    """Return the token ids of a trimmed head, ascending int64 [size].

    Added special tokens come first, then ids by falling frequency in the text, then the lowest ids (byte-pair merges
    are numbered by falling frequency).

    Args:
        tokenizer_json: The model's tokenizer.
        text_file: UTF-8 text; None takes the one that ships with shortstack.
        size: How many ids.
        vocab_size: Rows of the full head.

    Raises:
        RequestError: The size is out of range, or the text cannot be read or is empty.
    """
    if not 2 <= size <= vocab_size:
        raise RequestError("--draft-vocab", found=size, expected=f"2..{vocab_size}, the size of the model's vocabulary")
    path = text_file or DEFAULT_TEXT
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--draft-text {path} cannot be read: {error}", remedy="give a UTF-8 text file") from None
    if not text.strip():
        raise RequestError(f"--draft-text {path} is empty", remedy="give a text of at least a few thousand words")
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False):
        counts.update(encoding.ids)
    special = sorted(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    frequent = [token for token, _ in counts.most_common()]
    ranked = dict.fromkeys(i for i in (*special, *frequent, *range(vocab_size)) if i < vocab_size)
    return np.array(sorted(list(ranked)[:size]), dtype=np.int64)
