"""A request as a value, and the short forms of the Python calls that create one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from shortstack import DraftPolicy, ExitEarly, ExitPolicy, Plain, Request, SamplingParams, Speculate, parse_criterion
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec, SplitPlan
from shortstack.runtime.decode.hybrid import FromHybrid
from shortstack.runtime.request import make_request

RULE = "top_prob >= 0.9"
POLICY = ExitPolicy(parse_criterion(RULE))
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Plain()),
        ({"strategy": "plain"}, Plain()),
        ({"strategy": Plain()}, Plain()),
        ({"strategy": "self-speculative"}, Speculate()),
        ({"strategy": "self-speculative", "exit_layer": 4}, Speculate(4)),
        ({"exit_layer": 4, "draft": DraftPolicy(2)}, Speculate(4, DraftPolicy(2))),
        ({"strategy": Speculate(8)}, Speculate(8)),
        ({"strategy": "early-exit", "exits": RULE}, ExitEarly(POLICY)),
        ({"exits": RULE}, ExitEarly(POLICY)),
        ({"exits": POLICY.criterion}, ExitEarly(POLICY)),
        ({"strategy": "early-exit", "exits": POLICY}, ExitEarly(POLICY)),
        ({"exits": None, "exit_layer": None, "draft": None}, Plain()),
    ],
)
def test_short_forms_make_the_strategy_that_they_describe(options: dict[str, Any], expected: object) -> None:
    assert make_request("Hi", **options).strategy == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strategy": "beam"}, ("'beam'", "self-speculative")),
        ({"strategy": "early-exit"}, ("no exit policy", RULE)),
        ({"strategy": "plain", "exits": RULE}, ("an exit policy",)),
        ({"strategy": "plain", "exit_layer": 4}, ("exit_layer would have no effect",)),
        ({"strategy": "plain", "draft": DraftPolicy()}, ("draft would have no effect",)),
        ({"strategy": "early-exit", "exits": RULE, "exit_layer": 4}, ("exit_layer", "ExitPolicy.exit_layers")),
        ({"strategy": Speculate(), "exit_layer": 4}, ("exit_layer", "Speculate(...)")),
        ({"strategy": Plain(), "exits": RULE}, ("exits", "Plain(...)")),
        ({"exits": "top_prob >> 0.9"}, ("top_prob",)),
        ({"temperature": 0.5, "sampling": SamplingParams()}, ("temperature",)),
        ({"temperature": -1.0}, ("temperature",)),
        ({"max_new_tokens": 0}, ("max_new_tokens", "1 or more")),
        ({"draft": 4}, ("draft", "found 4", "DraftPolicy or None")),
        ({"strategy": Speculate(), "sampling": {"temperature": 1}}, ("sampling", "SamplingParams")),
        ({"max_new_tokens": 2.5}, ("max_new_tokens", "a whole number")),
        ({"max_new_tokens": True}, ("max_new_tokens", "a whole number")),
        ({"max_tokens": 3}, ("unknown option max_tokens", "max_new_tokens")),
        (
            {"exits": ExitPolicy(POLICY.criterion, verify="rollback", rollback_below=0.1), "temperature": 1.0},
            ("greedy",),
        ),
        ({"tools": [{"name": "f"}]}, ("chat messages",)),
        ({"template_variables": {"enable_thinking": False}}, ("chat messages",)),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        make_request("Hi", **options)
    for words in says:
        assert words in str(caught.value)


def test_single_sampling_options_are_gathered() -> None:
    request = make_request("Hi", temperature=0.7, top_k=5, seed=3)
    assert request.sampling == SamplingParams(temperature=0.7, top_k=5, seed=3)
    assert make_request("Hi", sampling=None).sampling == SamplingParams()


def test_all_other_options_reach_the_request_unchanged() -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "stop": ("x",),
        "ignore_eos": True,
        "reuse_cache": True,
        "tools": [{"name": "f"}],
        "template_variables": {"enable_thinking": False},
    }
    request = make_request(CHAT, **options)
    assert request == Request(CHAT, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Request("Hi", "plain"),  # type: ignore[arg-type]
        lambda: Request("Hi", sampling=None),  # type: ignore[arg-type]
        lambda: Request(iter([1, 2])),  # type: ignore[arg-type]
        lambda: ExitEarly("top_prob >= 0.3"),  # type: ignore[arg-type]
        lambda: Speculate(draft=4),  # type: ignore[arg-type]
        lambda: Speculate(4, source=Twice()),
    ],
)
def test_a_value_of_another_type_is_refused_when_the_request_is_made(make: Any) -> None:
    with pytest.raises(RequestError):
        make()


@dataclass(frozen=True)
class Twice:
    """A source that needs two exits."""

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        return plan.boundaries[:2]

    def drafter(self, stack: Any, choice: Any) -> Any:
        raise AssertionError("nothing is decoded here")


def test_a_source_of_drafts_names_its_exits_itself() -> None:
    assert Speculate(source=Twice()).exits_in(SplitPlan(12, (ExitSpec(4), ExitSpec(8), ExitSpec(10)))) == (4, 8)
    assert Speculate(4).drafts_from == FromHybrid(4)


def test_a_request_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Request("Hi").max_new_tokens = 3  # type: ignore[misc]


def test_a_strategy_names_the_exits_that_it_uses_in_a_bundle() -> None:
    plan = SplitPlan(12, (ExitSpec(4), ExitSpec(8)))
    assert Plain().exits_in(plan) == ()
    assert Speculate().exits_in(plan) == (4,)
    assert Speculate(8).exits_in(plan) == (8,)
    assert ExitEarly(POLICY).exits_in(plan) == (4, 8)
    with pytest.raises(RequestError, match="one of"):
        Speculate(5).exits_in(plan)
    assert Speculate().exits_in(SplitPlan(12, ())) == ()  # drafts are looked up
    with pytest.raises(RequestError, match="has none"):
        Speculate(8).exits_in(SplitPlan(12, ()))
