"""The shipped checkpoints: small, described, exported by their documented command, lossless and worth their drafts."""

from __future__ import annotations

from pathlib import Path

import pytest

from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.runtime import Model, load
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.samples.demo import CHECKPOINTS, SHOWINGS

LARGEST_BYTES = 10_000_000
COMMANDS = (
    "play the newest album by Nina Simone\n",
    "book a table for four at a sushi bar in Oslo\n",
    "will it rain in Lyon tomorrow\n",
    "add this song to my workout playlist\n",
)


def drafted(model: Model, prompts: tuple[str, ...], exit_layer: int, drafts: int) -> float:
    """Return the probability that a draft is accepted; every text must be that of plain decoding."""
    accepted = judged = 0
    for prompt in prompts:
        plain = model.generate(prompt, max_new_tokens=40)
        found = model.generate(
            prompt,
            max_new_tokens=40,
            strategy="self-speculative",
            exit_layer=exit_layer,
            draft=DraftPolicy(drafts),
        )
        assert found.tokens == plain.tokens
        accepted += found.stats.accepted
        judged += found.stats.accepted + found.stats.corrected
    return accepted / judged


@pytest.mark.parametrize("folder", sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir()))
def test_each_checkpoint_is_small_and_has_a_card(folder: str) -> None:
    files = list((CHECKPOINTS / folder).iterdir())
    assert sum(file.stat().st_size for file in files) <= LARGEST_BYTES
    card = (CHECKPOINTS / folder / "README.md").read_text(encoding="utf-8")
    for word in ("data", "tokens", "licence", "shortstack export"):
        assert word in card.lower(), word
    assert f"({folder})" in (CHECKPOINTS / "README.md").read_text(encoding="utf-8")


def test_the_recipe_makes_shallow_drafts_worth_it(tmp_path: Path) -> None:
    alphas = {}
    for name in ("commands-tiny", "commands-tiny-plain"):
        export_bundle(ExportSpec(str(CHECKPOINTS / name), tmp_path / name, (2,)))
        alphas[name] = drafted(load(tmp_path / name), COMMANDS, 2, 3)
    assert alphas["commands-tiny"] > alphas["commands-tiny-plain"] + 0.15, alphas


@pytest.mark.parametrize(("index", "least"), [(0, 0.6), (1, 0.2)])
def test_what_the_demo_shows_is_lossless_and_drafts_well(
    smollm2_gguf: Path, tmp_path: Path, index: int, least: float
) -> None:
    showing = SHOWINGS[index]
    adapter = CHECKPOINTS / showing.adapter if showing.adapter else None
    export_bundle(
        ExportSpec(str(smollm2_gguf), tmp_path / "bundle", exits=CHECKPOINTS / showing.exits, adapter=adapter)
    )
    model = load(tmp_path / "bundle")
    assert drafted(model, showing.prompts, model.exit_layers[0], 3) > least
