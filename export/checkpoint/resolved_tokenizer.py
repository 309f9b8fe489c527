"""Resolves a checkpoint's tokenizer as transformers does, so that a bundle holds one complete one.

Special tokens, added tokens and templates may stand in many files, and which one counts has changed between versions of
transformers. So it is asked: its tokenizer becomes ``tokenizer.json`` (where that file is missing or says something
else), ``tokenizer_config.json`` and ``chat_template.jinja``. Code of a checkpoint is never run; links are followed by
whoever read the files, and not here. Without transformers, or where it cannot read the files, a tokenizer.json is taken
as it is. Where there is only the vocabulary of another library, that is an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from shortstack.export.checkpoint.vocabulary_files import (
    BINARY_FILES,
    SENTENCEPIECE_FILES,
    TEKKEN_FILE,
    check_vocabulary_files,
)
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError, DependencyError, shortened
from shortstack.missing import install_command

MORE_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    *BINARY_FILES,
    TEKKEN_FILE,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""What transformers looks at besides :data:`names.TEXT_FILES`; none of it goes into a bundle."""


PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.\n",
    "  two spaces,\ttabs and\r\nlines ",
    "Größe, naïve, 東京, привет, 🙂👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # 0x1F",
    "",
)
CHAT = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
)

_VOCABULARIES = (*BINARY_FILES, TEKKEN_FILE, "vocab.json", "vocab.txt", "merges.txt")
_NO_TRANSFORMERS = "transformers is not installed"
_AFTER_SENTENCEPIECE = "Error parsing line"  # tiktoken's, which transformers tries next where the first one fails
_LOAD = "import sys, tokenizers; tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode()).encode('a b')"
_LOAD_LIMIT_S = 300
_TIKTOKEN_CACHE = "TIKTOKEN_CACHE_DIR"
_SAVE_AGAIN = "save it again with AutoTokenizer.from_pretrained(...).save_pretrained(...)"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """transformers' tokenizer, and what it makes of some texts.

    Attributes:
        texts: The texts: :data:`PROBES`, and the special tokens in a row.
        ids: Their token ids.
        tokenizer: The tokenizer.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    tokenizer: Any

    def render_chat(self) -> str:
        """Return :data:`CHAT` as its template renders it; it may take any time, and raise anything."""
        text: str = self.tokenizer.apply_chat_template(list(CHAT), tokenize=False, add_generation_prompt=True)
        return text


_MOST_KEPT = 4
_references: dict[str, Reference] = {}


def reference_of(files: Mapping[str, bytes]) -> Reference | None:
    """Return transformers' tokenizer for files that :func:`resolve_tokenizer` returned; None if it had none."""
    return _references.get(_digest(files))


def resolve_tokenizer(
    found: Mapping[str, bytes], model_type: str | None, vocab_size: int | None = None
) -> dict[str, bytes]:
    """Return the text files of a checkpoint with one complete tokenizer in them.

    Args:
        found: The files, content by name: those of :data:`names.TEXT_FILES` and :data:`MORE_FILES` that there are.
        model_type: Of the model's config, by which transformers finds a class if the tokenizer does not name one.
        vocab_size: Of the model's config: rows of the embedding.

    Raises:
        CheckpointError: Loading the tokenizer ends the process, or there is only the vocabulary of another library, and
            that is damaged or of another model.
        DependencyError: A package that reads such a vocabulary is not installed.
    """
    files = {name: content for name, content in found.items() if name in names.TEXT_FILES}
    check_vocabulary_files(found)
    if names.TOKENIZER_FILE in files:
        _check_survives(files[names.TOKENIZER_FILE])
    reference = _load(found, model_type)
    if isinstance(reference, str):
        _take_as_they_are(found, reference)
        return files
    if names.TOKENIZER_FILE not in files:
        _check_conversion(found, reference, vocab_size)
    backend, special = reference.tokenizer.backend_tokenizer, _special_tokens(reference.tokenizer)
    stored = files.get(names.TOKENIZER_FILE)
    if stored is None or not _is_same(stored, backend, reference):
        stored = backend.to_str().encode()
        files[names.TOKENIZER_FILE] = stored
    config = _object(files.get(names.TOKENIZER_CONFIG_FILE, b"{}"))
    config.pop("chat_template", None)
    config |= {
        names.SPECIAL_TOKENS_FIELD: special,
        **{name: token for name, token in special.items() if isinstance(token, str)},
    }
    files[names.TOKENIZER_CONFIG_FILE] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    template = reference.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        files[names.CHAT_TEMPLATE_FILE] = template.encode()
    while len(_references) >= _MOST_KEPT:
        del _references[next(iter(_references))]
    _references[_digest(files)] = reference
    return files


def _digest(files: Mapping[str, bytes]) -> str:
    content = [files.get(name, b"") for name in (names.TOKENIZER_FILE, names.TOKENIZER_CONFIG_FILE)]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


@lru_cache(maxsize=32)
def _check_survives(tokenizer: bytes) -> None:
    """Load a tokenizer.json in another process first: some make the library end the process that loads them.

    Raises:
        CheckpointError: This one does.
    """
    try:
        command = [sys.executable, "-c", _LOAD]
        done = subprocess.run(command, input=tokenizer, capture_output=True, timeout=_LOAD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        what = f"{names.TOKENIZER_FILE} takes longer than {_LOAD_LIMIT_S} seconds to load"
        raise CheckpointError(what, remedy=_SAVE_AGAIN) from None
    if done.returncode < 0:
        signal_name = signal.Signals(-done.returncode).name
        raise CheckpointError(
            f"{names.TOKENIZER_FILE} makes the tokenizers library end the process ({signal_name})", remedy=_SAVE_AGAIN
        )


def _load(found: Mapping[str, bytes], model_type: str | None) -> Reference | str:
    """Return transformers' tokenizer of the files, or why it has none with a tokenizer.json behind it."""
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        return _NO_TRANSFORMERS
    reason = "it has no tokenizer.json for them"
    is_complete = names.TOKENIZER_FILE in found
    other: Any = None  # a tokenizer that is not made of a tokenizer.json
    with tempfile.TemporaryDirectory(prefix="shortstack-") as name, _quiet():
        folder = Path(name)
        for file, content in found.items():
            if not (file == TEKKEN_FILE and is_complete):  # which of the two counts depends on what is installed
                (folder / file).write_bytes(content)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
        for kind in (AutoTokenizer, PreTrainedTokenizerFast):
            try:
                tokenizer = kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
                if not tokenizer.is_fast:
                    other = tokenizer
                    continue
                reference = _probe(tokenizer)
                if other is None or is_complete or all(map(_agrees_with(other), reference.texts, reference.ids)):
                    return reference
                reason = f"what a tokenizer.json can do differs from {type(other).__name__}"
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic of the tokenizers library is no Exception
                reason = _reason(error).replace(f"{folder}/", "")
    if _AFTER_SENTENCEPIECE in reason and any(found.get(file, b"")[:1] == b"\n" for file in SENTENCEPIECE_FILES):
        reason = "the SentencePiece model is damaged"
    return reason


def _take_as_they_are(found: Mapping[str, bytes], reason: str) -> None:
    """Say why transformers was not asked; raise where the files alone hold no tokenizer.json."""
    if names.TOKENIZER_FILE not in found:
        vocabularies = [name for name in _VOCABULARIES if name in found]
        if not vocabularies:
            return  # there is no tokenizer at all, which the export says
        if reason == _NO_TRANSFORMERS:
            raise DependencyError(
                f"{vocabularies[0]} needs 'transformers' to become {names.TOKENIZER_FILE}, and it is not installed. "
                f"Run: {install_command(('export',))}"
            )
        raise CheckpointError(
            f"transformers makes no {names.TOKENIZER_FILE} of {' and '.join(vocabularies)}: {reason}",
            remedy=f"download the files again, or put a {names.TOKENIZER_FILE} next to them",
        )
    if reason == _NO_TRANSFORMERS:
        log.info("%s: the tokenizer's files are taken as they are", reason)
        return
    is_sound = _own(found[names.TOKENIZER_FILE]) is not None
    level = logging.WARNING if is_sound else logging.INFO  # else the export is refused, and that says enough
    log.log(level, "transformers cannot read the tokenizer, so its files are taken as they are: %s", reason)


def _check_conversion(found: Mapping[str, bytes], reference: Reference, vocab_size: int | None) -> None:
    """Raise where a tokenizer that was made of other files is not this model's, or not what its files are for."""
    what = f"the {names.TOKENIZER_FILE} made of {' and '.join(name for name in _VOCABULARIES if name in found)}"
    remedy = f"put the model's own {names.TOKENIZER_FILE} next to its weights"
    highest = max((index for ids in reference.ids[: len(PROBES)] for index in ids), default=0)
    if vocab_size is not None and highest >= vocab_size:
        raise CheckpointError(
            f"{what} is of another model", found=f"token {highest}", expected=f"ids below {vocab_size}", remedy=remedy
        )
    text = str(reference.tokenizer.decode(reference.ids[0], skip_special_tokens=True))
    if text.split() != PROBES[0].split():
        raise CheckpointError(f"{what} cannot spell {PROBES[0].strip()!r}", found=repr(text), remedy=remedy)


def _agrees_with(tokenizer: Any) -> Callable[[str, tuple[int, ...]], bool]:
    return lambda text, ids: tuple(tokenizer(text)["input_ids"]) == ids


def _reason(error: BaseException) -> str:
    """Return an error of another library in one line; the message of a KeyError is a key alone."""
    said = " ".join(str(error).split())
    kind = type(error).__name__
    return shortened(f"{kind}: {said}" if isinstance(error, LookupError) or not said else said)


def _probe(tokenizer: Any) -> Reference:
    model = tokenizer.backend_tokenizer.model
    if getattr(model, "dropout", None):
        log.warning("the tokenizer drops merges at random, as in training (BPE dropout): that is switched off")
        model.dropout = None
    special = [token for token in _special_tokens(tokenizer).values() if isinstance(token, str)]
    texts = (*PROBES, " ".join(special))
    return Reference(texts, tuple(tuple(tokenizer(text)["input_ids"]) for text in texts), tokenizer)


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """Return the special tokens by name, as transformers gives them to templates."""
    return {name: token for name, token in tokenizer.special_tokens_map.items() if token is not None}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own lines off stderr, and copies of what tiktoken reads out of the folder for such."""
    from transformers.utils import logging as their_log

    before, cache = their_log.get_verbosity(), os.environ.get(_TIKTOKEN_CACHE)
    their_log.set_verbosity(their_log.CRITICAL)
    os.environ[_TIKTOKEN_CACHE] = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        their_log.set_verbosity(before)
        del os.environ[_TIKTOKEN_CACHE]
        if cache is not None:
            os.environ[_TIKTOKEN_CACHE] = cache


def _is_same(stored: bytes, backend: Tokenizer, reference: Reference) -> bool:
    """Whether the checkpoint's own tokenizer.json says what transformers says, so that it can stay as it is."""
    own = _own(stored)
    if own is None or getattr(own.model, "dropout", None):
        return False
    own.no_truncation()
    own.no_padding()
    same_tokens = _tokens(own) == _tokens(backend)
    return same_tokens and all(
        tuple(own.encode(text).ids) == ids for text, ids in zip(reference.texts, reference.ids, strict=True)
    )


def _own(stored: bytes) -> Tokenizer | None:
    """Return the tokenizer of a tokenizer.json; None if it is not one."""
    try:
        return Tokenizer.from_str(stored.decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic is no Exception
        return None


def _tokens(tokenizer: Tokenizer) -> dict[int, tuple[str, bool]]:
    return {index: (token.content, token.special) for index, token in tokenizer.get_added_tokens_decoder().items()}


def _object(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    return value if isinstance(value, dict) else {}
