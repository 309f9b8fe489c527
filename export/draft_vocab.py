"""Chooses the token ids that a trimmed exit head keeps: those that end or frame a turn, and the most frequent ones.

Trimming is lossless after verification: the final head emits the tokens that the draft head cannot propose. The idea is
that of FR-Spec (arXiv 2502.14856). VocabTrim (arXiv 2506.22694) chooses the ids by text that the model itself wrote.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from shortstack.graphs import names
from shortstack.graphs.errors import RequestError
from shortstack.graphs.read_file import read_text
from shortstack.graphs.texts import DRAFT_VOCAB_TEXT


def choose_draft_vocab(
    files: Mapping[str, bytes], text_file: Path | None, size: int, vocab_size: int
) -> npt.NDArray[np.int64]:
    """Return the token ids of a trimmed head, ascending int64 [size].

    First come the special tokens that end or frame a turn (those of the chat template and of the generation defaults),
    then ids by falling frequency in the text, then the lowest ids: byte-pair merges are numbered by falling frequency.

    Args:
        files: The model's text files by name, its tokenizer among them.
        text_file: UTF-8 text; None takes the one that ships with shortstack.
        size: How many ids to keep.
        vocab_size: Rows of the full head.

    Raises:
        RequestError: The size is out of range, or the text cannot be read or is empty.
    """
    if not 2 <= size <= vocab_size:
        raise RequestError(
            "--draft-vocab",
            found=size,
            expected=f"2..{vocab_size}, the size of the model's vocabulary",
            remedy="choose a size in that range; 4096 is a good start",
        )
    text = read_draft_text(text_file or DRAFT_VOCAB_TEXT)
    tokenizer = Tokenizer.from_str(files[names.TOKENIZER_FILE].decode())
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False):
        counts.update(encoding.ids)
    frequent = [token for token, _ in counts.most_common()]
    ranked = dict.fromkeys(
        i for i in (*_turn_tokens(tokenizer, files), *frequent, *range(vocab_size)) if i < vocab_size
    )
    return np.array(sorted(list(ranked)[:size]), dtype=np.int64)


def read_draft_text(path: Path) -> str:
    """Return the text that ids are chosen by.

    Raises:
        RequestError: It cannot be read or is empty.
    """
    text = read_text(path, RequestError, "give a UTF-8 text file", called=f"--draft-text {path}")
    if not text.strip():
        raise RequestError(f"--draft-text {path} is empty", remedy="give a text of at least a few thousand words")
    return text


def _turn_tokens(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> list[int]:
    """Return the ids of special tokens that the chat template or the generation defaults name."""
    template = files.get(names.CHAT_TEMPLATE_FILE, b"").decode(errors="replace")
    defaults = json.loads(files.get(names.GENERATION_CONFIG_FILE, b"{}"))
    ids = [defaults.get(f"{kind}_token_id") for kind in ("eos", "bos")]
    named = {i for entry in ids for i in (entry if isinstance(entry, list) else [entry])}
    special = tokenizer.get_added_tokens_decoder().items()
    return [i for i, token in special if token.special and (i in named or token.content in template)]
