"""Chat templates are foreign code: what takes too much time or memory is stopped and named, all else is unchanged."""

from __future__ import annotations

import contextlib
import time

import pytest
import tokenizers
from fuzz.templates import HOSTILE, SOUND
from transformers.utils.chat_template_utils import _compile_jinja_template

from shortstack.graphs.errors import RequestError
from shortstack.runtime.text import template_sandbox
from shortstack.runtime.text.template_sandbox import Sandbox, TemplateLimitError, render
from shortstack.runtime.text.tokenizer import Tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Turn the light on."}]
VARIABLES = {"messages": MESSAGES, "tools": [{"name": "light", "on": True}], "add_generation_prompt": True}
ENDLESS = (
    "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f() %}{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}"
    "{% endmacro %}{{ f() }}",
    "{% for a in range(9999) %}{{ range(99999) | sum }}{% endfor %}",
)
HUGE = (
    "{{ 'x' * 10**10 }}",
    "{{ [0] * 10**8 }}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ ('x' * 999999).replace('x', 'y' * 999999) }}",
    "{{ ('x' * 999999) | replace('x', 'y' * 999999) }}",
    "{% set ns = namespace(x='xx') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{{ [1] | tojson(indent=10**9) }}",
)


@pytest.mark.parametrize("text", ENDLESS)
def test_a_template_that_takes_too_long_is_stopped(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "TIME_LIMIT_S", 0.2)
    started_s = time.thread_time()
    with pytest.raises(TemplateLimitError, match=r"it takes longer than 0\.2 seconds"):
        render(Sandbox().from_string(text), VARIABLES)
    assert time.thread_time() - started_s < 5


@pytest.mark.parametrize("text", HUGE)
def test_a_template_that_makes_something_huge_is_stopped_before_it_does(text: str) -> None:
    started_s = time.thread_time()
    with pytest.raises((TemplateLimitError, OverflowError)):
        render(Sandbox().from_string(text), VARIABLES)
    assert time.thread_time() - started_s < 5


@pytest.mark.parametrize("text", SOUND)
def test_a_sound_template_renders_as_in_transformers(text: str) -> None:
    loop = "{% for message in messages %}" + text + "{% endfor %}"
    theirs: object
    try:
        theirs = _compile_jinja_template(loop).render(**VARIABLES)
    except Exception as error:
        theirs = type(error)
    ours: object
    try:
        ours = render(Sandbox().from_string(loop), VARIABLES)
    except Exception as error:
        ours = type(error)
    assert ours == theirs


@pytest.mark.parametrize("text", [*HOSTILE, *HUGE])
def test_whatever_a_template_does_is_one_error_of_ours_or_a_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "TIME_LIMIT_S", 0.2)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, "x"))
    tokenizer = Tokenizer(backend, config={}, generation_config={}, chat_template=text)
    with contextlib.suppress(RequestError):
        assert isinstance(tokenizer.render_chat(MESSAGES), str)
