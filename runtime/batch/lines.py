"""Files of many prompts, and files of their answers: one JSON object per line.

==========================================================  ==========================================================
line of a prompt                                            what it is
==========================================================  ==========================================================
``{"prompt": "Why is the sky blue?"}``                      a question, through the bundle's chat template
``{"messages": [{"role", "content"}, ...]}``                a conversation, through the chat template
``{"text": "Once upon a time"}``                            text as it is, to be continued
``{"custom_id", "method", "url", "body"}``                  OpenAI's batch format, for ``/v1/chat/completions`` and
                                                            ``/v1/completions``
==========================================================  ==========================================================

The first three may have an ``id``, and options of their own (:data:`OPTIONS`), which win over those of the command.
Without an ``id`` the number of the line is the id. ``kind`` and ``metadata`` are the user's own notes: they are not
looked at. OpenAI's lines are answered in OpenAI's form. In their bodies,
fields that are not known are ignored, as OpenAI's clients expect, and an object ``shortstack`` may hold our options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shortstack.graphs.errors import RequestError
from shortstack.graphs.read_file import parse_json, read_text
from shortstack.runtime.decode.sampling import IDLE_WHEN_GREEDY, SamplingParams
from shortstack.runtime.request import ExitEarly, Request, Speculate, Strategy, make_request
from shortstack.runtime.text.tokenizer import Tokenizer

OPTIONS = (
    "max_new_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "template_variables",
    "tools",
    "strategy",
    "exit_layer",
    "exits",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
)
"""What a line may say besides its prompt, by the names of the Python calls."""
_PROMPTS = ("prompt", "messages", "text")
_NOTES = ("kind", "metadata")
_SAMPLING = tuple(SamplingParams.__dataclass_fields__)
_STRATEGY = ("strategy", "exit_layer", "exits")
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
_LINE = 'an object with "prompt", "messages" or "text", or a line of OpenAI\'s batch format'
_REFUSED = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": None,
    "logit_bias": None,
    "response_format": {"type": "text"},
}
"""Fields of OpenAI that would change the answer, with the value that asks for nothing."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file of prompts.

    Attributes:
        id: What its answer is called.
        request: What is asked for.
        is_openai: It is in OpenAI's format, and so is its answer.
        url: OpenAI's endpoint.
        model: The model that it names, which is repeated and not looked at.
        number: Its number in the file, if that is known.
        text: It as it stands there.
    """

    id: str
    request: Request
    is_openai: bool = False
    url: str = ""
    model: str = ""
    number: int | None = None
    text: str = ""


def read_lines(path: Path, defaults: Request, tokenizer: Tokenizer) -> list[Line]:
    """Read a file of prompts.

    Args:
        path: The file.
        defaults: What lines do not say themselves.
        tokenizer: The bundle's, which may have no chat template.

    Raises:
        RequestError: The file cannot be read, a line is not a prompt, an option is wrong, or two lines have one id;
            names the line.
    """
    content = read_text(path, RequestError, "give a UTF-8 jsonl file")
    lines: list[Line] = []
    known: dict[str, int] = {}
    for number, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        line = read_line(text, number, where, defaults, tokenizer)
        if line.id in known:
            raise RequestError(
                f"{where}: the id {line.id!r} is that of line {known[line.id]}", remedy="give every line its own id"
            )
        known[line.id] = number
        lines.append(line)
    if not lines:
        raise RequestError(f"{path} has no prompt", expected=f"in each line {_LINE}")
    return lines


def read_line(text: str, number: int | None, where: str, defaults: Request, tokenizer: Tokenizer) -> Line:
    """Read one line.

    Args:
        text: The line.
        number: Its id if it has none; None: it must have one.
        where: What a message calls it.
        defaults: As for :func:`read_lines`.
        tokenizer: As for :func:`read_lines`.

    Raises:
        RequestError: It is not a prompt, or an option is wrong.
    """
    entry = parse_json(text, where, RequestError, f"write {_LINE}")
    if not isinstance(entry, dict):
        raise RequestError(where, found=repr(text[:60]), expected=_LINE)
    try:
        return replace(_parse(entry, number, defaults, tokenizer), number=number, text=text)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


def unread_line(text: str, number: int | None) -> Line:
    """Return what an answer repeats of a line that :func:`read_line` refuses: its id and its format."""
    try:
        entry = parse_json(text, "", RequestError)
    except RequestError:
        entry = None
    said = entry if isinstance(entry, dict) else {}
    is_openai = isinstance(said.get("custom_id"), str)
    id_ = said.get("custom_id" if is_openai else "id", number)
    return Line(str(id_) if isinstance(id_, str | int) else "", Request("any"), is_openai, number=number, text=text)


def _parse(entry: Mapping[str, Any], number: int | None, defaults: Request, tokenizer: Tokenizer) -> Line:
    if "custom_id" in entry or "body" in entry:
        return _parse_openai(entry, defaults, tokenizer)
    if unknown := sorted(entry.keys() - {"id", *_PROMPTS, *OPTIONS, *_NOTES}):
        raise RequestError(
            f"unknown field {', '.join(unknown)}",
            expected=f"id, {', '.join((*_PROMPTS, *OPTIONS))}",
            remedy="put notes of your own into metadata",
        )
    given = [name for name in _PROMPTS if name in entry]
    if len(given) != 1:
        raise RequestError("prompt", found=" and ".join(given) or "none", expected=f"one of {', '.join(_PROMPTS)}")
    value = entry[given[0]]
    if given[0] != "messages" and not isinstance(value, str):
        raise RequestError(given[0], found=repr(value)[:60], expected="text")
    prompt = value if given[0] == "text" else _chat(value if given[0] == "messages" else _question(value), tokenizer)
    id_ = entry.get("id", number)
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise RequestError("id", found=repr(id_)[:60], expected="text or a whole number")
    return Line(str(id_), _request(prompt, {name: entry[name] for name in OPTIONS if name in entry}, defaults))


def _parse_openai(entry: Mapping[str, Any], defaults: Request, tokenizer: Tokenizer) -> Line:
    id_, url, body = entry.get("custom_id"), entry.get("url", _CHAT), entry.get("body")
    if not isinstance(id_, str):
        raise RequestError("custom_id", found=repr(id_)[:60], expected="text")
    if url not in (_CHAT, _COMPLETION):
        raise RequestError("url", found=repr(url)[:60], expected=f"{_CHAT} or {_COMPLETION}")
    if not isinstance(body, Mapping):
        raise RequestError("body", found=repr(body)[:60], expected="an object")
    for name, idle in _REFUSED.items():
        if body.get(name) not in (None, idle, False, {}):
            raise RequestError(f"body.{name} is not supported", found=repr(body[name])[:60], remedy="leave it out")
    options: dict[str, Any] = {}
    for name, theirs in (
        ("max_new_tokens", ("max_completion_tokens", "max_tokens")),
        ("temperature", ("temperature",)),
        ("top_p", ("top_p",)),
        ("seed", ("seed",)),
        ("tools", ("tools",)),
    ):
        found = next((body[each] for each in theirs if body.get(each) is not None), None)
        if found is not None:
            options[name] = found
    if (stop := body.get("stop")) is not None:
        options["stop"] = [stop] if isinstance(stop, str) else stop
    own = body.get("shortstack", {})
    if not isinstance(own, Mapping) or (unknown := sorted(own.keys() - set(OPTIONS))):
        shown = repr(own)[:60] if not isinstance(own, Mapping) else ", ".join(unknown)
        raise RequestError("body.shortstack", found=shown, expected=f"an object with some of {', '.join(OPTIONS)}")
    if (own.get("temperature", options.get("temperature", defaults.sampling.temperature))) == 0:
        for name in ("top_p", "seed"):  # clients send the rest of a sampling too, which greedy decoding has no use for
            options.pop(name, None)
    if url == _CHAT:
        if not isinstance(body.get("messages"), list):
            raise RequestError("body.messages", found=repr(body.get("messages"))[:60], expected="a list of messages")
        prompt: Any = _chat(body["messages"], tokenizer)
    else:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if not isinstance(prompt, str | list):
            raise RequestError("body.prompt", found=repr(prompt)[:60], expected="text, or a list of token ids")
    request = _request(prompt, {**options, **own}, defaults)
    return Line(id_, request, is_openai=True, url=url, model=str(body.get("model", "")))


def _question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _chat(messages: Any, tokenizer: Tokenizer) -> Any:
    """Return messages for the chat template; without one, the text of a single question."""
    is_chat = isinstance(messages, list) and messages and all(isinstance(message, Mapping) for message in messages)
    if not is_chat:
        raise RequestError("messages", found=repr(messages)[:60], expected='a list of {"role", "content"}')
    if tokenizer.has_chat_template:
        return messages
    if len(messages) > 1 or not isinstance(messages[0].get("content"), str):
        raise RequestError("this bundle has no chat template for a conversation", remedy="give the whole text as text")
    return messages[0]["content"]


def _request(prompt: Any, options: Mapping[str, Any], defaults: Request) -> Request:
    """Return the request of a line: its own options, and the defaults where it has none."""
    sampling = {name: options[name] for name in _SAMPLING if name in options}
    strategy = {name: options[name] for name in _STRATEGY if name in options}
    others = {name: value for name, value in options.items() if name not in sampling and name not in strategy}
    merged = {name: getattr(defaults.sampling, name) for name in _SAMPLING} | sampling
    if merged["temperature"] == 0:  # what the command says of sampling is idle in a line that is greedy
        usual = SamplingParams()
        merged |= {name: getattr(usual, name) for name in IDLE_WHEN_GREEDY if name not in sampling}
    own = make_request(prompt, sampling=SamplingParams(**merged), **strategy, **others)
    kept: dict[str, Any] = {
        name: getattr(defaults, name)
        for name in ("max_new_tokens", "stop", "stop_token_ids", "ignore_eos", "template_variables")
        if name not in others
    }
    if isinstance(own.prompt, str):
        kept.pop("template_variables", None)
    return replace(own, reuse_cache=True, strategy=_merged(own.strategy, strategy, defaults.strategy), **kept)


def _merged(own: Strategy, said: Mapping[str, Any], usual: Strategy) -> Strategy:
    """Return the strategy of a line, with what the command says about the same strategy."""
    if not said:
        return usual
    if isinstance(own, Speculate) and isinstance(usual, Speculate):
        return replace(usual, exit_layer=own.exit_layer) if "exit_layer" in said else usual
    if isinstance(own, ExitEarly) and isinstance(usual, ExitEarly):
        return ExitEarly(replace(usual.policy, criterion=own.policy.criterion))
    return own
