"""A loaded model as an object: how it shows itself, what it hands to the chat template, and how it ends."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from helpers.tiny_models import BASE, TinyBundles
from shortstack import DraftPolicy, Plain, Request, Speculate, load
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import SplitPlan
from shortstack.runtime.decode.choice import Choice, Proposal
from shortstack.runtime.decode.drafters import Draft
from shortstack.runtime.engine.decoder import Decoder

PROMPT = [5, 6, 7]


def test_a_model_shows_what_it_is(tiny_bundles: TinyBundles) -> None:
    bundle = tiny_bundles.bundle(BASE, 1, 3)
    model = load(bundle)
    assert (
        repr(model)
        == f"<Model {str(bundle)!r}: checkpoint-base, 4 layers, exits after 1, 3, float32, {BASE.context} positions>"
    )
    assert "no exit" in repr(load(tiny_bundles.bundle(BASE)))


def test_a_request_and_a_call_generate_the_same(tiny_bundles: TinyBundles) -> None:
    model = load(tiny_bundles.bundle(BASE, 1, 3))
    expected = model.generate(PROMPT, max_new_tokens=12, strategy="self-speculative", exit_layer=3).tokens
    stream = model.start(Request(PROMPT, Speculate(3), max_new_tokens=12))
    assert tuple(token.id for token in stream) == expected
    assert model.generate(PROMPT, max_new_tokens=12, strategy=Plain()).tokens == expected


def test_tools_and_variables_reach_the_chat_template(
    tiny_bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_bundles.bundle(BASE, 1, 3))
    heard: list[dict[str, Any]] = []
    encode = type(model.tokenizer).encode_chat

    def listen(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
        heard.append(options)
        return encode(tokenizer, messages, **options)

    monkeypatch.setattr(type(model.tokenizer), "encode_chat", listen)
    chat = [{"role": "user", "content": "Hi"}]
    tools, variables = [{"name": "f"}], {"enable_thinking": False}
    model.generate(chat, max_new_tokens=1, tools=tools, template_variables=variables)
    assert heard == [{"tools": tools, "variables": variables}]


def test_a_model_that_is_left_is_closed_and_says_so(tiny_bundles: TinyBundles) -> None:
    bundle = tiny_bundles.bundle(BASE, 1, 3)
    with load(bundle) as model:
        stream = model.stream(PROMPT, max_new_tokens=12)
        next(stream)
    assert stream.finish_reason == "cancelled"
    assert list(stream) == []
    assert "closed" in repr(model)
    for call in (
        lambda: model.generate(PROMPT),
        lambda: model.activations(PROMPT),
        lambda: model.exclusive_stack(),
        lambda: model.encode("Hi"),
    ):
        with pytest.raises(RequestError, match="is closed"):
            call()
    model.close()  # once more does nothing


def test_closing_lets_go_of_the_sessions(tiny_bundles: TinyBundles) -> None:
    model = load(tiny_bundles.bundle(BASE, 1, 3))
    model.generate(PROMPT, max_new_tokens=4, strategy="self-speculative")
    session = weakref.ref(model.graphs.sessions[0])
    model.close()
    gc.collect()
    assert session() is None


@dataclass(frozen=True)
class Repeat:
    """A source that needs no exit and no layer: it proposes the newest token again."""

    times: int

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        return ()

    def drafter(self, stack: Decoder, choice: Choice) -> Repeat:
        return self

    def start(self, tokens: Sequence[int], cached: int) -> int:
        return cached

    def end(self) -> None:
        pass

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Draft:
        return Draft([Proposal(tokens[-1], 1.0, 0)] * min(self.times, most))

    def observe(self, emitted: int, rows: int) -> None:
        pass


@pytest.mark.parametrize("cuts", [(), (1, 3)])
@pytest.mark.parametrize("bonus", [False, True])
def test_a_drafter_of_ones_own_needs_no_exit_and_changes_no_token(
    tiny_bundles: TinyBundles, cuts: tuple[int, ...], bonus: bool
) -> None:
    model = load(tiny_bundles.bundle(BASE, *cuts))
    expected = model.generate(PROMPT, max_new_tokens=60, ignore_eos=True).tokens
    strategy = Speculate(draft=DraftPolicy(3, has_bonus=bonus), source=Repeat(2))
    found = model.generate(PROMPT, max_new_tokens=60, ignore_eos=True, strategy=strategy)
    assert found.tokens == expected
    assert found.stats.drafted > 0
