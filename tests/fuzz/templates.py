"""Chat templates put together from sound and hostile pieces."""

from __future__ import annotations

import random

SOUND = (
    "{{ message['role'] }}",
    "{{ message.content }}",
    "{{ message['content'] | trim }}",
    "{% if loop.first %}<|im_start|>{% endif %}",
    "{{ '<|im_start|>' + message['role'] + '\\n' }}",
    "{% set text = message['content'] %}{{ text.split(' ')[-1] }}",
    "{{ messages | length }}",
    "{% if message.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}",
    "{{ message | tojson }}",
    "{% if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif %}",
    "{% for i in range(3) %}{{ i }}{% endfor %}",
    "{{- message.content[:5] -}}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro show(m) %}[{{ m.role }}]{% endmacro %}{{ show(message) }}",
    "{{ strftime_now('%Y') | length }}",
    "{% generation %}{{ message.content }}{% endgeneration %}",
)
HOSTILE = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 10 ** 10 ** 8 }}",
    "{{ ('x' * 99999) | center(10**10) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}",
    "{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ undefined_name.field }}",
    "{{ undefined_function() }}",
    "{{ message.content | no_such_filter }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ [1][9] }}",
    "{{ lipsum(n=100000) }}",
    "{% set x = [1] %}{% for i in range(99999) %}{% set _ = x.extend(x) %}{% endfor %}",
    "{{ '\\ud800' }}",
    "{{ range(10**18) | list }}",
    "{{ range(10**7) | sum }}",
    "{{ (range(99999) | list | string) * 999 }}",
)
_BROKEN = (
    "{%",
    "{{",
    "{% if %}",
    "{% for x in %}",
    "{% endfor %}",
    "{{ 'a }}",
    "{% set = 1 %}",
    "{# never closed",
    "{{ ( }}",
    "\0",
    "}}",
)


def draw(rng: random.Random) -> str:
    """Return a template; a third are sound, a third hostile, a third have a syntax error somewhere."""
    pieces = rng.choices(SOUND, k=rng.randint(1, 5))
    kind = rng.randrange(3)
    if kind:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(HOSTILE if kind == 1 else _BROKEN))
    body = "".join(pieces)
    return "{% for message in messages %}" + body + "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
