"""The threads of a process: the first load decides, later ones leave the number out or repeat it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shortstack import threads as threads_module
from shortstack.cores import usable_cores
from shortstack.graphs.errors import RequestError
from shortstack.threads import describe_threads, make_thread_pool, session_options, use_own_pools


@pytest.fixture(autouse=True)
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A process that has loaded nothing yet; the sizes of the pools that onnxruntime is asked to make."""
    made: list[int] = []
    monkeypatch.setattr(threads_module, "_pool_threads", None)
    monkeypatch.setattr(threads_module, "_has_own_pools", False)
    make: Callable[[int, int], None] = lambda intra, inter: made.append(intra)  # noqa: E731
    monkeypatch.setattr(threads_module.ort, "set_global_thread_pool_sizes", make)
    return made


@pytest.mark.parametrize("later", [None, 3])
def test_a_later_load_leaves_the_number_out_or_repeats_it(later: int | None, pools: list[int]) -> None:
    make_thread_pool(3)
    make_thread_pool(later)
    assert pools == [3]
    assert describe_threads(None, None) == "3"


def test_another_number_is_refused_with_the_rule_and_what_to_do(pools: list[int]) -> None:
    make_thread_pool(3)
    with pytest.raises(RequestError) as error:
        make_thread_pool(2)
    assert str(error.value) == (
        "threads: the first load of this process has decided how many there are: found 2, expected 3. "
        "Leave threads out, give 3 again, or start another process."
    )
    assert pools == [3]


def test_a_first_load_without_a_number_decides_for_all_usable_cores(pools: list[int]) -> None:
    make_thread_pool()
    make_thread_pool(usable_cores())
    assert pools == [usable_cores()]
    with pytest.raises(RequestError, match="the first load of this process has decided"):
        make_thread_pool(usable_cores() + 1)


def test_a_number_that_is_not_valid_decides_nothing(pools: list[int]) -> None:
    for number in (0, -1, 1025):
        with pytest.raises(RequestError, match=f"threads: found {number}, expected 1..1024"):
            make_thread_pool(number)
    make_thread_pool(2)
    assert pools == [2]


def test_sessions_with_pools_of_their_own_decide_for_themselves(pools: list[int]) -> None:
    use_own_pools()
    for number in (1, 2):
        make_thread_pool(number)
        assert session_options(number).intra_op_num_threads == number
    assert pools == []
    assert describe_threads(1, 2) == "1 below, 2 above"


def test_pools_of_their_own_must_be_asked_for_in_the_first_load() -> None:
    make_thread_pool(1)
    with pytest.raises(RequestError, match="Ask for them in the first load"):
        use_own_pools()
