"""The tokenizer files of a bundle: what is read from each one, the chat template, and what is refused."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from shortstack.graphs.errors import BundleError, RequestError
from shortstack.runtime.text.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat, the end", "Grüße 👋 from the café 🎉", "def f(x):\n    return x + 1\n"]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def with_template(folder: Path, template: str) -> Tokenizer:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.load(folder)


def test_decoding_the_ids_of_a_text_gives_the_text(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    for text in [*TEXTS, "unseen ☃ 漢字 \x00"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_added_and_skipped_only_on_request(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("the")[0] == 0
    assert 0 not in tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("the"), skip_special_tokens=False) == "<s>the"
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.vocab_size == byte_level_backend().get_vocab_size()


def test_truncation_and_padding_of_the_training_run_do_not_cut_a_prompt(folder: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert len(tokenizer.encode("t", add_special_tokens=False)) == 1


def test_ids_that_end_a_text_come_from_both_configs_without_repeats(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 7]})
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "</s>"}, "bos_token": "<s>"})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_ids == (2, 7, 1)
    assert tokenizer.bos_token_id == 0


def test_one_end_id_named_twice_counts_once(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": 1, "bos_token_id": 5})
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>", "bos_token": None})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.bos_token_id == 5


def test_without_configs_no_id_begins_or_ends_a_text(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((), None)
    assert not tokenizer.has_chat_template


def test_the_bytes_of_byte_level_tokens_joined_are_the_text(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(TEXTS[1], add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token_id) or b"" for token_id in ids) == TEXTS[1].encode()
    assert tokenizer.token_bytes(tokenizer.vocab_size + 1) == b""


def test_a_chat_is_rendered_and_encoded_without_a_second_bos(folder: Path) -> None:
    tokenizer = with_template(folder, CHATML)
    rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(HELLO) == rendered
    assert tokenizer.render_chat(HELLO, add_generation_prompt=False) == rendered.removesuffix("<|im_start|>assistant\n")
    ids = tokenizer.encode_chat(HELLO)
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == rendered


def test_a_template_sees_the_special_tokens_and_the_callers_variables(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    tokenizer = with_template(folder, "{{ bos_token }}{{ eos_token }}{{ thinking }}{{ unk_token is defined }}")
    assert tokenizer.render_chat(HELLO, variables={"thinking": False}) == "<s></s>FalseFalse"


def test_a_template_can_use_what_transformers_provides(folder: Path) -> None:
    template = (
        "{% for message in messages %}\n"
        "    {% if loop.index > 1 %}\n"
        "        {% break %}\n"
        "    {% endif %}\n"
        "{% generation %}{{ message | tojson }}{% endgeneration %}{{ strftime_now('%Y') }}\n"
        "{% endfor %}"
    )
    chat = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "unseen"}]
    before = datetime.now().year
    rendered = with_template(folder, template).render_chat(chat)
    assert rendered in {f'{{"role": "user", "content": "<é>"}}{year}\n' for year in (before, datetime.now().year)}


def test_a_template_in_the_config_is_used_when_there_is_no_file(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"chat_template": "config"})
    assert Tokenizer.load(folder).render_chat(HELLO) == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert Tokenizer.load(folder).render_chat(HELLO) == "named"
    assert with_template(folder, "file").render_chat(HELLO) == "file"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 'a' + messages[0].nothing }}", "refused the messages"),
        ("{{ messages[0]['content'] + 1 }}", "refused the messages"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
        ("{% if %}", "not a valid jinja2 template"),
    ],
)
def test_a_template_that_fails_refuses_the_request(folder: Path, template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        with_template(folder, template).render_chat(HELLO)


def test_a_chat_without_a_template_is_refused_with_a_remedy(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"no chat template\. Give a plain prompt"):
        Tokenizer.load(folder).encode_chat(HELLO)


@pytest.mark.parametrize("messages", [[], "Hello", ["Hello"], [{"role": "user", "content": object()}]])
def test_a_prompt_that_is_not_a_chat_is_refused(folder: Path, messages: Any) -> None:
    with pytest.raises(RequestError, match="chat messages"):
        with_template(folder, CHATML).render_chat(messages)


def test_variables_cannot_replace_the_messages(folder: Path) -> None:
    with pytest.raises(RequestError, match="found bos_token, messages"):
        with_template(folder, CHATML).render_chat(HELLO, variables={"messages": [], "bos_token": ""})


def test_a_missing_tokenizer_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing\. Export the checkpoint again"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"eos_token": '),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"eos_token": 3}'),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("generation_config.json", b"\xff"),
        ("generation_config.json", b'{"eos_token_id": "2"}'),
        ("generation_config.json", b'{"eos_token_id": [1, true]}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_malformed_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        Tokenizer.load(folder)
