"""A generation as its caller sees it: text, ends and cancellation. They are the same for every strategy."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from helpers.scripted import ScriptedDecoder, ScriptedError, ScriptedModel, scripted_time
from helpers.scripted_runs import self_speculative
from shortstack.graphs.errors import RequestError
from shortstack.runtime.decode.choice import GreedyChoice
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.plain import plain
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.stream import Stream, Token
from shortstack.runtime.text.stop import StopStrings
from shortstack.runtime.text.tokenizer import Tokenizer

# "Ã" and "©" stand for the two bytes of "é", so that random tokens hold half characters.
TOKENS = ["a", "b", "ab", "Ġ", "Ã", "©", "c", "<|turn|>", "</s>"]
TURN, EOS = TOKENS.index("<|turn|>"), TOKENS.index("</s>")
TEXT_IDS = st.lists(st.integers(0, EOS - 1), min_size=1, max_size=5)
PROMPT = [0, 1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|turn|>", "</s>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


class Talk:
    """One decoder and one sequence, as in a loaded model, with streams over them."""

    def __init__(self, model: ScriptedModel, tokenizer: Tokenizer, max_length: int = 64) -> None:
        self.decoder = ScriptedDecoder(model, max_length=max_length)
        self.sequence = TokenSequence()
        self.tokenizer = tokenizer

    def start(
        self,
        policy: DraftPolicy | None,
        prompt: Sequence[int] = PROMPT,
        count: int = 30,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> Stream:
        self.sequence.restart(prompt)
        stats = Stats(prompt=len(prompt))
        limit = min(count, self.decoder.max_length - len(prompt))
        if policy is None:
            steps = solo(plain(self.decoder, self.sequence, GreedyChoice(), stats, limit), self.decoder)
        else:
            steps = self_speculative(self.decoder, self.sequence, GreedyChoice(), stats, limit, DraftLength(policy))
        return Stream(
            steps,
            stats,
            self.tokenizer,
            eos_ids=[EOS],
            stop=StopStrings(stop),
            stop_ids=stop_ids,
            limit=limit,
            limit_reason="length" if limit == count else "context",
        )

    def assert_consistent(self, stream: Stream, prompt: Sequence[int] = PROMPT) -> None:
        assert self.sequence.tokens == [*prompt, *stream.token_ids]
        assert self.sequence.cached <= len(self.sequence)
        self.decoder.cache.assert_holds(self.decoder.model, self.sequence.tokens[: self.sequence.cached])
        assert stream.stats.is_balanced
        assert stream.stats.emitted == len(stream.token_ids)


def saying(tokens: Sequence[int], agreement: float | Sequence[bool] = 1.0) -> ScriptedModel:
    """A model that continues PROMPT with these tokens."""
    model = ScriptedModel(vocab_size=len(TOKENS), agreement=agreement)
    text = model.prefix(PROMPT)
    for token in tokens:
        model.final(text)[token] = 50.0
        text = text.then(token)
    return model


def text_before(text: str, stops: Sequence[str]) -> str | None:
    """Return the text before the first stop string to complete, the longest of several; None if none occurs."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(map(len, completed))]
    return None


scripted_models = st.builds(
    ScriptedModel,
    seed=st.integers(0, 2**32),
    vocab_size=st.just(len(TOKENS)),
    agreement=st.sampled_from([0.0, 0.5, 0.9, 1.0]) | st.lists(st.booleans(), min_size=1, max_size=7),
)
policies = st.builds(
    DraftPolicy, st.integers(1, 6), st.sampled_from([0.0, 0.4]), is_adaptive=st.booleans(), has_bonus=st.booleans()
)
stop_strings = st.lists(st.text("abc é", min_size=1, max_size=3), max_size=3)
few = settings(deadline=None, derandomize=True, max_examples=120)


@few
@given(scripted_models, TEXT_IDS, policies, st.integers(1, 30), stop_strings, st.integers(6, 24))
def test_every_strategy_gives_the_same_tokens_the_same_pieces_and_the_same_end(
    tokenizer: Tokenizer,
    model: ScriptedModel,
    prompt: list[int],
    policy: DraftPolicy,
    count: int,
    stop: list[str],
    max_length: int,
) -> None:
    told: list[tuple[list[tuple[int, str]], object]] = []
    for strategy in (None, policy):
        talk = Talk(model, tokenizer, max_length)
        with scripted_time(talk.decoder):
            stream = talk.start(strategy, prompt, count, stop)
            tokens = list(stream)
        talk.assert_consistent(stream, prompt)
        assert talk.sequence.cached == len(talk.sequence) - 1
        assert [token.id for token in tokens] == stream.token_ids
        assert stream.stats.accepted - sum(token.from_draft for token in tokens) <= stream.stats.discarded
        assert "".join(token.text for token in tokens) == stream.text
        told.append(([(token.id, token.text) for token in tokens], stream.finish_reason))
    assert told[0] == told[1]

    ids = [token_id for token_id, _ in told[0][0]]
    whole = tokenizer.decode([token_id for token_id in ids if token_id != EOS])
    stopped = text_before(whole, stop)
    assert stream.text == (whole if stopped is None else stopped)
    if stopped is not None:
        assert stream.finish_reason == "stop"
    elif ids[-1] == EOS:
        assert stream.finish_reason == "eos"
    else:
        assert stream.finish_reason == ("length" if len(ids) == count else "context")
        assert len(ids) == min(count, max_length - len(prompt))


@few
@given(
    scripted_models,
    TEXT_IDS,
    st.none() | policies,
    st.integers(0, 12),
    st.sampled_from(["cancel", "close", "supersede"]),
    st.none() | policies,
)
def test_a_generation_ended_after_any_token_leaves_the_model_usable(
    tokenizer: Tokenizer,
    model: ScriptedModel,
    prompt: list[int],
    policy: DraftPolicy | None,
    taken: int,
    how: str,
    next_policy: DraftPolicy | None,
) -> None:
    talk = Talk(model, tokenizer)
    stream = talk.start(policy, prompt, stop=["a b"])
    tokens = [token for _, token in zip(range(taken), stream, strict=False)]
    was_running = stream.finish_reason is None
    getattr(stream, how)()
    if how == "supersede" and was_running:
        with pytest.raises(RequestError, match="ended by a newer one"):
            next(stream)
    else:
        assert list(stream) == []
        assert stream.finish_reason == "cancelled" if was_running else stream.finish_reason in ("eos", "stop")
        assert stream.text.startswith("".join(token.text for token in tokens))
    talk.assert_consistent(stream, prompt)

    again = list(talk.start(next_policy, prompt))
    assert [(t.id, t.text) for t in again] == [(t.id, t.text) for t in Talk(model, tokenizer).start(None, prompt)]


@pytest.mark.parametrize("position", range(5))
def test_an_end_token_inside_a_draft_ends_the_text_and_discards_the_rest(tokenizer: Tokenizer, position: int) -> None:
    said = [0, *[1] * position, EOS, 2, 2, 2, 2, 2, 2]
    talk = Talk(saying(said), tokenizer)
    stream = talk.start(DraftPolicy(5))
    tokens = list(stream)
    assert [token.id for token in tokens] == said[: position + 2]
    assert (stream.finish_reason, stream.text) == ("eos", "a" + "b" * position)
    assert stream.stats.discarded == 4 - position
    talk.assert_consistent(stream)


def test_a_stop_string_across_two_rounds_is_never_shown(tokenizer: Tokenizer) -> None:
    talk = Talk(saying([6, 6, 0, 1, 6, 0, 0, 0, 0]), tokenizer)  # c | c a | b c | ...
    stream = talk.start(DraftPolicy(2), stop=["abc"])
    assert [token.text for token in stream] == ["c", "c", "", "", ""]
    assert (stream.finish_reason, stream.text) == ("stop", "cc")
    assert stream.stats.discarded == 0
    stream = talk.start(DraftPolicy(3), stop=["ab"])  # c | c a b | ...
    assert [token.text for token in stream] == ["c", "c", "", ""]
    talk.assert_consistent(stream)


@pytest.mark.parametrize("policy", [None, DraftPolicy(2), DraftPolicy(5)])
@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [
        (["<|turn|>"], [6, 0, TURN], "ca"),  # a special token
        (["a<|turn|>b"], [6, 0, TURN, 1], "c"),  # across text, a special token and text
        (["turn|>b"], [6, 0, TURN, 1], "ca"),  # across a part of a special token
        (["ab"], [6, 0, TURN, 1], "c"),  # as the reader sees it
        (["<|turn|>x", "|>bc"], [6, 0, TURN, 1, 6], "ca"),  # what only looked like one does not hide another
    ],
)
def test_a_stop_string_may_be_or_contain_a_special_token_with_every_strategy(
    tokenizer: Tokenizer, policy: DraftPolicy | None, stop: list[str], tokens: list[int], text: str
) -> None:
    talk = Talk(saying([6, 0, TURN, 1, 6, 0, 0, 0, 0, 0, 0]), tokenizer)
    stream = talk.start(policy, stop=stop)
    pieces = [token.text for token in stream]
    assert stream.token_ids == tokens
    assert (stream.finish_reason, stream.text, "".join(pieces)) == ("stop", text, text)
    talk.assert_consistent(stream)


def test_a_special_token_that_only_begins_like_a_stop_string_is_not_shown_at_the_end(tokenizer: Tokenizer) -> None:
    stream = Talk(saying([6, TURN, 0]), tokenizer).start(None, count=3, stop=["<|turn|>ab"])
    assert [token.text for token in stream] == ["c", "", "a"]
    assert stream.finish_reason == "length"


@pytest.mark.parametrize("policy", [None, DraftPolicy(2), DraftPolicy(5)])
@pytest.mark.parametrize(("stop_id", "text"), [(6, "ab"), (TURN, "abc"), (1, "a")])
def test_a_stop_id_ends_the_text_and_is_not_part_of_it(
    tokenizer: Tokenizer, policy: DraftPolicy | None, stop_id: int, text: str
) -> None:
    said = [0, 1, 6, TURN, 0, 0, 0, 0, 0]
    talk = Talk(saying(said), tokenizer)
    stream = talk.start(policy, stop_ids=[stop_id])
    assert [token.id for token in stream] == said[: said.index(stop_id) + 1]
    assert (stream.finish_reason, stream.text) == ("stop", text)
    talk.assert_consistent(stream)


def test_text_that_only_looked_like_a_stop_string_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    stream = Talk(saying([6, 0, 1]), tokenizer).start(DraftPolicy(2), count=3, stop=["abc"])
    assert [token.text for token in stream] == ["c", "", "ab"]
    assert stream.finish_reason == "length"


def test_half_a_character_comes_out_as_a_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    stream = Talk(saying([6, 4, 5, 4, EOS]), tokenizer).start(DraftPolicy(3))
    assert [token.text for token in stream] == ["c", "", "é", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_text_held_back_is_part_of_the_text_of_a_cancelled_generation(tokenizer: Tokenizer, how: str) -> None:
    stream = Talk(saying([6, 0, 1, 6, 6]), tokenizer).start(DraftPolicy(2), stop=["abx"])
    assert "".join(next(stream).text for _ in range(3)) == "c"
    assert stream.text == "c"
    getattr(stream, how)()
    assert list(stream) == []
    assert stream.text == "cab"


def test_cancelling_from_another_thread_ends_the_generation_before_the_next_token(tokenizer: Tokenizer) -> None:
    stream = Talk(saying([0] * 30), tokenizer).start(DraftPolicy(4))
    tokens = []
    for token in stream:
        tokens.append(token)
        if len(tokens) == 7:
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()
    assert len(tokens) == 7
    assert stream.finish_reason == "cancelled"


def test_cancelling_wins_over_being_superseded(tokenizer: Tokenizer) -> None:
    stream = Talk(saying([0] * 30), tokenizer).start(None)
    next(stream)
    stream.cancel()
    stream.supersede()
    assert list(stream) == []
    assert stream.finish_reason == "cancelled"


@pytest.mark.parametrize("how", ["cancel", "close", "supersede"])
def test_ending_a_finished_generation_changes_nothing(tokenizer: Tokenizer, how: str) -> None:
    stream = Talk(saying([0, EOS]), tokenizer).start(None)
    assert [token.id for token in stream] == [0, EOS]
    getattr(stream, how)()
    assert list(stream) == []
    assert (stream.finish_reason, stream.text) == ("eos", "a")


def test_a_failing_run_reaches_the_caller_and_the_model_stays_usable(tokenizer: Tokenizer) -> None:
    talk = Talk(saying([0] * 30), tokenizer)
    talk.decoder.fails_at = 9
    stream = talk.start(DraftPolicy(3))
    tokens: list[Token] = []
    with pytest.raises(ScriptedError):
        tokens.extend(stream)
    talk.assert_consistent(stream)
    stream.close()
    assert stream.finish_reason == "error"
    assert len(list(talk.start(DraftPolicy(3), count=20))) == 20


@pytest.mark.parametrize("how", ["cancel", "close", "supersede", "run to the end"])
def test_a_loop_with_something_to_release_is_closed_at_every_end(tokenizer: Tokenizer, how: str) -> None:
    released = []

    def steps() -> Iterator[Step]:
        try:
            while True:
                yield Step(0, False, exit_layer=1, confidence=1.0)
        finally:
            released.append(True)

    loop = steps()
    stream = Stream(loop, Stats(), tokenizer, eos_ids=[], stop=StopStrings([]), limit=3, limit_reason="length")
    next(stream)
    if how != "run to the end":
        getattr(stream, how)()
    if how != "supersede":
        list(stream)
    assert released


def test_times_are_taken_from_the_request_to_the_first_and_the_newest_token(tokenizer: Tokenizer) -> None:
    talk = Talk(saying([0] * 30), tokenizer)
    with scripted_time(talk.decoder) as clock:
        clock.now_s = 100.0
        stream = talk.start(DraftPolicy(2), count=3)
        list(stream)
    # a prefill of 1 s, then a round of two rows at 0.25 s each and judging them in 0.75 s
    assert (stream.stats.first_token_s, stream.stats.elapsed_s) == (1.0, 2.25)
    assert stream.stats.tokens_per_s == pytest.approx(2 / 1.25)
