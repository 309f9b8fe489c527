"""Looked-up drafts on real graphs: plain tokens with every cache, in slots, with a kept prefix, and by the commands."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from helpers.looked_up import BUNDLES, bundles, prompts
from helpers.quantized import QuantizedBundles
from helpers.tiny_models import TinyBundles
from shortstack.__main__ import run
from shortstack.runtime import DraftPolicy, FromLookup, Request, SamplingParams, Speculate, TextIndex, load

TOKENS = 60


@pytest.fixture(scope="module")
def paths(tiny_bundles: TinyBundles, quantized: QuantizedBundles) -> dict[str, Path]:
    return bundles(tiny_bundles, quantized)


def lookup(policy: DraftPolicy | None, texts: TextIndex | None = None) -> Speculate:
    return Speculate(draft=policy, source=FromLookup(texts))


@pytest.mark.parametrize("name", BUNDLES)
def test_lookup_gives_the_plain_tokens_with_every_cache(paths: dict[str, Path], name: str) -> None:
    accepted = rejected = 0
    with load(paths[name]) as model:
        for number, prompt in enumerate(prompts(12)):
            plain = model.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens
            # the model's own answer as another text: long drafts, all of them right
            texts = TextIndex([prompt + list(plain)]) if number % 3 == 0 else None
            policy = None if number % 4 == 3 else DraftPolicy(1 + number)
            found = model.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True, strategy=lookup(policy, texts))
            assert found.tokens == plain
            assert found.stats.is_balanced
            if texts is not None and policy is not None:
                assert found.stats.accepted_by["texts"] > 10
            accepted, rejected = accepted + found.stats.accepted, rejected + found.stats.rejected
    assert accepted > 50
    assert rejected > 20


@pytest.mark.parametrize("name", ["float", "int4 with an int8 cache"])
def test_lookup_in_slots_and_with_a_kept_prefix_gives_the_plain_tokens(paths: dict[str, Path], name: str) -> None:
    rng = random.Random(1)
    own, policies = prompts(9), (DraftPolicy(5), DraftPolicy(3, has_bonus=True), None)
    with load(paths[name], slots=3) as model:
        plain = model.generate_batch(own, max_new_tokens=TOKENS, ignore_eos=True)
        longer = [
            [*prompt, *done.tokens[: rng.randint(5, 40)], *prompt] for prompt, done in zip(own, plain, strict=True)
        ]
        wanted = model.generate_batch(longer, max_new_tokens=20, ignore_eos=True)
        texts = TextIndex([done.tokens for done in plain])
        requests = [
            Request(prompt, lookup(policies[i % 3], texts), max_new_tokens=20, ignore_eos=True, reuse_cache=True)
            for i, prompt in enumerate(longer)
        ]
        found = model.generate_batch(requests)
    assert [result.tokens for result in found] == [result.tokens for result in wanted]
    assert sum(result.stats.drafted for result in found) > 30
    assert all(result.stats.is_balanced for result in found)


def test_sampled_lookup_repeats_with_its_seed(paths: dict[str, Path]) -> None:
    with load(paths["float, uncut"]) as model:
        sampling = SamplingParams(temperature=0.9, top_k=5, seed=4)
        both = [
            model.generate(prompts(1)[0], strategy=lookup(None), sampling=sampling, max_new_tokens=40, ignore_eos=True)
            for _ in range(2)
        ]
    assert both[0].tokens == both[1].tokens
    assert both[0].stats.drafted


def generate(bundle: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    assert run(["generate", str(bundle), "one two one two one", "-n", "40", "--json", *options]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_generate_looks_drafts_up_in_the_text_and_in_a_file(
    paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = paths["float, uncut"]
    plain = generate(bundle, capsys)
    drafts = ("--strategy", "self-speculative", "--draft", "lookup", "--fixed-draft")
    assert generate(bundle, capsys, *drafts)["tokens"] == plain["tokens"]
    texts = tmp_path / "answers.jsonl"
    texts.write_text(json.dumps({"text": plain["text"]}) + "\n")
    found = generate(bundle, capsys, *drafts, "--draft-texts", str(texts))
    assert found["tokens"] == plain["tokens"]
    stats = found["stats"]
    assert isinstance(stats, dict)
    assert sum(stats["drafted_by"].values()) == stats["drafted"] > 0
    assert "texts" in stats["drafted_by"]


def test_batch_looks_drafts_up_too(paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts_file = tmp_path / "in.jsonl"
    prompts_file.write_text("".join(json.dumps({"text": f"{i} one two one two"}) + "\n" for i in range(4)))
    answers = []
    for options in ((), ("--strategy", "self-speculative", "--draft", "lookup", "--fixed-draft")):
        out = tmp_path / f"out{len(answers)}.jsonl"
        command = ["batch", str(paths["float, uncut"]), str(prompts_file), "-o", str(out), "-n", "20", "--json"]
        assert run([*command, *options]) == 0
        totals = json.loads(capsys.readouterr().out)
        answers.append({entry["id"]: entry["tokens"] for entry in map(json.loads, out.read_text().splitlines())})
    assert answers[0] == answers[1]
    assert totals["drafted_by"].keys() == {"lookup"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--draft", "lookup"), "plain decoding drafts nothing"),
        (("--strategy", "self-speculative", "--draft", "exit", "--draft-texts", "x"), "nothing is looked up"),
        (("--strategy", "self-speculative", "--draft", "lookup", "--exit-layer", "1"), "no exit drafts"),
        (("--strategy", "self-speculative", "--draft", "drafter"), "has no trained drafter"),
        (("--strategy", "self-speculative", "--draft", "lookup", "--draft-texts", "no/file"), "cannot be read"),
    ],
)
def test_options_of_drafts_that_do_not_go_together_are_refused(
    paths: dict[str, Path], options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", str(paths["float"]), "one", *options]) == 2
    assert message in capsys.readouterr().err
