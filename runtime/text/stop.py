"""Stop strings: they end a text where one of them appears, no matter how the text was cut into pieces.

For the decoding loops and their callers. Knows text only, neither tokens nor models. A piece of text goes in, and the
part that can be shown comes out. The part that might still become a stop string is held back::

    stops = ["</s>"]     push("Hi <")    -> ("Hi ", False)     "<" may be the beginning of "</s>"
                         push("b>")      -> ("<b>", False)     it was not
                         push("!</s>x")  -> ("!", True)        the stop string and the text after it are dropped
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text; None as long as the text goes on."""
        return self._matched

    def push(self, text: str) -> tuple[str, bool]:
        """Add a piece of text.

        Returns:
            The text that is now safe to show, and whether a stop string is complete. From then on every call returns
            True, and later pieces are dropped.
        """
        if self._matched is not None:
            return "", True
        text = self._held + text
        # (end, -length, string): the smallest entry completes first, and is the longest of those that end there. It is
        # enough to look at the first occurrence of each string, since it ends before all others.
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
        """Return the text held back, when a generation ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _held_chars(self, text: str) -> int:
        """Return the length of the longest suffix of ``text`` that is a proper prefix of a stop string."""
        longest = 0
        for string in self._strings:
            for length in range(min(len(string) - 1, len(text)), longest, -1):
                if text.endswith(string[:length]):
                    longest = length
                    break
        return longest
