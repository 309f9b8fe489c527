"""`shortstack generate --strategy early-exit`: its options, its output, its errors, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from helpers.bad_input import Refused, edit_json
from helpers.tiny_models import BASE, SPECULATOR, TinyBundles
from shortstack import __version__
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import RequestError
from shortstack.runtime import ExitPolicy, Model, load, parse_criterion
from shortstack.runtime.calibration.profile import Point, Profile, precision_words, write_profile
from shortstack.runtime.commands.generate import generate
from shortstack.runtime.early_exit import loop

EXITS = (1, 2, 3)
EARLY = ("--strategy", "early-exit")
RULE = ("--exit-when", "top_prob >= 0.3")
TOKENS = 24


@pytest.fixture(scope="module")
def tiny(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.bundle(SPECULATOR, *EXITS)


@pytest.fixture(scope="module")
def tiny_model(tiny: Path) -> Model:
    return load(tiny)


@pytest.fixture
def profile(tiny: Path, tmp_path: Path) -> Path:
    """A profile for the tiny bundle with the threshold 0.2 at the exits 1 and 3."""
    manifest = open_bundle(tiny).manifest
    points = tuple(Point(t, 0.05, 0.01, True, 3.0, 0.6, 100, None) for t in (0.5, 0.2))
    path = tmp_path / "exit-profile.json"
    profile = Profile(
        "chat", "top_prob >= {}", 0.2, "top_prob >= 0.2", (1, 3), 0.1, 0.05, 40, "text", "hoeffding", 64, 0.05, 3.0,
        0.6, 0.5, (0.5, 0.2), manifest.weights_sha256, precision_words(manifest), __version__, points,
    )  # fmt: skip
    write_profile(profile, path)
    return path


def run(bundle: Path, *options: object, code: int = 0) -> Result:
    arguments = [str(bundle), "Hello there", "--raw", "-n", str(TOKENS), *map(str, options)]
    done = CliRunner().invoke(generate, arguments, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_tokens_that_leave_unchecked_at_an_exit_without_weights_of_its_own_are_warned_of(
    tiny: Path, profile: Path
) -> None:
    warning = "warning: nothing checks the tokens that leave after 1, 3 layers"
    assert warning in run(tiny, *EARLY, *RULE, "-e", 1, "-e", 3).stderr
    for options in (
        (*EARLY, *RULE, "--verify-exits", "exact"),
        (*EARLY, *RULE, "--compare")[2:],
        (*EARLY, "--profile", profile),
        (*EARLY, "--exit-when", "never"),
        (),
    ):
        assert "warning" not in run(tiny, *options).stderr, options


def run_json(bundle: Path, *options: object, code: int = 0) -> Any:
    return json.loads(run(bundle, *options, "--json", code=code).stdout)


# Generated tokens


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ((), {}),
        (("-e", 1, "-e", 3), {"exit_layers": (1, 3)}),
        (("--verify-exits", "exact"), {"verify": "exact"}),
        (("--verify-exits", "rollback"), {"verify": "rollback", "rollback_below": 0.05}),
        (("--verify-exits", "rollback", "--rollback-below", 0.2), {"verify": "rollback", "rollback_below": 0.2}),
        (("--kv-policy", "pipeline"), {"kv_policy": "pipeline"}),
        (("--kv-policy", "recompute", "--max-pending", 2), {"kv_policy": "recompute", "max_pending": 2}),
        (("--prefill-exit",), {"prefill_exit": True}),
        (("--upper-provider", "cpu", "--kv-policy", "auto"), {"kv_policy": "auto"}),
    ],
)
def test_options_become_the_policy(
    tiny: Path, tiny_model: Model, options: tuple[object, ...], policy: dict[str, Any]
) -> None:
    found = run_json(tiny, *EARLY, *RULE, *options)
    exits = ExitPolicy(parse_criterion(RULE[1]), **policy)
    expected = tiny_model.generate("Hello there", max_new_tokens=TOKENS, strategy="early-exit", exits=exits)
    assert found["tokens"] == list(expected.tokens)
    assert found["stats"]["exits"] == {str(depth): count for depth, count in expected.stats.exits.items()}


def test_upper_segments_may_have_separate_threads(tiny: Path) -> None:
    # In a separate process: onnxruntime has either one thread pool for all sessions or one for each.
    options = [*EARLY, *RULE, "--kv-policy", "pipeline", "--upper-provider", "cpu", "--upper-threads", "1", "--json"]
    command = [sys.executable, "-m", "shortstack", "generate", str(tiny), "Hello there", "--raw", "-n", str(TOKENS)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == run_json(tiny, *EARLY, *RULE)["tokens"]


def test_a_profile_decides_when_tokens_exit(tiny: Path, tiny_model: Model, profile: Path) -> None:
    found = run_json(tiny, *EARLY, "--profile", profile)
    exits = ExitPolicy(parse_criterion("top_prob >= 0.2"), (1, 3))
    expected = tiny_model.generate("Hello there", max_new_tokens=TOKENS, strategy="early-exit", exits=exits)
    assert found["tokens"] == list(expected.tokens)


def test_a_profile_without_a_safe_threshold_is_reported(tiny: Path, profile: Path) -> None:
    edit_json(profile, threshold=None, criterion="never")
    done = run(tiny, *EARLY, "--profile", profile)
    assert "found no safe threshold" in done.stderr
    assert "exited 0%" in done.stderr


# Output


def test_json_has_a_record_per_token_if_requested(tiny: Path) -> None:
    found = run_json(tiny, *EARLY, *RULE, "--show-exits")
    assert [each["token"] for each in found["exits"]] == found["tokens"]
    assert {frozenset(each) for each in found["exits"]} == {frozenset({"token", "exit_layer", "confidence", "pending"})}
    early = [each for each in found["exits"] if each["exit_layer"] < SPECULATOR.layers]
    assert early
    assert all(each["confidence"] >= 0.3 and each["pending"] >= 1 for each in early)
    assert "exits" not in run_json(tiny, *EARLY, *RULE)


@pytest.mark.parametrize("strategy", ["plain", "self-speculative"])
def test_exits_are_shown_for_every_strategy(tiny: Path, strategy: str) -> None:
    done = run(tiny, "--strategy", strategy, "--show-exits")
    assert "all 6 layers" in done.stdout
    assert ("after 1 layer " in done.stdout) == (strategy == "self-speculative")
    assert "mean exit depth" in done.stderr


def test_shown_exits_end_in_a_legend_and_a_mean_depth(tiny: Path) -> None:
    done = run(tiny, *EARLY, *RULE, "--show-exits")
    assert "[1]" in done.stdout
    assert "mean confidence" in done.stdout.splitlines()[-1]
    assert "of 6 layers · exited" in done.stderr
    assert "\x1b" not in done.stdout.splitlines()[-1]


def test_compare_includes_early_exit_and_its_difference_is_not_a_failure(tiny: Path) -> None:
    plain, drafted, early = run_json(tiny, "--compare", "--exit-when", "always", "-e", 1)
    assert [one["strategy"] for one in (plain, drafted, early)] == ["plain", "self-speculative", "early-exit"]
    assert plain["tokens"] == drafted["tokens"] != early["tokens"]
    assert not early["agreement"]["is_exact"]
    first = early["agreement"]["first_difference"]
    assert plain["tokens"][:first] == early["tokens"][:first]
    assert plain["tokens"][first] != early["tokens"][first]
    text = run(tiny, "--compare", "--exit-when", "always", "-e", 1).stdout
    assert "early exit agrees with plain decoding in the first" in " ".join(text.split())


def test_compare_finds_verified_early_exit_identical(tiny: Path) -> None:
    done = run(tiny, "--compare", *RULE, "--verify-exits", "exact")
    assert done.stdout.count("yes") >= 2
    assert "early exit agrees" not in done.stdout


def test_compare_without_a_rule_leaves_early_exit_out(tiny: Path) -> None:
    assert [one["strategy"] for one in run_json(tiny, "--compare")] == ["plain", "self-speculative"]


def test_compare_fails_if_verified_early_exit_differs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(self: Any, rows: int, drafts: list[Any]) -> Any:
        tokens = [draft.token for draft in drafts]
        return loop.Verdict((*tokens, *self._stack.final.token[len(drafts) : rows].tolist()), len(drafts))

    monkeypatch.setattr(loop.EarlyExit, "_judge", accept_all)
    done = run(tiny, "--compare", "--exit-when", "always", "-e", 1, "--verify-exits", "exact", code=1)
    assert "NO" in done.stdout


# Reports


def test_a_report_is_written_in_addition_to_the_answer(tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run(tiny, *EARLY, *RULE, "--report", page)
    assert f"report: {page}" in done.stderr
    html = page.read_text(encoding="utf-8")
    assert html.count("data-tip=") == TOKENS
    assert "This and other thresholds of top_prob" in html
    assert html.count("<small>this text</small>") == 1
    alone = run(tiny, *EARLY, *RULE)
    assert done.stdout == alone.stdout


def test_a_report_has_no_sweep_if_it_is_off_or_impossible(tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    run(tiny, *EARLY, *RULE, "--report", page, "--no-sweep")
    assert "other thresholds" not in page.read_text(encoding="utf-8")
    run(tiny, *EARLY, "--exit-when", "patience >= 2", "--report", page)
    assert "other thresholds" not in page.read_text(encoding="utf-8")


def test_a_report_for_a_profile_shows_the_calibration(tiny: Path, tmp_path: Path, profile: Path) -> None:
    page = tmp_path / "page.html"
    found = run_json(tiny, "--compare", "--profile", profile, "--report", page)
    assert len(found) == 3
    html = page.read_text(encoding="utf-8")
    assert "over 40 prompts" in html
    assert 'class="calibrated"' in html


# Refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((*EARLY,), ("when a token may leave", "--exit-when 'top_prob >= 0.9'", "--profile")),
        ((*EARLY, *RULE, "-e", 2), ("unknown exit 2", "[1, 3]", "--exit-layer 2")),
        ((*EARLY, "--exit-when", "top_prob >= 0.9 [2: 0.5]"), ("unknown exit 2", "[1, 3]")),
        ((*EARLY, "--exit-when", "top_prob >= -1"), ("threshold of top_prob is out of range", "-1", "0..1")),
        ((*EARLY, "--exit-when", "top_prob > 0.9"), ("cannot be read", "rite >= in place of >")),
        ((*EARLY, "--exit-when", "top_prob >= 90"), ("out of range", "found 90", "0..1", "rite 0.9 for 90 percent")),
        ((*EARLY, "--exit-when", "max_depth = 9..7"), ("lets no token leave", "rite max_depth = 9..1")),
        ((*EARLY, "--exit-when", ""), ("cannot be read", "the end")),
        ((*EARLY, "--exit-when", "gate >= 0.5"), ("needs a gate", "top_prob or margin")),
        ((*EARLY, "--exit-when", "patience >= 3"), ("at least 3 exits",)),
        ((*EARLY, *RULE, "--rollback-below", 0.1), ("rollback_below does nothing", "erify by rollback")),
        ((*EARLY, *RULE, "--verify-exits", "rollback", "--rollback-below", 2), ("rollback_below", "2.0", "0..1")),
        ((*EARLY, *RULE, "--max-pending", 0), ("max_pending", "found 0", "1 or more")),
        ((*EARLY, *RULE, "--verify-exits", "exact", "--kv-policy", "pipeline"), ("pipeline does not go with",)),
        ((*EARLY, *RULE, "--prefill-exit", "--kv-policy", "auto"), ("prefill_exit goes with",)),
        ((*EARLY, *RULE, "--upper-provider", "abacus"), ("provider 'abacus'",)),
        ((*EARLY, *RULE, "-k", 2, "--bonus"), ("--draft-tokens, --bonus would have no effect", "does not draft")),
        ((*RULE,), ("--exit-when would have no effect", "--strategy early-exit")),
        (("--verify-exits", "exact"), ("--verify-exits would have no effect", "--strategy early-exit")),
        (("--compare", "--kv-policy", "auto"), ("--kv-policy would have no effect", "--exit-when")),
        (("--compare", "-e", 1, "-e", 3), ("one exit drafts", "1, 3")),
        (("--strategy", "self-speculative", "-e", 1, "-e", 3), ("one exit drafts", "1, 3")),
        ((*EARLY, *RULE, "--no-sweep"), ("--no-sweep would have no effect", "--report")),
        (("--report", "x.html"), ("--report would have no effect", "--exit-when")),
        ((*EARLY, *RULE, "--report", "x.html", "--temperature", 1), ("--report compares greedy", "temperature 1.0")),
        ((*EARLY, *RULE, "--profile", "p.json"), ("--exit-when would have no effect", "profile")),
        ((*EARLY, "--profile", "missing.json"), ("missing.json cannot be read",)),
        (
            (*EARLY, *RULE, "--verify-exits", "rollback", "--temperature", 1),
            ("verify rollback is a rule for greedy decoding",),
        ),
    ],
)
def test_impossible_options_are_refused(
    sound: Path, refused: Refused, options: tuple[object, ...], says: tuple[str, ...]
) -> None:
    refused(["generate", sound, "Hello", *map(str, options)], *says)


def test_a_bundle_without_exits_is_refused(tiny_bundles: TinyBundles, refused: Refused) -> None:
    refused(["generate", tiny_bundles.bundle(BASE), "Hi", *EARLY, *RULE], "this bundle has none", "--exit-layer E")


def test_a_profile_for_other_weights_is_refused(sound: Path, profile: Path, refused: Refused) -> None:
    refused(["generate", sound, "Hi", *EARLY, "--profile", profile], "measured on other weights", "calibrate")


def test_a_report_that_cannot_be_written_is_an_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be written"):
        run(tiny, *EARLY, *RULE, "--no-sweep", "--report", tmp_path / "missing" / "page.html")
