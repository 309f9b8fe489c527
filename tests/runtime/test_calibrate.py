"""`shortstack calibrate` on a tiny model: the command, its profile, and its guarantee over two hundred draws."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from helpers.bad_input import Refused, edit_json, left_behind
from helpers.progress_lines import without_progress
from helpers.quantized import QuantizedBundles, preset
from helpers.tiny_models import BASE, SPECULATOR, TinyBundles
from shortstack.__main__ import run
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import RequestError
from shortstack.graphs.precision import BlockFormat
from shortstack.runtime import ExitPolicy, Model, load, parse_criterion
from shortstack.runtime.calibration.calibrate import CalibrationSpec
from shortstack.runtime.calibration.calibrate import calibrate as run_calibration
from shortstack.runtime.calibration.dissimilarity import Answer, Loss, dissimilarity
from shortstack.runtime.calibration.learn_then_test import Test, fixed_sequence, p_value
from shortstack.runtime.calibration.profile import PROFILE_FILE, load_profile
from shortstack.runtime.calibration.prompts import read_prompts

EXITS = (1, 3, 4)
PROMPTS = 40
# At these settings, any 29 prompts without a loss pass the test.
QUICK = ["--loss", "any", "--test", "binomial", "--delta", "0.1", "-n", "6"]

Calibrate = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def exported(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.bundle(SPECULATOR, *EXITS)


@pytest.fixture(scope="module")
def speculator(exported: Path) -> Model:
    return load(exported)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A bundle to put a profile into."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl"
    rng = np.random.default_rng(1)
    lines = [{"text": "".join(map(chr, rng.integers(97, 123, rng.integers(2, 9))))} for _ in range(PROMPTS)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def calibrated(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Calibrate:
    """Run the command with ``--json``; return its exit code and the JSON that it printed."""

    def calibrated(*options: str) -> tuple[int, dict[str, Any]]:
        code = run(["calibrate", str(folder), "--data", str(data), "--json", *QUICK, *options])
        out, error = capsys.readouterr()
        assert without_progress(error) == ""
        return code, json.loads(out)

    return calibrated


# The command


def test_the_search_ends_at_the_first_failing_threshold_and_its_profile_decodes(
    calibrated: Calibrate, folder: Path, speculator: Model
) -> None:
    code, printed = calibrated()
    assert code == 0
    assert json.loads((folder / PROFILE_FILE).read_text(encoding="utf-8")) == printed
    assert [point["is_accepted"] for point in printed["curve"]] == [True] * (len(printed["curve"]) - 1) + [False]
    assert len(printed["curve"]) < len(printed["grid"])
    assert printed["threshold"] == printed["curve"][-2]["threshold"]
    profile = load_profile(folder / PROFILE_FILE, open_bundle(folder))
    assert profile.to_json() == printed
    assert (profile.name, profile.prompts, profile.exit_layers) == ("words", PROMPTS, EXITS)
    assert 0 < profile.exited_share < 1
    assert profile.predicted_saving == pytest.approx(1 - profile.mean_exit_layer / SPECULATOR.layers)
    result = speculator.generate([5, 6, 7], max_new_tokens=40, strategy="early-exit", exits=profile.policy())
    assert result.stats.exited


def test_a_sweep_measures_all_thresholds_and_chooses_the_same(calibrated: Calibrate) -> None:
    _, walked = calibrated()
    code, swept = calibrated("--sweep")
    assert code == 0
    assert swept["threshold"] == walked["threshold"]
    assert [point["threshold"] for point in swept["curve"]] == swept["grid"]
    shares = [point["exited_share"] for point in swept["curve"]]
    assert shares == sorted(shares)
    for before, now in zip(walked["curve"], swept["curve"], strict=False):
        assert {**before, "tokens_per_s": 0} == {**now, "tokens_per_s": 0}


def test_several_prompts_at_once_give_the_losses_of_one_after_the_other(
    exported: Path, quantized: QuantizedBundles
) -> None:
    bundle = open_bundle(quantized(exported, preset(BlockFormat(8), "int8")))
    spec = CalibrationSpec(delta=0.9, epsilon=0.5, grid=(0.9, 0.3, 0.05), max_new_tokens=12, is_sweep=True)
    prompts = [[number, 7, 9 + number] for number in range(3, 12)]
    with Model(bundle) as one, Model(bundle, slots=4) as several:
        alone, together = (run_calibration(model, prompts, spec) for model in (one, several))
    assert together.losses == alone.losses
    assert together.accepted == alone.accepted
    assert [point.mean_exit_layer for point in together.points] == [point.mean_exit_layer for point in alone.points]
    assert max(map(max, alone.losses)) > 0


def test_other_criteria_and_exits_are_calibrated(calibrated: Calibrate, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "entropy.json"
    code, printed = calibrated(
        "--criterion", "entropy <= {} and patience >= 2", "--grid", "2, 0.5 0.1", "-e", "4", "-e", "1",
        "--limit", "30", "--name", "two exits", "--out", str(out),
    )  # fmt: skip
    assert code == 0
    assert printed["grid"] == [0.1, 0.5, 2.0]
    assert (printed["exit_layers"], printed["prompts"], printed["name"]) == ([1, 4], 30, "two exits")
    assert load_profile(out, open_bundle(folder)).to_json() == printed
    assert not (folder / PROFILE_FILE).exists()


def test_if_no_threshold_passes_the_profile_runs_the_whole_model(
    calibrated: Calibrate, folder: Path, speculator: Model
) -> None:
    code, printed = calibrated("--grid", "0")
    assert code == 1
    assert (printed["threshold"], printed["criterion"]) == (None, "never")
    assert (printed["mean_exit_layer"], printed["predicted_saving"]) == (SPECULATOR.layers, 0)
    policy = load_profile(folder / PROFILE_FILE, open_bundle(folder)).policy()
    prompt = [5, 6, 7]
    early = speculator.generate(prompt, max_new_tokens=20, strategy="early-exit", exits=policy)
    assert early.tokens == speculator.generate(prompt, max_new_tokens=20).tokens


def test_the_table_shows_the_result(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["calibrate", str(folder), "--data", str(data), *QUICK]
    assert run([*arguments, "--grid", "0.9 0"]) == 0
    out = capsys.readouterr().out
    assert "40 prompts, loss any, test binomial: mean loss <= 0.1 wanted" in out
    assert "top_prob >= 0.9: with probability 0.95 the mean loss is at most 0.1" in out
    assert out.count("not accepted") == 1
    assert run([*arguments, "--grid", "0"]) == 1
    table = capsys.readouterr().out
    assert "no threshold passes: full model" in table
    head, plain, *_ = [line.split() for line in table.splitlines()[1:]]
    assert head[0] == "threshold"
    assert plain[:3] == ["plain", "0.0000", "-"], "what thresholds are compared with"
    assert float(plain[3]) == SPECULATOR.layers
    assert plain[4] == "0.0%"
    assert float(plain[5]) > 0


def test_prompts_are_read_as_generate_reads_them(speculator: Model, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    question = [{"role": "user", "content": "Why?"}]
    lines: list[dict[str, Any]] = [
        {"prompt": "Why?", "kind": "chat"},
        {"text": "Why?"},
        {"messages": [*question, {"role": "assistant", "content": "So."}]},
        {"text": "x" * 5000},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    prompts = read_prompts(path, speculator.tokenizer, speculator.cache.max_length)
    asked, text = tuple(speculator.encode(question)), tuple(speculator.encode("Why?"))
    assert prompts.ids == (asked, text, asked)
    assert prompts.too_long == 1
    some = read_prompts(path, speculator.tokenizer, speculator.cache.max_length, 2)
    assert len(some.ids) == 2
    assert some == read_prompts(path, speculator.tokenizer, speculator.cache.max_length, 2)


# What is refused


def test_too_few_prompts_are_refused_before_any_work_unless_it_is_a_sweep(
    refused: Refused, folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[str | Path] = ["calibrate", folder, "--data", data]
    refused(arguments, "found 40", "expected 150 or more", "hoeffding-bentkus, which needs 29")
    assert not (folder / PROFILE_FILE).exists()
    assert run([str(a) for a in arguments] + ["--sweep", "-n", "4", "--grid", "1 0.5"]) == 1
    assert "expected 150 or more" in capsys.readouterr().err
    assert (folder / PROFILE_FILE).exists()


BAD_OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "delta": (["--delta", "0"], ("delta", "between 0 and 1")),
    "criterion": (["--criterion", "top_prob >= 0.9"], ("{} in place of the threshold",)),
    "grid": (["--grid", "high low"], ("--grid", "Such as --grid '0.99")),
    "grid of infinities": (["--grid", "inf"], ("--grid",)),
    "grid out of range": (["--grid", "-1"], ("threshold of top_prob",)),
    "exit": (["--exit-layer", "2"], ("unknown exit 2", "--exit-layer 2")),
    "patience": (["--criterion", "patience >= {}", "--grid", "1.5"], ("a whole number",)),
    "more patience than exits": (["--criterion", "patience >= {}", "--grid", "4"], ("needs at least 4 exits",)),
    "gate": (["--criterion", "gate >= {}"], ("needs a gate",)),
    "loss of the test": (["--loss", "text"], ("binomial does not go with loss text",)),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_are_not_valid_are_refused(refused: Refused, folder: Path, data: Path, case: str) -> None:
    options, says = BAD_OPTIONS[case]
    refused(["calibrate", folder, "--data", data, *QUICK, *options], *says)
    assert not (folder / PROFILE_FILE).exists()


LINES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has no prompt that fits"),
    "binary": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "no JSON": (b'{"text": "fine"}\nfine\n', "line 2 is not valid JSON"),
    "deep JSON": (b"[" * 100_000, "line 1 is nested too deeply"),
    "a list": (b"[]\n", "line 1: found '[]'"),
    "no field": (b'{"question": "Why?"}', "line 1"),
    "an answer only": (b'{"messages": [{"role": "assistant", "content": "So."}]}', "line 1"),
    "a message without a role": (b'{"messages": [{"content": "Why?"}]}', "line 1"),
    "half a character": (b'{"text": "\\ud800"}', "line 1 holds half of a character"),
}


@pytest.mark.parametrize("case", LINES)
def test_files_without_valid_prompts_are_refused(refused: Refused, folder: Path, data: Path, case: str) -> None:
    content, says = LINES[case]
    data.write_bytes(content)
    refused(["calibrate", folder, "--data", data, *QUICK], f"--data {data}", says)


def test_a_file_that_is_not_a_profile_is_not_replaced(
    refused: Refused, folder: Path, data: Path, tmp_path: Path
) -> None:
    before = data.read_bytes()
    refused(["calibrate", folder, "--data", data, *QUICK, "-o", data], "exists and is not an exit profile")
    assert data.read_bytes() == before
    refused(["calibrate", folder, "--data", data, *QUICK, "-o", tmp_path / "none" / "p.json"], "is not a folder")
    refused(["calibrate", folder, "--data", data, *QUICK, "-o", tmp_path], "is a folder. Name a file in it")
    assert left_behind(tmp_path) == ["bundle", data.name]


def test_a_profile_for_other_weights_is_refused(calibrated: Calibrate, folder: Path, tiny_bundles: TinyBundles) -> None:
    calibrated("--grid", "0.9")
    other = open_bundle(tiny_bundles.bundle(BASE, 1))
    with pytest.raises(RequestError) as caught:
        load_profile(folder / PROFILE_FILE, other)
    here = open_bundle(folder).manifest.weights_sha256
    expected = (PROFILE_FILE, f"found {here}", f"expected {other.manifest.weights_sha256}", "Calibrate again on this")
    assert all(part in str(caught.value) for part in expected)


def test_a_profile_for_exits_that_the_bundle_lacks_is_refused(calibrated: Calibrate, folder: Path) -> None:
    calibrated("--grid", "0.9")
    edit_json(folder / PROFILE_FILE, exit_layers=[1, 2])
    with pytest.raises(RequestError, match=rf"{PROFILE_FILE} does not fit .*unknown exit 2"):
        load_profile(folder / PROFILE_FILE, open_bundle(folder))


# The guarantee

GRID = (0.9, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2)
DRAWN = 200
EPSILON = 0.05
CASES: list[tuple[Loss, Test]] = [("text", "hoeffding"), ("text", "hoeffding-bentkus"), ("any", "binomial")]


@dataclass(frozen=True)
class Population:
    """All possible prompts: the loss of each at each threshold [thresholds, prompts], and how much leaves early."""

    losses: dict[Loss, npt.NDArray[np.float64]]
    exited_shares: list[float]

    def drawn(self, loss: Loss, draws: int) -> Iterator[npt.NDArray[np.float64]]:
        """Yield the losses [thresholds, drawn] of prompts drawn from the population."""
        rng = np.random.default_rng(13)
        for _ in range(draws):
            yield self.losses[loss][:, rng.integers(0, self.losses[loss].shape[1], DRAWN)]

    def mean_loss(self, loss: Loss, accepted: int) -> float:
        """Return the true mean loss of the last accepted threshold, 0 if none was accepted."""
        return float(self.losses[loss][accepted - 1].mean()) if accepted else 0.0


@pytest.fixture(scope="module")
def population(speculator: Model) -> Population:
    rng = np.random.default_rng(11)
    prompts = [rng.integers(3, SPECULATOR.vocab, rng.integers(1, 9)).tolist() for _ in range(300)]
    full = [speculator.generate(prompt, max_new_tokens=6) for prompt in prompts]
    losses: dict[Loss, list[list[float]]] = {"text": [], "any": []}
    shares = []
    for threshold in GRID:
        policy = ExitPolicy(parse_criterion(f"top_prob >= {threshold}"))
        early = [speculator.generate(p, max_new_tokens=6, strategy="early-exit", exits=policy) for p in prompts]
        pairs = [(Answer(e.tokens, e.text), Answer(f.tokens, f.text)) for e, f in zip(early, full, strict=True)]
        for loss, rows in losses.items():
            rows.append([dissimilarity(loss, *pair) for pair in pairs])
        shares.append(sum(e.stats.exited for e in early) / sum(e.stats.emitted for e in early))
    return Population({loss: np.array(rows) for loss, rows in losses.items()}, shares)


def accepted(losses: npt.NDArray[np.float64], test: Test, delta: float) -> int:
    return fixed_sequence((p_value(test, row, delta) for row in losses.tolist()), EPSILON)


@pytest.mark.parametrize(("loss", "test"), CASES)
def test_the_bound_holds_in_95_of_100_calibrations_and_most_let_tokens_exit_early(
    population: Population, loss: Loss, test: Test
) -> None:
    delta = 0.1
    assert population.mean_loss(loss, len(GRID)) > 1.5 * delta, "some thresholds must be wrong"
    chosen = [accepted(losses, test, delta) for losses in population.drawn(loss, 200)]
    assert sum(population.mean_loss(loss, count) > delta for count in chosen) <= EPSILON * len(chosen)
    shares = [population.exited_shares[count - 1] if count else 0.0 for count in chosen]
    assert np.median(shares) > 0.1
    assert sum(share > 0.05 for share in shares) > 0.9 * len(shares)


@pytest.mark.parametrize(("loss", "test"), CASES)
def test_the_bound_holds_if_a_threshold_loses_slightly_more_than_delta(
    population: Population, loss: Loss, test: Test
) -> None:
    """This is the hardest case: a choice by the measured mean alone is wrong in about half of the draws."""
    draws, means = 1000, population.losses[loss].mean(axis=1)
    tempting = int(np.argmax(means > 0.06))
    delta = float(means[tempting]) - 1e-6
    wrong = naive = 0
    for losses in population.drawn(loss, draws):
        wrong += population.mean_loss(loss, accepted(losses, test, delta)) > delta
        naive += losses[tempting].mean() <= delta
    assert wrong / draws <= EPSILON + 3 * math.sqrt(EPSILON * (1 - EPSILON) / draws)
    assert naive / draws > 0.3
