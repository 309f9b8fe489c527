"""Options by group in ``--help``, and options that environment variables set."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import pytest

from shortstack.__main__ import COMMANDS, run
from shortstack.command_options import ENVIRONMENT, Command, gather, option_group
from shortstack.command_paths import BundlePath

GROUPED = {
    "generate": ["Prompt", "Decoding", "Sampling", "Drafting", "Early exit", "Machine", "Output"],
    "export": ["Exits", "Drafter", "Model", "Formats", "Calibration", "Output"],
    "calibrate": ["Prompts", "Guarantee", "Early exit", "Machine", "Output"],
    "parity": ["Reference", "Prompts", "Machine", "Output"],
}


def help_of(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    capsys.readouterr()
    assert run([command, "--help"]) == 0
    return capsys.readouterr().out


def command_named(name: str) -> click.Command:
    module, _, attribute = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    return command


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", GROUPED)
def test_help_lists_every_option_once_under_the_title_of_its_group(
    command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(command, capsys, monkeypatch, columns)
    titles = re.findall(r"^([A-Z][a-z ]+).*:$", text, re.MULTILINE)
    assert [title.strip() for title in titles] == [*GROUPED[command], "Options"]
    flags = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
    expected = {max(p.opts, key=len) for p in command_named(command).params if isinstance(p, click.Option)}
    assert sorted(flags) == sorted(expected | {"--help"})
    assert max(map(len, text.splitlines())) <= columns
    assert text.split("Options:")[1].split() == ["-h,", "--help", "Show", "this", "message", "and", "exit."]


def test_help_uses_a_wide_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = (help_of("generate", capsys, monkeypatch, columns) for columns in (80, 120))
    assert max(map(len, wide.splitlines())) > 100
    assert wide.count("\n") < narrow.count("\n")


def test_the_columns_of_all_groups_are_aligned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of("export", capsys, monkeypatch, 120)
    starts = {found.end() for line in text.splitlines() if (found := re.match(r"  -.*?\S {2,}(?=\S)", line))}
    assert len(starts) == 1


def test_gathered_options_arrive_as_one_value_under_their_title(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Size:
        width: int
        height: int

    seen: list[tuple[Size, bool]] = []

    @click.command(cls=Command)
    @gather(Size, "size", click.option("--width", type=int), click.option("--height", type=int), title="Size")
    @option_group("Other", click.option("--deep", is_flag=True))
    def probe(size: Size, deep: bool) -> None:
        seen.append((size, deep))

    probe.main(["--height", "2", "--width", "1"], standalone_mode=False)
    assert seen == [(Size(1, 2), False)]
    probe.main(["--help"], standalone_mode=False)
    assert re.findall(r"^(\w+):\n", capsys.readouterr().out, re.MULTILINE) == ["Size", "Other", "Options"]


# Environment variables


def test_threads_and_provider_have_the_same_variable_in_every_command() -> None:
    variables = {"--threads": "SHORTSTACK_THREADS", "--provider": "SHORTSTACK_PROVIDER"}
    seen = set()
    for name in COMMANDS:
        for option in command_named(name).params:
            flag = max(option.opts, key=len)
            if isinstance(option, click.Option) and flag in variables:
                assert option.envvar == variables[flag], f"{name} {flag}"
                assert option.show_envvar
                seen.add(flag)
    assert seen == variables.keys()


def test_a_variable_sets_an_option_and_the_command_line_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shortstack.runtime.commands import doctor

    loaded: list[dict[str, object]] = []

    def load(path: str, **options: object) -> None:
        loaded.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "load", load)
    (tmp_path / "bundle.json").touch()
    monkeypatch.setenv("SHORTSTACK_THREADS", "3")
    monkeypatch.setenv("SHORTSTACK_PROVIDER", "cuda cpu")
    for given in ([], ["--threads", "2", "--provider", "cpu"]):
        assert run(["doctor", str(tmp_path), *given]) == 130
    monkeypatch.setenv("SHORTSTACK_THREADS", "")
    monkeypatch.setenv("SHORTSTACK_PROVIDER", "")
    assert run(["doctor", str(tmp_path)]) == 130
    assert loaded == [
        {"providers": ("cuda", "cpu"), "threads": 3},
        {"providers": ("cpu",), "threads": 2},
        {"providers": None, "threads": None},
    ]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("SHORTSTACK_THREADS", "many", "'many' is not a valid integer"),
        ("SHORTSTACK_THREADS", "0", "threads: found 0, expected 1..1024"),
        ("SHORTSTACK_PROVIDER", "abacus", "provider 'abacus' is not in the installed onnxruntime"),
        ("SHORTSTACK_LOG", "loud", "'loud' is not one of"),
        ("SHORTSTACK_DEBUG", "perhaps", "'perhaps' is not a valid boolean"),
    ],
)
def test_an_invalid_value_names_its_variable(
    tiny_bundles: object,
    variable: str,
    value: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from helpers.tiny_models import BASE, TinyBundles

    assert isinstance(tiny_bundles, TinyBundles)
    bundle = tiny_bundles.bundle(BASE, 1)
    monkeypatch.setenv(variable, value)
    capsys.readouterr()
    assert run(["doctor", str(bundle)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert variable in error


def test_an_error_about_an_option_that_was_given_blames_no_variable(
    tiny_bundles: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.tiny_models import BASE, TinyBundles

    assert isinstance(tiny_bundles, TinyBundles)
    monkeypatch.setenv("SHORTSTACK_THREADS", "1")
    assert run(["doctor", str(tiny_bundles.bundle(BASE, 1)), "--threads", "0"]) == 2
    assert "SHORTSTACK" not in capsys.readouterr().err


def test_every_documented_variable_is_in_use_and_in_the_help(
    package_sources: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [path.read_text(encoding="utf-8") for path in package_sources]
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for variable in ENVIRONMENT:
        assert variable in text
        assert sum(source.count(f'"{variable}"') for source in sources) >= 2, "documented, and used elsewhere"


def test_a_path_of_a_bundle_is_still_completed_as_a_path() -> None:
    bundle = next(p for p in command_named("inspect").params if p.name == "bundle")
    assert isinstance(bundle.type, BundlePath)
    items = bundle.type.shell_complete(click.Context(command_named("inspect")), bundle, "")
    assert [item.type for item in items] == ["file"]
