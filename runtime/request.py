"""A generation as a value: the prompt, how to decode, how to choose tokens, when to end.

The Python calls, the command line, the benchmark's workers and a server all create the same :class:`Request`. The way
to decode is one of three values, so a request cannot ask for two ways at once::

    Plain()                                       every token through every layer
    Speculate(exit_layer=8, draft=DraftPolicy(4)) an exit drafts, the whole model verifies; the output of Plain()
    ExitEarly(ExitPolicy(...))                    a token leaves at the first exit that is sure of it

:func:`make_request` also takes the short forms of the Python calls: ``strategy="self-speculative"``,
``exits="top_prob >= 0.9"``, ``temperature=0.7``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeAlias, TypedDict, Unpack, get_args

from shortstack.graphs.arguments import expect, expect_flags, is_whole, shown
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import SplitPlan
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.decode.drafters import DraftSource
from shortstack.runtime.decode.hybrid import FromHybrid
from shortstack.runtime.decode.sampling import IDLE_WHEN_GREEDY, SamplingParams
from shortstack.runtime.early_exit.criteria import Criterion
from shortstack.runtime.early_exit.expression import EXAMPLE, parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids (a list, or an array of numpy's), or chat messages such as ``{"role": "user", "content": "Hi"}``."""

_PROMPTS = "text, a list of token ids, or a list of chat messages"

StrategyName = Literal["plain", "self-speculative", "early-exit"]


@dataclass(frozen=True, slots=True)
class Plain:
    """Every token runs through every layer."""

    name: ClassVar[StrategyName] = "plain"

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        """Return the exits in use in a bundle of this plan: none."""
        return ()


@dataclass(frozen=True, slots=True)
class Speculate:
    """Tokens are drafted and the whole model verifies them: plain decoding's output, sooner.

    Attributes:
        exit_layer: Which exit drafts, by the number of layers run before it. None takes the bundle's trained
            drafter, or the lowest exit where it has none; in a bundle without either, drafts are looked up in the text.
        draft: How many tokens to draft. None drafts adaptively: by lookup or by the exit or drafter, whichever pays in
            the round, or not at all. If the sampling has a seed, None always drafts four tokens, which are never
            looked up if there is an exit or a drafter. Drafts decide how random draws are used, and adaptive ones
            depend on measured times, so a seed alone would not repeat the output.
        source: What drafts instead, see :mod:`shortstack.runtime.decode.drafters`.

    Raises:
        RequestError: A value of another type, or an exit and a source.
    """

    exit_layer: int | None = None
    draft: DraftPolicy | None = None
    source: DraftSource | None = None
    name: ClassVar[StrategyName] = "self-speculative"

    def __post_init__(self) -> None:
        _expect("draft", self.draft, DraftPolicy, optional=True)
        layer, source = self.exit_layer, self.source
        expect(layer is None or is_whole(layer), "exit_layer", layer, "a number of layers such as 8, or None")
        is_source = source is None or all(callable(getattr(source, name, None)) for name in ("exits_in", "drafter"))
        expect(is_source, "source", source, "a DraftSource, with exits_in() and drafter(), or None")
        if self.source is not None and self.exit_layer is not None:
            raise RequestError(
                "exit_layer would have no effect: a source says where drafts come from", remedy="drop one of the two"
            )

    @property
    def drafts_from(self) -> DraftSource:
        """Where drafts come from."""
        if self.source is not None:
            return self.source
        return FromHybrid(self.exit_layer)

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        """Return the exits that the drafts need in a bundle of this plan; errors as in :class:`FromHybrid`."""
        return self.drafts_from.exits_in(plan)


@dataclass(frozen=True, slots=True)
class ExitEarly:
    """A token leaves at the first exit that is sure of it, and the layers above catch up.

    Attributes:
        policy: When a token leaves, whether it is checked, and how the layers above catch up.
    """

    policy: ExitPolicy
    name: ClassVar[StrategyName] = "early-exit"

    def __post_init__(self) -> None:
        _expect("policy", self.policy, ExitPolicy)

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        """Return the exits in use in a bundle of this plan; see :meth:`ExitPolicy.exits_in` for the errors."""
        return self.policy.exits_in(plan)


Strategy: TypeAlias = Plain | Speculate | ExitEarly


@dataclass(frozen=True, slots=True)
class Request:
    """One generation.

    Attributes:
        prompt: Chat messages go through the bundle's chat template. A string is encoded as it is, and token ids are
            used unchanged.
        strategy: How to decode.
        sampling: How to choose tokens; the default is greedy.
        max_new_tokens: The most tokens to generate.
        stop: Strings that end the text; they are not part of it. A special token's text may be one, or part of one.
        stop_token_ids: Ids that end the text as an end-of-sequence token does, and also where ``ignore_eos`` is set.
        ignore_eos: Whether to go on after an end-of-sequence token.
        reuse_cache: Whether to keep the cache of the longest prefix that this text shares with the one before, as in
            multi-turn chat.
        tools: JSON schemas of tools, for chat templates that know them.
        template_variables: Further variables of the chat template, such as ``{"enable_thinking": False}``.

    Raises:
        RequestError: A value is out of range, or two values do not go together.
    """

    prompt: Prompt
    strategy: Strategy = field(default_factory=Plain)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    reuse_cache: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    template_variables: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _expect("strategy", self.strategy, Strategy)
        _expect("sampling", self.sampling, SamplingParams)
        _expect("template_variables", self.template_variables, Mapping, optional=True)
        prompt_items(self.prompt)
        expect(is_whole(self.max_new_tokens, 1), "max_new_tokens", self.max_new_tokens, "a whole number, 1 or more")
        expect_flags(self, "ignore_eos", "reuse_cache")
        expect(_is_list_of(self.stop, str), "stop strings", self.stop, 'a list of strings such as ["User:"]')
        expect(
            self.tools is None or _is_list_of(self.tools, Mapping),
            "tools",
            self.tools,
            "a list of JSON schemas, or None",
        )
        idle = [each.name for each in fields(SamplingParams) if self._is_idle(each)]
        if idle:
            raise RequestError(
                f"{', '.join(idle)} would have no effect: a temperature of 0 is greedy",
                remedy="give a temperature above 0, or leave out what does nothing",
            )
        expect(
            _is_list_of(self.stop_token_ids, object) and all(is_whole(token, 0) for token in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "a sequence of token ids, such as [2]",
            "give texts as `stop`",
        )
        if (
            isinstance(self.strategy, ExitEarly)
            and self.strategy.policy.verify == "rollback"
            and not self.sampling.is_greedy
        ):
            raise RequestError(
                "verify rollback is a rule for greedy decoding",
                found=f"temperature {self.sampling.temperature}",
                remedy="set the temperature to 0, or use verify exact",
            )
        if (self.tools or self.template_variables) and not is_chat(self.prompt):
            raise RequestError(
                "tools and template_variables are for the chat template, and this prompt does not go through it",
                found="text" if isinstance(self.prompt, str) else "token ids",
                expected="chat messages",
                remedy='give [{"role": "user", "content": ...}] as the prompt',
            )

    def _is_idle(self, option: Field[Any]) -> bool:
        """Return whether a sampling option is set and does nothing, since decoding is greedy."""
        is_set = getattr(self.sampling, option.name) != option.default
        return self.sampling.is_greedy and option.name in IDLE_WHEN_GREEDY and is_set


class RequestOptions(TypedDict, total=False):
    """The options of the Python calls besides the prompt; see :class:`Request` for those that are not explained here.

    Attributes:
        strategy: One of the three values, or its name.
        exit_layer: For the name ``self-speculative``, see :class:`Speculate`.
        draft: For the name ``self-speculative``, see :class:`Speculate`.
        exits: For the name ``early-exit``: an :class:`ExitPolicy`, a criterion, or an expression such as
            ``top_prob >= 0.9``.
        sampling: All sampling options as one value, instead of single ones below.
        temperature: For this and all up to ``seed``, see
            :class:`~shortstack.runtime.decode.sampling.SamplingParams`.
    """

    strategy: Strategy | StrategyName
    exit_layer: int | None
    draft: DraftPolicy | None
    exits: ExitPolicy | Criterion | str | None
    sampling: SamplingParams | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    max_new_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    reuse_cache: bool
    tools: Sequence[Mapping[str, Any]] | None
    template_variables: Mapping[str, Any] | None


_SAMPLING = tuple(each.name for each in fields(SamplingParams))
_OF_REQUEST = (
    "max_new_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "reuse_cache",
    "tools",
    "template_variables",
)
_OF_STRATEGY = ("exit_layer", "draft", "exits")


def make_request(prompt: Prompt, **options: Unpack[RequestOptions]) -> Request:
    """Return the request that a Python call describes.

    If the strategy is left out, the options decide: ``exits`` means early exit, ``exit_layer`` or ``draft`` means
    self-speculation, and without any of them decoding is plain.

    Raises:
        RequestError: An option is unknown, out of range, or would have no effect.
    """
    if unknown := sorted(options.keys() - RequestOptions.__annotations__.keys()):
        raise RequestError(
            f"unknown option {', '.join(unknown)}",
            expected=f"some of {', '.join(RequestOptions.__annotations__)}",
        )
    given: dict[str, Any] = dict(options)
    sampling = _sampling(given.get("sampling"), {name: given[name] for name in _SAMPLING if name in given})
    strategy = _strategy(given.get("strategy"), {name: given.get(name) for name in _OF_STRATEGY})
    return Request(prompt, strategy, sampling, **{name: given[name] for name in _OF_REQUEST if name in given})


def _expect(name: str, value: object, kind: Any, *, optional: bool = False) -> None:
    """Refuse a value of another type than ``kind``, a class or a union of classes."""
    names = " or ".join(each.__name__ for each in (get_args(kind) or (kind,)))
    is_right = isinstance(value, kind) or (optional and value is None)
    expect(is_right, name, value, f"{names}{' or None' if optional else ''}")


def _is_list_of(value: object, kind: type) -> bool:
    """Return whether a value holds only items of one type, and is neither text nor a mapping itself."""
    is_list = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    return is_list and all(isinstance(item, kind) for item in value)  # type: ignore[attr-defined]


def prompt_items(prompt: Prompt) -> list[Any] | None:
    """Return the token ids or chat messages of a prompt; None if it is text.

    Raises:
        RequestError: It is none of these: bytes, one message, an array of another shape or type, and so on.
    """
    given: Any = prompt
    if isinstance(given, str):
        return None
    if isinstance(given, bytes | bytearray | memoryview):
        raise RequestError("the prompt is bytes", expected=_PROMPTS, remedy='decode it: prompt.decode("utf-8")')
    if isinstance(given, Mapping):
        raise RequestError(
            "the prompt is one mapping", found=shown(given), expected=_PROMPTS, remedy="put the message in a list"
        )
    items = given.tolist() if hasattr(given, "tolist") else given  # arrays and tensors
    is_list = isinstance(items, Sequence) and not isinstance(items, str | bytes)
    expect(is_list, "the prompt", given, _PROMPTS, f"a {type(given).__name__} is none of these")
    for index, item in enumerate(items):
        if not isinstance(item, Mapping) and not is_whole(item):
            raise RequestError(
                f"the prompt holds something other than token ids, at index {index}",
                found=shown(item),
                expected="whole numbers in one dimension, or chat messages",
                remedy="give text as one string, and ids as one list",
            )
    if len({isinstance(item, Mapping) for item in items}) > 1:
        raise RequestError("the prompt mixes chat messages and token ids", remedy="give only one of the two")
    return list(items)


def is_chat(prompt: Prompt) -> bool:
    """Return whether a prompt consists of chat messages."""
    items = prompt_items(prompt)
    return bool(items) and isinstance(items[0], Mapping)  # type: ignore[index]


def _sampling(params: SamplingParams | None, single: Mapping[str, Any]) -> SamplingParams:
    if params is None:
        return SamplingParams(**single)
    if single:
        raise RequestError(
            f"sampling is given as a value, and {', '.join(single)} as well",
            remedy="give either SamplingParams(...) or single options",
        )
    return params


def _strategy(wanted: Strategy | StrategyName | None, options: Mapping[str, Any]) -> Strategy:
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(wanted, Strategy):
        _refuse(
            given, wanted, f"the strategy is given as a value, {type(wanted).__name__}(...)", "set it in that value"
        )
        return wanted
    if wanted is None:
        wanted = "early-exit" if "exits" in given else "self-speculative" if given else "plain"
    names = " or ".join(repr(name) for name in get_args(StrategyName))
    is_name = isinstance(wanted, str) and wanted in get_args(StrategyName)
    expect(is_name, "strategy", wanted, f"{names}, or Plain(), Speculate(), ExitEarly()")
    exits = given.pop("exits", None)
    if (exits is not None) != (wanted == "early-exit"):
        raise RequestError(
            f"strategy {wanted!r}: exits",
            found="no exit policy" if exits is None else "an exit policy",
            expected=f"an ExitPolicy or an expression such as {EXAMPLE!r} for the strategy 'early-exit' only",
        )
    if exits is not None:
        _refuse(given, wanted, "early exit drafts nothing", "leave it out; ExitPolicy.exit_layers chooses exits")
        return ExitEarly(_policy(exits))
    if wanted == "plain":
        _refuse(given, wanted, "plain decoding drafts nothing", "leave it out, or use the strategy 'self-speculative'")
        return Plain()
    return Speculate(**given)


def _policy(exits: ExitPolicy | Criterion | str) -> ExitPolicy:
    if isinstance(exits, ExitPolicy):
        return exits
    return ExitPolicy(parse_criterion(exits) if isinstance(exits, str) else exits)


def _refuse(given: Mapping[str, Any], wanted: object, reason: str, remedy: str) -> None:
    if given:
        raise RequestError(f"{', '.join(given)} would have no effect: {reason}", found=wanted, remedy=remedy)
