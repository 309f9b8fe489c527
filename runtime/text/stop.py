"""Stop strings: they end a text where one of them appears, no matter how the text was cut into pieces.

For the decoding loops and their callers. Knows text only, neither tokens nor models. A piece of text goes in, and the
part that can be shown comes out. The part that might still become a stop string is held back::

    stops = ["</s>"]     push("Hi <")    -> ("Hi ", False)     "<" may be the beginning of "</s>"
                         push("b>")      -> ("<b>", False)     it was not
                         push("!</s>x")  -> ("!", True)        the stop string and the text after it are dropped

Special tokens are part of the text that is searched, but not of the text that is shown: they are *hidden*. A stop
string matches with the hidden text (``<|im_end|>``, as in transformers) and also without it, as the reader sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shortstack.graphs.errors import RequestError


class StopStrings:
    """Watches a growing text for the first of several stop strings.

    The stop string that *completes* first wins, as if the text arrived character by character. If several complete at
    the same character, the longest wins. So the outcome does not depend on how the text was cut into pieces.

    Args:
        strings: The stop strings. An empty sequence is valid; then nothing is held back.

    Raises:
        RequestError: One of ``strings`` is empty or not a string, or ``strings`` itself is a bare string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str):
            raise RequestError("stop strings", found=f"one bare string {strings!r}", expected="a sequence of strings")
        for index, string in enumerate(strings):
            if not isinstance(string, str) or not string:
                raise RequestError(
                    f"stop strings, number {index}",
                    found=repr(string),
                    expected="a string of at least one character",
                    remedy="leave it out to generate without it",
                )
        self._strings = tuple(dict.fromkeys(strings))
        self._held = ""  # text that might still become a stop string, hidden text included
        self._is_shown: list[bool] = []  # for each of its characters
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text; None as long as the text goes on."""
        return self._matched

    def push(self, text: str, hidden: str = "") -> tuple[str, bool]:
        """Add a piece of text.

        Args:
            text: Text to show.
            hidden: Text after it that is never shown: that of a special token.

        Returns:
            The text that is now safe to show, and whether a stop string is complete. From then on every call returns
            True, and later pieces are dropped.
        """
        if self._matched is not None:
            return "", True
        self._held += text + hidden
        self._is_shown += [True] * len(text) + [False] * len(hidden)
        whole = range(len(self._held))
        shown = whole if all(self._is_shown) else [place for place in whole if self._is_shown[place]]
        found = [match for places in (whole, shown) for match in self._matches(places)]
        if found:
            _, _, start, self._matched = min(found)
            before = self._take(start)
            self._held, self._is_shown = "", []
            return before, True
        return self._take(min(self._first_undecided(places) for places in (whole, shown))), False

    def flush(self) -> str:
        """Return the text held back, when a generation ends without a stop string."""
        return self._take(len(self._held))

    def _take(self, end: int) -> str:
        """Return what is shown of the first ``end`` characters, and drop these."""
        text = "".join(char for char, shown in zip(self._held[:end], self._is_shown, strict=False) if shown)
        self._held, self._is_shown = self._held[end:], self._is_shown[end:]
        return text

    def _matches(self, places: Sequence[int]) -> Iterator[tuple[int, int, int, str]]:
        """Yield the first match of each string in the characters at ``places``, as (end, -length, start, string).

        The smallest entry completes first, and is the longest of those that end there. It is enough to look at the
        first occurrence of each string, since it ends before all others.
        """
        text = self._text(places)
        for string in self._strings:
            if (start := text.find(string)) >= 0:
                yield places[start + len(string) - 1], -len(string), places[start], string

    def _first_undecided(self, places: Sequence[int]) -> int:
        """Return where the longest ending of the characters at ``places`` begins that may become a stop string."""
        text, longest = self._text(places), 0
        for string in self._strings:
            for length in range(min(len(string) - 1, len(text)), longest, -1):
                if text.endswith(string[:length]):
                    longest = length
                    break
        return places[-longest] if longest else len(self._held)

    def _text(self, places: Sequence[int]) -> str:
        return self._held if len(places) == len(self._held) else "".join(self._held[place] for place in places)
