"""The errors a user can meet, in one small tree; the CLI prints each and exits with its code.

::

    ShortstackError            every error shortstack raises on purpose (exit code 2)
    ├── CheckpointError        the input model: a missing, extra or misshapen tensor, a bad config field
    │   └── UnsupportedError   a valid model, or option of one, that this version cannot export
    ├── BundleError            the folder on disk: bundle.json, sizes, hashes, file names
    ├── ContractError          a graph whose inputs or outputs differ from the contract
    ├── RequestError           what the caller asked for: prompt, lengths, sampling options, providers
    ├── DependencyError        an optional dependency that is not installed
    └── ParityError            two implementations of one model disagree (exit code 1: a finding, not a misuse)

A message has up to four parts: what is wrong and where, what was found, what was expected, and what to do next. Build
it with the keyword arguments, so that no part is forgotten, and collect all differences before raising. What was found
may come from a hostile file: it is cut short, and characters that a terminal would act on are escaped.

Exit codes of every command::

    0    done
    1    a finding: the command ran and its answer is "no" (parity)
    2    a misuse, or an input that cannot be used: one line on stderr says what to do
    130  interrupted
"""

from __future__ import annotations

MAX_FOUND = 200
"""Characters of a found value that a message shows."""

INTERRUPTED = 130
"""The exit code of an interrupted command: 128 + SIGINT, what shells report."""


class ShortstackError(Exception):
    """Base of every error that shortstack raises on purpose.

    Args:
        what: One clause: what is wrong, and where (file, field, tensor, option).
        found: What is there, if that helps.
        expected: What should be there.
        remedy: What the user can do next, as an imperative sentence without a full stop.

    Attributes:
        problem: The message without the remedy, for who knows a better one.
        has_remedy: The message says what to do next.
    """

    exit_code = 2

    def __init__(self, what: str, *, found: object = None, expected: object = None, remedy: str | None = None) -> None:
        message = what
        if found is not None:
            message += f": found {shortened(str(found))}"
        if expected is not None:
            message += f", expected {expected}" if found is not None else f": expected {expected}"
        self.problem = message
        self.has_remedy = remedy is not None
        if remedy is not None:
            message += f". {remedy[0].upper()}{remedy[1:]}."
        super().__init__("".join(map(_escaped, message)))


class CheckpointError(ShortstackError):
    """The input model cannot be read: a missing, extra or misshapen tensor, or a bad config field."""


class UnsupportedError(CheckpointError):
    """A valid model, or an option of one, that this version cannot export."""


class BundleError(ShortstackError):
    """A bundle folder is not what its bundle.json says, or bundle.json itself is unusable."""


class ContractError(ShortstackError):
    """A graph's inputs or outputs differ from the contract in :mod:`shortstack.graphs.contract`."""


class RequestError(ShortstackError):
    """The caller asked for something that cannot be done: prompt, lengths, sampling options, providers."""


class DependencyError(ShortstackError):
    """An optional dependency is not installed."""


class ParityError(ShortstackError):
    """Two implementations of one model disagree beyond the tolerance."""

    exit_code = 1


def shortened(text: str, limit: int = MAX_FOUND) -> str:
    """Return a found value as messages show it: whole, or its first ``limit`` characters and how many were left out."""
    left_out = len(text) - limit
    return text if left_out <= 0 else f"{text[:limit]}... ({left_out} more characters)"


def _escaped(character: str) -> str:
    """Return a character, or its escape if a terminal would act on it or could not encode it; lines stay lines."""
    if character.isprintable() or character == "\n":
        return character
    return character.encode("unicode_escape").decode("ascii")
