"""The greedy texts of a report run through several slots, and the report says what it says with one slot."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.kv_bundles import KVBundles
from helpers.quantized import INT4_OFFSETS, INT8, QuantizedBundles, preset
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.graphs.bundle import open_bundle, write_manifest
from shortstack.graphs.names import packed_file
from shortstack.graphs.precision import BlockFormat
from shortstack.quant import quality_measure, quality_texts
from shortstack.quant.preset import Preset
from shortstack.quant.quality import Quality
from shortstack.quant.quality_report import measure_report
from shortstack.quant.quality_texts import Continued, continue_prompts, forks, report_slots
from shortstack.quant.spec import ReportSpec
from shortstack.runtime.batch.usual_slots import USUAL_SLOTS

PRESETS = {
    "int4 with an int8 cache": preset(INT4_OFFSETS, "int8"),
    "int8": preset(INT8),
    "an int8 cache": preset(None, "int8"),
}


@pytest.fixture(scope="module")
def source(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.bundle(SPECULATOR, 1, 3)


@pytest.mark.parametrize("mix", PRESETS.values(), ids=PRESETS)
def test_a_report_with_several_slots_says_what_one_with_one_slot_does(
    source: Path, quantized: QuantizedBundles, monkeypatch: pytest.MonkeyPatch, mix: Preset
) -> None:
    monkeypatch.setattr(quality_measure, "_peak_rss_bytes", lambda bundle: 1)  # takes a process each
    ran: list[int] = []

    def watched(bundle: Any, prompts: Any, count: int, slots: int, advance: Any) -> Continued:
        ran.append(slots)
        return continue_prompts(bundle, prompts, count, slots, advance)

    def report(slots: int) -> Quality:
        with monkeypatch.context() as patched:
            patched.setattr(quality_measure, "continue_prompts", watched)
            if slots == 1:
                patched.setattr(quality_measure, "report_slots", lambda bundles: 1)
            small = quantized(source, mix)
            return measure_report(ReportSpec(source, small, heldout_tokens=64, prompts=9, continuation_tokens=12))

    alone, together = report(1), report(USUAL_SLOTS)
    assert ran == [1, 1, USUAL_SLOTS, USUAL_SLOTS]
    assert together == alone
    assert together.is_exact
    assert min(together.divergence) < together.continuation_tokens
    assert all(0 < share < 1 for side in (together.source, together.result) for share in side.acceptance.values())


def test_a_text_that_drafts_change_is_found(
    source: Path, quantized: QuantizedBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(quantized(source, PRESETS["int8"]))

    class Lossy(quality_texts.Model):
        def stream_batch(self, *arguments: Any, **options: Any) -> Any:
            for number, result in super().stream_batch(*arguments, **options):
                yield number, replace(result, tokens=result.tokens[:-1]) if number == wrong else result

    prompts = ((5, 6, 7), (8, 9))
    wrong = len(prompts) * 3 - 1  # the last prompt, with drafts of the last exit
    assert continue_prompts(bundle, prompts, 6, 2, lambda _: None).is_exact
    monkeypatch.setattr(quality_texts, "Model", Lossy)
    assert not continue_prompts(bundle, prompts, 6, 2, lambda _: None).is_exact


def test_progress_counts_every_text(source: Path) -> None:
    bundle, advanced = open_bundle(source), list[float]()
    continue_prompts(bundle, ((5, 6), (7,), (8,)), 4, 2, advanced.append)
    assert sum(advanced) == 3 * quality_texts.texts_per_prompt(bundle) == 9


def test_texts_fork_where_they_first_differ() -> None:
    one = Continued(((1, 2, 3), (4, 5, 6), (7, 8, 9)), {}, is_exact=True)
    other = Continued(((1, 2, 3), (4, 0, 6), (0, 8, 9)), {}, is_exact=True)
    assert forks(one, other) == (3, 1, 0)


def test_texts_run_one_by_one_where_a_row_may_depend_on_others(source: Path, quantized: QuantizedBundles) -> None:
    floats, small = open_bundle(source), open_bundle(quantized(source, PRESETS["int8"]))
    assert report_slots((floats, small)) == USUAL_SLOTS
    for mix, options in ((preset(BlockFormat(8, 64)), {}), (preset(None), {"dtype": "float16"})):
        other = open_bundle(quantized(source, mix, **options))
        assert report_slots((floats, other)) == 1


def test_texts_run_one_by_one_where_one_of_the_bundles_has_no_graphs_for_several(
    source: Path, quantized: QuantizedBundles, kv_bundles: KVBundles, tmp_path: Path
) -> None:
    small = open_bundle(quantized(source, PRESETS["int8"]))
    old = open_bundle(shutil.copytree(source, tmp_path / "old"))
    for segment in old.manifest.plan.segments:
        name = packed_file(segment.start, segment.end)
        (old.folder / name).unlink()
        del old.manifest.files[name]
    write_manifest(old.folder, old.manifest)
    for one in (open_bundle(old.folder), open_bundle(kv_bundles.bundle((0, 2, 2, 3), 3))):
        assert report_slots((one, small)) == report_slots((small, one)) == 1
