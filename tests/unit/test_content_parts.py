"""Contents of chat messages as lists of parts: texts are read by their meaning, all else is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers

from shortstack.graphs.errors import RequestError
from shortstack.runtime.text.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
KNOWING = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}({{ part['text'] }}){% endfor %}{% endif %}{% endfor %}"
)


def render(content: Any, template: str = PLAIN) -> str:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, "x"))
    tokenizer = Tokenizer(backend, config={}, generation_config={}, chat_template=template)
    return tokenizer.render_chat([{"role": "user", "content": content}])


def text(value: object, kind: str = "text") -> dict[str, object]:
    return {"type": kind, "text": value}


def test_one_text_part_is_that_text() -> None:
    assert render([text("Hi")]) == render("Hi") == "<user>Hi"
    assert render([text("Hi", "input_text")]) == "<user>Hi"


def test_several_text_parts_are_lines() -> None:
    assert render([text("Hi"), "there"]) == "<user>Hi\nthere"


def test_a_template_that_knows_parts_gets_them() -> None:
    assert render([text("a"), text("b")], KNOWING) == "(a)(b)"


@pytest.mark.parametrize("template", [PLAIN, KNOWING])
@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "message 0, part 1 is not text: found 'image_url'"),
        ({"type": "input_audio"}, "found 'input_audio'"),
        ({"no": "type"}, r"found \{'no': 'type'\}"),
        (3, "found 3"),
        (text(None), "part 1 has no text: found None, expected a string"),
    ],
)
def test_what_is_not_text_is_refused_by_name(part: Any, says: str, template: str) -> None:
    with pytest.raises(RequestError, match=says):
        render([text("Hi"), part], template)
