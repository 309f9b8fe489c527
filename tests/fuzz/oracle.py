"""What is right after a command has accepted an input: the same tokens by every strategy, and those of transformers.

Each function runs in a forked process of its own. It yields why the result is right, as far as it has looked: what it
yields last counts. It yields :data:`UNREADABLE` before it turns to transformers, which may refuse the input or die of
it. :class:`WrongError` says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shortstack
from shortstack import ExitPolicy, Model
from shortstack.graphs.errors import ContractError, RequestError, ShortstackError
from shortstack.runtime.early_exit.expression import parse_criterion

Oracle = Callable[[Path], Iterator[str]]
"""Takes the folder of an input."""

TOKENS = 8
TEXTS = ("Turn the light on.", "<|im_start|>user\nHi<|im_end|>", " two  spaces", "größe 大 🙂", "<|end|>x")
MESSAGES = [{"role": "user", "content": "Turn the light on."}]
RIGHT = "right"
UNREADABLE = "right (transformers refuses it)"


class WrongError(Exception):
    """The command accepted an input, and what it made of it is wrong."""


def said_so(folder: Path) -> Iterator[str]:
    """Whatever was accepted has been used: the output is there."""
    if not (folder / "out").is_file():
        raise WrongError("the command succeeded, and its output is not there")
    yield RIGHT


def decodes_alike(folder: Path) -> Iterator[str]:
    """What was written loads, and decodes alike in every way."""
    _check_exact(_load(folder / "out"))
    yield RIGHT


def still_exact(folder: Path) -> Iterator[str]:
    """A bundle that a command accepted may be refused by another one; if it loads, it decodes alike in every way.

    What a command wrote must load. Weights that overflow are named in decoding.
    """
    if (folder / "out").exists():
        _load(folder / "out")
    for bundle in (folder / "in", folder / "out"):
        if not bundle.exists():
            continue
        try:
            model = shortstack.load(bundle, threads=1)
        except ShortstackError:
            continue
        with suppress(RequestError):  # a context or a vocabulary that is too small for the prompt
            _check_exact(model)
    yield RIGHT


def as_transformers(folder: Path) -> Iterator[str]:
    """The exported bundle decodes as transformers does from the same folder."""
    model = _load(folder / "out")
    vocab_size = model.bundle.manifest.spec.vocab_size
    ids = [token % vocab_size for token in (5, 71, 33, 140, 9)]
    ours = _check_exact(model, ids)
    if ours is None:
        yield RIGHT
        return
    yield UNREADABLE
    with suppress(Exception):
        theirs = AutoModelForCausalLM.from_pretrained(folder / "in", dtype=torch.float32).eval()
        text = torch.tensor([ids])
        with torch.no_grad():
            for _ in range(TOKENS):
                text = torch.cat([text, theirs(text).logits[:, -1:].argmax(-1)], 1)
        yield _compared("tokens", text[0, len(ids) :].tolist(), ours)


def as_tokenizer(folder: Path) -> Iterator[str]:
    """Texts become the same ids as with transformers' tokenizer."""
    model = _load(folder / "out")
    ours = [[int(token) for token in model.encode(text)] for text in TEXTS]
    yield UNREADABLE
    with suppress(Exception):
        theirs = AutoTokenizer.from_pretrained(folder / "in")
        yield _compared("ids", [list(theirs(text)["input_ids"]) for text in TEXTS], ours)


def as_template(folder: Path) -> Iterator[str]:
    """A chat is rendered as transformers renders it; what transformers renders is not refused."""
    model = _load(folder / "out")
    ours: list[int] | str
    try:
        ours = [int(token) for token in model.encode(MESSAGES)]
    except ShortstackError as error:
        ours = f"refused: {error}"
    yield UNREADABLE
    with suppress(Exception):
        theirs = AutoTokenizer.from_pretrained(folder / "in").apply_chat_template(
            MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if len(theirs) < model.bundle.manifest.max_length:  # a longer one is refused, and may be
            yield _compared("ids of a chat", list(theirs), ours)


def _compared(what: str, theirs: object, ours: object) -> str:
    return RIGHT if theirs == ours else f"wrong {what}: transformers says {theirs}, the bundle {ours}"[:1000]


def _load(bundle: Path) -> Model:
    try:
        return shortstack.load(bundle, threads=1)
    except ShortstackError as error:
        raise WrongError(f"what was accepted does not load: {error}") from None


def _check_exact(model: Model, ids: list[int] | None = None) -> list[int] | None:
    """Decode plainly, self-speculatively and with verified exits; return the tokens, which must be the same.

    Damaged weights may overflow, which decoding refuses by name. Where plain decoding does so, all others must, and the
    result is None; exits have weights of their own, so that others may do so where it does not.
    """
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
    ids = [3, 5, 4, 6] if ids is None else ids
    plain = _tokens_or_refusal(model, ids, **options)
    if model.exit_layers:
        verified = ExitPolicy(parse_criterion("top_prob >= 0.3"), verify="exact")
        for way in ({"strategy": "self-speculative"}, {"exits": verified}):
            found = _tokens_or_refusal(model, ids, **way, **options)
            if found != plain and (found is not None or plain is None):
                raise WrongError(f"plain decoding says {plain}, {next(iter(way))} {found}")
    return plain


def _tokens_or_refusal(model: Model, ids: list[int], **options: Any) -> list[int] | None:
    """Return the tokens, or None where the model's output is refused as no numbers."""
    try:
        return list(model.generate(ids, **options).tokens)
    except ContractError as error:
        if "the model's output is not valid" not in str(error):
            raise
        return None
