"""Adaptive self-speculation on real graphs: lookup, exits and a trained drafter take turns and change no token."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.looked_up import BUNDLES, bundles, prompts
from helpers.quantized import QuantizedBundles
from helpers.tiny_models import TinyBundles
from shortstack.__main__ import run
from shortstack.runtime import DraftPolicy, Request, SamplingParams, Speculate, TextIndex, load
from shortstack.runtime.decode.hybrid import FromHybrid, HybridDrafter, Plan

KINDS = BUNDLES[:-1]  # one uncut bundle is enough: lookup drafts alone there
TOKENS = 60


@pytest.fixture(scope="module")
def paths(tiny_bundles: TinyBundles, quantized: QuantizedBundles) -> dict[str, Path]:
    return bundles(tiny_bundles, quantized)


@dataclass
class AnyPlans:
    """Chooses what a round does at random among what is possible there, whatever it costs."""

    rng: random.Random

    def __call__(self, drafter: HybridDrafter, max_rows: int) -> Plan:
        rng, looked_up = self.rng, min(len(drafter._expected), max_rows - 1)
        plans = [Plan("plain")]
        if looked_up > 0:
            plans += [Plan("lookup", looked_up=rng.randint(1, looked_up))] * 3
        if drafter._own is not None and max_rows > 1:
            most = min(max_rows - drafter._own_bonus, 4)
            plans += [Plan("own", own=rng.randint(1, most))] * 2 + [Plan("probe", own=1)]
        if looked_up > 0 and drafter._may_continue:
            before = rng.randint(1, looked_up)
            plans += [Plan("both", looked_up=before, own=rng.randint(1, max_rows - before))] * 3
        return rng.choice(plans)


@pytest.fixture
def any_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = AnyPlans(random.Random(5))
    monkeypatch.setattr(HybridDrafter, "_planned", lambda self, max_rows: plans(self, max_rows))


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_rounds_of_any_kind_in_any_order_give_the_plain_tokens(
    paths: dict[str, Path], name: str, slots: int, any_plans: None
) -> None:
    own = prompts(9)
    with load(paths[name], slots=slots) as model:
        plain = model.generate_batch(own, max_new_tokens=TOKENS, ignore_eos=True)
        texts = TextIndex([[*prompt, *done.tokens] for prompt, done in zip(own[:4], plain, strict=False)])
        found = model.generate_batch(
            [
                Request(
                    prompt,
                    Speculate(source=FromHybrid(model.exit_layers[i % 2] if model.exit_layers else None, texts)),
                    max_new_tokens=TOKENS,
                    ignore_eos=True,
                )
                for i, prompt in enumerate(own)
            ]
        )
    assert [result.tokens for result in found] == [result.tokens for result in plain]
    assert all(result.stats.is_balanced for result in found)
    drafted = {source for result in found for source in result.stats.drafted_by}
    assert drafted == ({"exit", "lookup", "texts"} if "uncut" not in name else {"lookup", "texts"})
    assert sum(result.stats.rejected for result in found) > 30


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_what_pays_is_chosen_and_gives_the_plain_tokens(paths: dict[str, Path], name: str, slots: int) -> None:
    own = prompts(9)
    with load(paths[name], slots=slots) as model:
        plain = model.generate_batch(own, max_new_tokens=TOKENS, ignore_eos=True)
        found = model.generate_batch(own, max_new_tokens=TOKENS, ignore_eos=True, strategy="self-speculative")
    assert [result.tokens for result in found] == [result.tokens for result in plain]
    assert all(result.stats.is_balanced for result in found)


def test_a_seed_or_a_fixed_length_lets_the_exit_draft_alone(paths: dict[str, Path]) -> None:
    with load(paths["float"]) as model:
        for options in ({"draft": DraftPolicy(3)}, {"sampling": SamplingParams(temperature=0.9, seed=1)}):
            found = model.generate(
                prompts(1)[0],
                strategy="self-speculative",
                max_new_tokens=30,
                ignore_eos=True,
                **options,  # type: ignore[arg-type]
            )
            assert found.stats.drafted_by.keys() == {"exit"}
    with load(paths["float, uncut"]) as model:
        all_found = model.generate_batch(prompts(9), draft=DraftPolicy(3), max_new_tokens=30, ignore_eos=True)
        assert {source for each in all_found for source in each.stats.drafted_by} == {"lookup"}


def test_compare_says_what_was_accepted_of_each_source(
    paths: dict[str, Path], any_plans: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(paths["float"]), "one two one two one", "-n", "60"]
    assert run([*command, "--json"]) == 0
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps(json.loads(capsys.readouterr().out)["text"]))
    command += ["--compare", "--draft-texts", str(texts)]
    assert run(command) == 0
    assert "accepted by source" in capsys.readouterr().out
    assert run([*command, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)[1]["stats"]
    assert {"exit", "texts"} <= stats["drafted_by"].keys()
    assert sum(stats["drafted_by"].values()) == stats["drafted"]
    assert sum(stats["accepted_by"].values()) == stats["accepted"]
