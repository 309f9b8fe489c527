"""Training text: JSON lines in, token ids and the positions that count out, batch by batch in an order a seed fixes.

A row is one of::

    {"utterance": ..., "parse": ...}    any fields, put together by a prompt template and a completion template
    {"p": [ids], "o": [ids]}            a prompt and an answer that are token ids already, as self_data writes them

Only the completion's tokens are learnt; the prompt is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from shortstack.graphs.errors import RequestError
from shortstack.graphs.read_file import parse_json_object, read_text

_WINDOW_BATCHES = 16  # examples of as many batches are sorted by length together, so that little is padding


@dataclass(frozen=True, slots=True)
class Example:
    """One text.

    Attributes:
        ids: Its token ids.
        start: The first token that is to be predicted.
    """

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Several texts.

    Attributes:
        ids: Token ids [batch, seq], padded behind.
        rows: Which of the batch * seq positions predict a token that counts, int64 [rows].
        targets: The token each of them should predict, int64 [rows].
        tokens: Tokens that are not padding.
    """

    ids: Tensor
    rows: Tensor
    targets: Tensor
    tokens: int

    def to(self, device: str) -> Batch:
        """Return the batch on another device."""
        return Batch(self.ids.to(device), self.rows.to(device), self.targets.to(device), self.tokens)


def read_examples(
    file: Path, tokenizer: Tokenizer, prompt: str, completion: str, end: Sequence[int], max_tokens: int
) -> list[Example]:
    r"""Read training text.

    Args:
        file: JSON lines.
        tokenizer: Turns text into ids; no special tokens are added.
        prompt: Template of the prompt over a row's fields, such as ``{utterance}\n``; may be empty.
        completion: Template of the completion.
        end: Token ids behind each completion that is text.
        max_tokens: Longer texts are cut.

    Raises:
        RequestError: The file cannot be read, or a row lacks the fields.
    """
    examples = []
    for where, row in _rows(file):
        if isinstance(row.get("p"), list) and isinstance(row.get("o"), list):
            before, after = _ids(row["p"], tokenizer, where), _ids(row["o"], tokenizer, where)
        else:
            texts = _texts(row, where, prompt, completion)
            before, after = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
            after = [*after, *end]
        ids = (*before, *after)[:max_tokens]
        start = max(len(before), 1)
        if start < len(ids):
            examples.append(Example(ids, start))
    if not examples:
        raise RequestError(f"{file} holds no text to learn from", expected=f"rows shorter than {max_tokens} tokens")
    return examples


def read_texts(file: Path, prompt: str, completion: str) -> list[str]:
    """Read the same file as plain text, prompt and completion joined, for a tokenizer to learn from.

    Raises:
        RequestError: As in :func:`read_examples`.
    """
    return ["".join(_texts(row, where, prompt, completion)) for where, row in _rows(file)]


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row, and where it stands."""
    lines = read_text(file, RequestError, "name a file of JSON lines").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        yield where, parse_json_object(line, where, RequestError, "write one JSON object per line")


def _texts(row: dict[str, Any], where: str, prompt: str, completion: str) -> tuple[str, str]:
    try:
        return prompt.format_map(row), completion.format_map(row)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise RequestError(
            f"{where}: the templates {prompt!r} and {completion!r} do not fit",
            found=f"fields {', '.join(row)}",
            expected=str(error),
            remedy="name fields of the rows in --prompt and --completion",
        ) from None


def _ids(values: list[Any], tokenizer: Tokenizer, where: str) -> list[int]:
    vocab = tokenizer.get_vocab_size()
    if not all(type(value) is int and 0 <= value < vocab for value in values):
        raise RequestError(f"{where}: p and o", expected=f"token ids below {vocab}", remedy="use this model's own data")
    return values


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to one batch."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    rows: list[int] = []
    targets: list[int] = []
    for index, example in enumerate(examples):
        ids[index, : len(example.ids)] = torch.tensor(example.ids)
        rows += range(index * width + example.start - 1, index * width + len(example.ids) - 1)
        targets += example.ids[example.start :]
    return Batch(ids, torch.tensor(rows), torch.tensor(targets), sum(len(example.ids) for example in examples))


class Batches:
    """The batches of a run: batch ``i`` is the same whenever and however often it is asked for.

    Args:
        examples: The texts.
        size: Texts in one batch.
        seed: Fixes the order.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int) -> None:
        self._examples = examples
        self._size = min(size, len(examples))
        self._seed = seed
        self._epoch = -1
        self._order: list[list[int]] = []
        self.per_epoch = len(examples) // self._size

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        return collate([self._examples[i] for i in self._order[place]])

    def _shuffled(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._examples))[: self.per_epoch * self._size]
        window = self._size * _WINDOW_BATCHES
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window].tolist(), key=lambda i: len(self._examples[i].ids))
            batches += [near[i : i + self._size] for i in range(0, len(near), self._size)]
        random.shuffle(batches)
        return batches
