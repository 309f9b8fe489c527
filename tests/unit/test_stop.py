"""Stop strings compared with their definition: the first to complete wins, as if text came character by character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortstack.graphs.errors import RequestError
from shortstack.runtime.text.stop import StopStrings

# Three letters make overlaps and repeats likely.
texts = st.text("abc", max_size=30)
stop_strings = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)
pieces = st.lists(st.text("abc", max_size=6), max_size=12)


def oracle(text: str, strings: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        completed = [string for string in strings if text[:end].endswith(string)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


def fed(parts: list[str], strings: list[str]) -> tuple[str, bool]:
    stop = StopStrings(strings)
    shown = ""
    for part in parts:
        text, stopped = stop.push(part)
        shown += text
        if stopped:
            return shown, True
    return shown + stop.flush(), False


@given(pieces, stop_strings)
def test_the_shown_text_follows_the_definition_for_any_pieces(parts: list[str], strings: list[str]) -> None:
    assert fed(parts, strings) == oracle("".join(parts), strings)


@given(texts, stop_strings)
def test_one_piece_and_single_characters_end_in_the_same_way(text: str, strings: list[str]) -> None:
    assert fed([text], strings) == fed(list(text), strings)


@given(pieces, stop_strings)
def test_what_is_held_back_is_the_longest_suffix_that_can_still_become_a_stop_string(
    parts: list[str], strings: list[str]
) -> None:
    stop = StopStrings(strings)
    seen = shown = ""
    for part in parts:
        text, stopped = stop.push(part)
        if stopped:
            return
        seen, shown = seen + part, shown + text
        prefixes = {string[:length] for string in strings for length in range(1, len(string))}
        held = max((prefix for prefix in prefixes if seen.endswith(prefix)), key=len, default="")
        assert shown + held == seen


def test_a_stop_string_split_over_three_pieces_is_found_and_not_shown() -> None:
    stop = StopStrings(["<|end|>"])
    assert stop.push("done <|") == ("done ", False)
    assert stop.push("en") == ("", False)
    assert stop.push("d|> and more") == ("", True)
    assert stop.matched == "<|end|>"


def test_a_false_start_is_shown_as_soon_as_it_cannot_become_a_stop_string() -> None:
    stop = StopStrings(["\n\nUser:"])
    assert stop.push("a\n\n") == ("a", False)
    assert stop.push("Use") == ("", False)
    assert stop.push("ful") == ("\n\nUseful", False)


def test_a_stop_string_that_begins_inside_a_false_start_is_still_found() -> None:
    stop = StopStrings(["aab"])
    assert [stop.push(char) for char in "aaab"] == [("", False), ("", False), ("a", False), ("", True)]


def test_the_string_that_completes_first_wins_over_the_one_that_begins_first() -> None:
    assert fed(["xabcd"], ["abcd", "c"]) == ("xab", True)


def test_of_two_stop_strings_that_complete_together_the_longer_is_cut_off() -> None:
    assert fed(["xabc"], ["c", "abc"]) == ("x", True)


def test_after_a_stop_string_nothing_more_is_shown() -> None:
    stop = StopStrings(["."])
    assert stop.push("a.b") == ("a", True)
    assert stop.push("c") == ("", True)
    assert stop.flush() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    stop = StopStrings([])
    assert stop.push("abc") == ("abc", False)
    assert stop.matched is None


def test_flush_returns_the_held_text_once() -> None:
    stop = StopStrings(["ab"])
    assert stop.push("a") == ("", False)
    assert stop.flush() == "a"
    assert stop.flush() == ""


def test_an_empty_stop_string_is_refused_with_its_place() -> None:
    with pytest.raises(RequestError, match="number 1: found ''"):
        StopStrings(["a", ""])


def test_a_bare_string_is_refused_since_it_would_stop_at_each_of_its_letters() -> None:
    with pytest.raises(RequestError, match="a sequence of strings"):
        StopStrings("stop")


hidden_pieces = st.lists(st.tuples(st.text("abc", max_size=3), st.text("abc", max_size=3)), max_size=8)


@given(hidden_pieces, stop_strings)
def test_hidden_text_is_searched_but_never_shown(parts: list[tuple[str, str]], strings: list[str]) -> None:
    stop = StopStrings(strings)
    shown, stopped = "", False
    for text, hidden in parts:
        piece, stopped = stop.push(text, hidden)
        shown += piece
        if stopped:
            break
    else:
        shown += stop.flush()

    marked = [(char, not is_hidden) for pair in parts for is_hidden, text in enumerate(pair) for char in text]
    expected, is_expected = "".join(char for char, is_shown in marked if is_shown), False
    for end in range(1, len(marked) + 1):
        whole = list(range(end))
        found = [
            (-len(string), places[len(places) - len(string)])
            for places in (whole, [place for place in whole if marked[place][1]])
            for string in strings
            if places and places[-1] == end - 1 and "".join(marked[place][0] for place in places).endswith(string)
        ]
        if found:
            expected, is_expected = "".join(char for char, is_shown in marked[: min(found)[1]] if is_shown), True
            break
    assert (shown, stopped) == (expected, is_expected)


def test_a_stop_string_of_hidden_and_shown_text_is_found() -> None:
    stop = StopStrings(["<|im_end|>\n"])
    assert stop.push("Hi", "<|im_end|>") == ("Hi", False)
    assert stop.push("\n") == ("", True)


def test_a_stop_string_whose_parts_a_hidden_token_separates_is_found_as_the_reader_sees_it() -> None:
    stop = StopStrings(["the end"])
    assert stop.push("at the ", "<|pause|>") == ("at ", False)
    assert stop.push("end.") == ("", True)
