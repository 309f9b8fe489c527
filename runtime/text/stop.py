"""Stop strings: end a text where one of several strings appears, wherever the borders between its pieces fall.

For the decode loop and its callers. Knows text only: neither tokens nor models. A piece of text goes in, the part that
can be shown comes out; what might still become a stop string is held back::

    stops = ["</s>"]     push("Hi <")    -> ("Hi ", False)     "<" may be the beginning of "</s>"
                         push("b>")      -> ("<b>", False)     it was not
                         push("!</s>x")  -> ("!", True)        the stop string and what follows it are dropped
"""

from __future__ import annotations

from collections.abc import Sequence

from shortstack.graphs.errors import RequestError


class StopStrings:
    """Watches a growing text for the first of several stop strings.

    The stop string that *completes* first wins, as it would if the text arrived character by character; of several that
    complete at the same character, the longest wins. So the outcome does not depend on how the text was cut in pieces.

    Args:
        strings: The stop strings; none at all is fine and holds nothing back.

    Raises:
        RequestError: One of ``strings`` is empty or not a string, or ``strings`` is itself one bare string.
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
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, or None while none has."""
        return self._matched

    def push(self, text: str) -> tuple[str, bool]:
        """Adds a piece of text.

        Returns:
            The text that is now safe to show, and whether a stop string completed. Once it has, this and every later
            call return True, and later pieces are dropped.
        """
        if self._matched is not None:
            return "", True
        text = self._held + text
        # (end, -length, string): the smallest completes first, and is the longest of those that end there. The first
        # occurrence of a string is the one of its occurrences that ends first.
        matches = [
            (start + len(string), -len(string), string) for string in self._strings if (start := text.find(string)) >= 0
        ]
        if matches:
            end, negative_length, self._matched = min(matches)
            self._held = ""
            return text[: end + negative_length], True
        safe = len(text) - self._held_chars(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Returns the text held back, for the end of a generation that no stop string ended."""
        held, self._held = self._held, ""
        return held

    def _held_chars(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that is a proper prefix of a stop string."""
        longest = 0
        for string in self._strings:
            for length in range(min(len(string) - 1, len(text)), longest, -1):
                if text.endswith(string[:length]):
                    longest = length
                    break
        return longest
