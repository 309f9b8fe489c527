"""`shortstack doctor`: what it finds on this machine, with and without a bundle, and how it reports unequal rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from shortstack import __main__, __version__
from shortstack.cores import usable_cores
from shortstack.graphs.errors import RequestError
from shortstack.graphs.precision import BlockFormat, Precision
from shortstack.runtime.commands import doctor as doctor_module
from shortstack.runtime.commands.row_check import MOST_ROWS, RowCheck, check_rows

FACTS = {"shortstack", "python", "onnxruntime", "providers", "cpu", "cpu_flags", "cores"}
VOCAB = 20


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = __main__.run(["doctor", *arguments])
    said = capsys.readouterr()
    assert said.err == ""
    return code, said.out


class ScriptedStack:
    """Logits that follow from token and position, and change with the number of rows on request."""

    def __init__(self, noise: float, flips: bool) -> None:
        self.noise, self.flips = noise, flips
        self.final = SimpleNamespace(logits=np.zeros((MOST_ROWS, VOCAB), np.float32))
        self.tokens = [0] * MOST_ROWS
        self.prefilled: tuple[int, ...] = ()

    def prefill(self, tokens: list[int], past: int, with_logits: bool) -> None:
        assert past == 0
        assert not with_logits
        self.prefilled = tuple(tokens)

    def put(self, row: int, token: int) -> None:
        self.tokens[row] = token

    def verify(self, rows: int, past: int, with_logits: bool) -> None:
        assert with_logits
        for row in range(rows):
            logits = np.cos(np.arange(VOCAB, dtype=np.float32) * (1 + self.tokens[row]) + past + row)
            if rows > 1:
                logits[3] += self.noise
                if self.flips and rows == MOST_ROWS:
                    logits[int(logits.argmin())] = 9
            self.final.logits[row] = logits


def scripted_model(noise: float = 0.0, flips: bool = False, block_size: int = 32, max_length: int = 64) -> Any:
    stack = ScriptedStack(noise, flips)
    manifest = SimpleNamespace(
        precision=Precision({"a": BlockFormat(4, block_size)}),
        origins={},
        spec=SimpleNamespace(vocab_size=VOCAB),
        plan=SimpleNamespace(drafter=None),
    )
    return SimpleNamespace(
        bundle=SimpleNamespace(manifest=manifest),
        cache=SimpleNamespace(max_length=max_length),
        tokenizer=SimpleNamespace(encode=lambda text: [ord(c) % (2 * VOCAB) for c in text]),
        exclusive_stack=lambda: stack,
        stack=stack,
    )


# The check


def test_equal_rows_are_exact_for_every_count() -> None:
    model = scripted_model()
    checks = check_rows(model, list(range(12)))
    assert checks == [RowCheck(rows, 0.0, True) for rows in range(1, MOST_ROWS + 1)]
    assert all(check.is_exact for check in checks)
    assert model.stack.prefilled == tuple(range(12 - MOST_ROWS))


def test_rows_that_differ_a_little_are_not_exact_and_pick_the_same_tokens() -> None:
    checks = check_rows(scripted_model(noise=1e-6), list(range(12)))
    assert checks[0].is_exact, "one row is one row"
    for check in checks[1:]:
        assert 0 < check.max_difference < 1e-5
        assert check.same_tokens
        assert not check.is_exact


def test_rows_that_pick_another_token_are_found() -> None:
    checks = check_rows(scripted_model(flips=True), list(range(12)))
    assert [check.same_tokens for check in checks] == [True] * (MOST_ROWS - 1) + [False]


def test_a_text_that_leaves_nothing_before_the_rows_is_refused() -> None:
    with pytest.raises(RequestError, match=f"found {MOST_ROWS} tokens, expected over {MOST_ROWS}"):
        check_rows(scripted_model(), list(range(MOST_ROWS)))


# The command


def test_without_a_bundle_it_says_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor(capsys)
    assert code == 0
    for words in (__version__, ort.__version__, "CPUExecutionProvider", "processor", "not checked: give a bundle"):
        assert words in out
    code, out = doctor(capsys, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts.keys() == FACTS
    assert facts["cores"] == usable_cores()
    assert facts["providers"] == ort.get_available_providers()
    assert facts["cpu"]


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [
        (scripted_model(), 0, ("rows 8      bit for bit; same tokens", "drafts are verified exactly here")),
        (scripted_model(noise=1e-6), 0, ("largest difference", "same tokens", "verified exactly here")),
        (scripted_model(flips=True), 1, ("rows 7      bit for bit", "OTHER TOKENS", "may fork from plain decoding")),
        (scripted_model(block_size=128), 0, ("blocks of 128 are rounded differently",)),
    ],
    ids=["exact", "close", "other tokens", "large blocks"],
)
def test_with_a_bundle_it_judges_its_rows(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: Any,
    code: int,
    says: tuple[str, ...],
) -> None:
    monkeypatch.setattr(doctor_module, "load", lambda path, **options: model)
    monkeypatch.chdir(tmp_path)
    Path("somewhere").mkdir()
    Path("somewhere", "bundle.json").touch()
    found, out = doctor(capsys, "somewhere")
    assert found == code
    for words in says:
        assert words in out
    assert ("OTHER TOKENS" in out) == (code == 1)
    found, out = doctor(capsys, "somewhere", "--json")
    facts = json.loads(out)
    assert found == code
    assert facts.keys() == FACTS | {"bundle", "blocks_kept", "other_block_sizes", "rows"}
    assert facts["bundle"] == "somewhere"
    assert facts["other_block_sizes"] == [128] * ("blocks of 128" in " ".join(says))
    assert [row["rows"] for row in facts["rows"]] == list(range(1, MOST_ROWS + 1))
    assert all(row["same_tokens"] for row in facts["rows"]) == (code == 0)


def test_a_text_of_few_tokens_is_repeated_and_of_many_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted_model(max_length=MOST_ROWS + 3)
    assert len(doctor_module._tokens(model)) == MOST_ROWS + 3
    for ids in ([], [5], [1, 2, 3], [VOCAB, VOCAB + 1]):
        model.tokenizer = SimpleNamespace(encode=lambda text, ids=ids: list(ids))
        tokens = doctor_module._tokens(model)
        assert MOST_ROWS < len(tokens) <= MOST_ROWS + 3
        assert set(tokens) <= {0, *ids} - {VOCAB, VOCAB + 1}


def test_a_bundle_that_does_not_exist_is_a_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.run(["doctor", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_bundle_is_exact_on_this_machine(
    tiny_bundles: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int
) -> None:
    from helpers.quantized import QuantizedBundles, preset
    from helpers.tiny_models import BASE

    folder = QuantizedBundles(tmp_path)(tiny_bundles.bundle(BASE, 1), preset(BlockFormat(bits)))
    code, out = doctor(capsys, str(folder), "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["other_block_sizes"] == []
    assert all(row["max_difference"] == 0 and row["same_tokens"] for row in facts["rows"])
