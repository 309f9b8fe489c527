"""The token sequence: its tokens, and how many of them are cached."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortstack.runtime.decode.sequence import TokenSequence

texts = st.lists(st.integers(0, 2), max_size=8)


def cached(tokens: list[int], positions: int) -> TokenSequence:
    sequence = TokenSequence(tokens)
    sequence.commit(positions)
    return sequence


def test_tokens_begin_uncached_and_are_committed_in_order() -> None:
    sequence = TokenSequence([5, 6])
    sequence.append(7)
    assert (len(sequence), sequence.cached) == (3, 0)
    sequence.commit(2)
    sequence.commit(1)
    assert sequence.cached == 3


def test_no_more_positions_than_tokens_can_be_committed() -> None:
    sequence = cached([1, 2, 3], 2)
    with pytest.raises(ValueError, match=r"2 \+ 2 positions of 3 tokens"):
        sequence.commit(2)
    assert sequence.cached == 2


def test_rewinding_forgets_tokens_and_their_cache_but_no_more() -> None:
    sequence = cached([1, 2, 3, 4], 3)
    sequence.rewind(4)
    assert (sequence.tokens, sequence.cached) == ([1, 2, 3, 4], 3)
    sequence.rewind(2)
    assert (sequence.tokens, sequence.cached) == ([1, 2], 2)
    sequence.rewind(0)
    assert (sequence.tokens, sequence.cached) == ([], 0)


@pytest.mark.parametrize("length", [-1, 4])
def test_rewinding_beyond_the_text_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"rewind to {length} of 3 tokens"):
        TokenSequence([1, 2, 3]).rewind(length)


def test_the_sequence_copies_the_list_that_it_is_made_from() -> None:
    tokens = [1, 2]
    sequence = TokenSequence(tokens)
    sequence.append(3)
    assert tokens == [1, 2]
    sequence.restart(tokens)
    sequence.append(9)
    assert tokens == [1, 2]


def test_a_restart_with_a_longer_text_keeps_the_whole_cache() -> None:
    sequence = cached([1, 2, 3], 3)
    assert sequence.restart([1, 2, 3, 4]) == 3
    assert (sequence.tokens, sequence.cached) == ([1, 2, 3, 4], 3)


def test_a_restart_with_the_same_text_leaves_its_last_token_to_run() -> None:
    assert cached([1, 2, 3], 3).restart([1, 2, 3]) == 2


@given(texts, st.integers(0, 8), texts)
def test_a_restart_keeps_the_longest_cached_prefix_that_leaves_one_token(
    old: list[int], positions: int, new: list[int]
) -> None:
    sequence = cached(old, min(positions, len(old)))
    limit = min(sequence.cached, max(0, len(new) - 1))
    expected = max(n for n in range(limit + 1) if old[:n] == new[:n])
    assert sequence.restart(new) == expected
    assert (sequence.tokens, sequence.cached) == (new, expected)
