"""EE-LLM's checkpoints: however a model is split over ranks and stages, its bundle computes what it computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import exit_nodes, megatron
from helpers.bad_input import Refused
from helpers.megatron import Layout
from helpers.tiny_models import BASE, SWITCHES, TinyBundles, TinyModel, write_tokenizer
from shortstack.__main__ import run
from shortstack.export.arch import resolve
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.exits import ExitNode
from shortstack.export.twin.folder import load_twin
from shortstack.export.twin.model import Twin
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.spec import ModelSpec

# float32, for logits with a standard deviation of about 2; without a norm they reach 20, and the error grows with them.
MAX_ABS = 1e-4
USUAL_DEVIATION = 2.0
TIED = next(tiny for tiny in SWITCHES if tiny.name == "tied")
BIASED = next(tiny for tiny in SWITCHES if tiny.name == "all-biases-tied")
EIGHT = TinyModel("eight-layers-multi-head", layers=8, kv_heads=4, is_tied=True)

EMBEDDING = (ExitSpec(1, norm="none"), ExitSpec(2, norm="none"))
NORM = (ExitSpec(1, norm="own", head="own"), ExitSpec(3, norm="own", head="own"))
MLP = tuple(replace(e, branch="mlp") for e in NORM)


def nodes_of(spec: ModelSpec, exits: Sequence[ExitSpec]) -> tuple[ExitNode, ...]:
    return tuple(exit_nodes.random_exit(spec, e).eval() for e in exits)


def check(bundle: Path, twin: Twin, nodes: Sequence[ExitNode]) -> None:
    """Check that every head of the bundle gives the twin's logits."""
    tokens = np.random.randint(3, twin.spec.vocab_size, size=(2, 9))
    state = np.zeros((2, 9, twin.spec.hidden_size), np.float32)
    ascending = sorted(nodes, key=lambda node: node.exit_spec.exit_layer)
    assert open_bundle(bundle).manifest.plan.exits == tuple(node.exit_spec for node in ascending)
    found = exit_nodes.run_graphs(bundle, tokens, 9, state)
    wanted = [e.logits for e in exit_nodes.expected_exits(twin, ascending, tokens, state)] if nodes else []
    with torch.no_grad():
        wanted.append(twin(torch.from_numpy(tokens)).numpy())
    for ours, theirs in zip(found, wanted, strict=True):
        scale = max(1.0, float(theirs.std()) / USUAL_DEVIATION)
        np.testing.assert_allclose(ours[names.LOGITS], theirs, atol=MAX_ABS * scale, rtol=0)


@pytest.mark.parametrize("is_pre", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bundle_computes_the_same_however_its_model_is_split(
    tiny_bundles: TinyBundles, tmp_path: Path, ranks: int, stages: int, is_pre: bool
) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(TIED))).eval()
    nodes = nodes_of(twin.spec, EMBEDDING)
    folder = megatron.write(tmp_path / "ee", twin, nodes, Layout(ranks, stages, is_pre))
    export_bundle(ExportSpec(str(folder), tmp_path / "bundle"))
    check(tmp_path / "bundle", twin, nodes)


@pytest.mark.parametrize(
    ("tiny", "exits", "layout"),
    [
        (BASE, NORM, Layout(2, 2)),
        (BASE, NORM, Layout(2, 4, is_pre=True)),
        (BASE, MLP, Layout(2, 2)),
        (BASE, MLP, Layout()),
        (TIED, MLP, Layout(2)),
        (TIED, tuple(replace(e, head="shared") for e in MLP), Layout(1, 2)),
        (TIED, tuple(replace(e, head="shared") for e in NORM), Layout(1, 4, is_pre=True)),
        (BIASED, MLP, Layout(2, 2)),
        (BASE, (), Layout(2, 2)),
        (EIGHT, (ExitSpec(5, norm="own"), ExitSpec(2, norm="own"), ExitSpec(6, norm="own")), Layout(2, 2, is_pre=True)),
        (EIGHT, (ExitSpec(5, norm="own", head="own"), ExitSpec(2, norm="own", head="own")), Layout(4)),
    ],
    ids=lambda value: value.name if isinstance(value, TinyModel) else None,
)
def test_every_kind_of_exit_computes_what_the_twin_computes(
    tiny_bundles: TinyBundles, tmp_path: Path, tiny: TinyModel, exits: Sequence[ExitSpec], layout: Layout
) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(tiny))).eval()
    nodes = nodes_of(twin.spec, exits)
    folder = megatron.write(tmp_path / "ee", twin, nodes, layout)
    assert run(["export", str(folder), str(tmp_path / "bundle")]) == 0
    check(tmp_path / "bundle", twin, nodes)


def test_a_tied_exit_of_an_untied_model_uses_the_embedding_as_its_head(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE))).eval()
    (node,) = nodes_of(twin.spec, [ExitSpec(2, norm="own", head="own")])
    with torch.no_grad():
        node.head.weight.copy_(twin.model.embed_tokens.weight)
    folder = megatron.write(
        tmp_path / "ee",
        twin,
        [node],
        Layout(2),
        edit=lambda model: model["language_model"].pop("exit_output_layer"),
        untie_exit_output_weights=False,
    )
    export_bundle(ExportSpec(str(folder), tmp_path / "bundle"))
    check(tmp_path / "bundle", twin, [node])


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 2), Layout(1, 4)], ids=str)
def test_a_block_is_read_as_a_layer(tiny_bundles: TinyBundles, tmp_path: Path, layout: Layout) -> None:
    for is_pre, tiny in ((False, BASE), (True, BIASED)):
        twin = load_twin(str(tiny_bundles.checkpoint(tiny))).eval()
        head = "shared" if tiny.is_tied else "own"
        nodes = nodes_of(twin.spec, [ExitSpec(e, branch="block", norm="own", head=head) for e in (1, 2)])
        folder = megatron.write(tmp_path / tiny.name, twin, nodes, replace(layout, is_pre=is_pre))
        checkpoint = open_checkpoint(str(folder))
        _, spec = resolve(checkpoint)
        stored = checkpoint.exits(spec)
        assert [exit_.spec for exit_ in stored] == [node.exit_spec for node in nodes]
        for exit_, node in zip(stored, nodes, strict=True):
            tensors = exit_.read()
            expected = {names.exit_weight(exit_.spec.exit_layer, part): v for part, v in node.state_dict().items()}
            assert tensors.keys() == expected.keys()
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(tensor, expected[name].numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_other_types_are_read(tiny_bundles: TinyBundles, tmp_path: Path, dtype: torch.dtype) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE)))
    folder = megatron.write(tmp_path / "ee", twin, layout=Layout(2, 2, dtype=dtype))
    for name, tensor in load_twin(str(folder)).state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name].to(dtype).float())


# The choice of folder and exits


@pytest.fixture
def written(tiny_bundles: TinyBundles, tmp_path: Path) -> Path:
    """A tied model of 4 layers with exits after 1 and 2 layers, stored as 2 and 3 with --pre-exit."""
    twin = load_twin(str(tiny_bundles.checkpoint(TIED)))
    return megatron.write(tmp_path / "ee", twin, nodes_of(twin.spec, EMBEDDING), Layout(1, 2, is_pre=True))


def exits_of(folder: Path, *options: str) -> list[int]:
    out = folder.parent / "out"
    assert run(["export", str(folder), str(out), "--overwrite", *options]) == 0
    return [e.exit_layer for e in open_bundle(out).manifest.plan.exits]


def test_exit_layer_chooses_among_the_exits_of_the_checkpoint(written: Path, refused: Refused) -> None:
    assert exits_of(written) == [1, 2]
    assert exits_of(written, "--exit-layer", "2") == [2]
    refused(["export", written, written.parent / "none", "--exit-layer", "3"], "trained with exits", "found 3", "1, 2")


def test_a_folder_of_exits_replaces_those_in_the_checkpoint(written: Path, tmp_path: Path) -> None:
    exit_nodes.write_random_exits(written, tmp_path / "exits", ExitSpec(3, branch="linear"))
    assert exits_of(written, "--exits", str(tmp_path / "exits")) == [3]
    assert exits_of(written, "--exits", str(tmp_path / "exits"), "--exit-layer", "1") == [1, 3]
    exit_nodes.write_random_exits(written, written, ExitSpec(3))  # next to the checkpoint
    assert exits_of(written) == [1, 2]
    assert exits_of(written, "--exits", str(written)) == [3]


def test_a_draft_vocabulary_trims_the_heads_that_are_the_embedding(written: Path, tmp_path: Path) -> None:
    bundle = export_bundle(ExportSpec(str(written), tmp_path / "out", draft_vocab=40))
    assert [(e.norm, e.draft_vocab) for e in bundle.manifest.plan.exits] == [("none", 40), ("none", 40)]


def test_one_iteration_can_be_named_and_released_models_are_read(written: Path, tmp_path: Path) -> None:
    iteration = written / f"iter_{megatron.ITERATION:07d}"
    assert exits_of(iteration) == [1, 2]  # the tokenizer lies in the folder above
    shutil.copytree(iteration, tmp_path / "alone")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(written / file, tmp_path / "alone")
    assert exits_of(tmp_path / "alone") == [1, 2]
    iteration.rename(written / "release")
    (written / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert exits_of(written) == [1, 2]


@pytest.mark.parametrize(("tokens", "rows"), [(300, 300), (289, 289), (288, 304), (200, 304)])
def test_rows_of_the_vocabulary_are_cut_off_only_if_they_must_be_padding(
    written: Path, tmp_path: Path, tokens: int, rows: int
) -> None:
    write_tokenizer(written, 300)
    data = json.loads((written / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"] = {token: i for token, i in data["model"]["vocab"].items() if i < tokens}
    data["model"]["merges"] = []
    (written / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert resolve(open_checkpoint(str(written)))[1].vocab_size == rows


def test_parity_compares_with_the_model_and_exits_of_the_checkpoint(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(BASE)))
    folder = megatron.write(tmp_path / "ee", twin, nodes_of(twin.spec, MLP), Layout(2, 2))
    export_bundle(ExportSpec(str(folder), tmp_path / "bundle", (3,)))
    command = ["parity", str(folder), str(tmp_path / "bundle"), "--prompts", "2", "--greedy-tokens", "8"]
    assert run(command) == 0
    assert "greedy continuations: identical" in capsys.readouterr().out
    megatron.write(folder, twin, nodes_of(twin.spec, MLP), Layout(2, 2))
    assert run(command) == 1
    assert "head after 3 layers" in capsys.readouterr().err


def test_the_digest_covers_the_files_of_all_ranks(written: Path) -> None:
    first = open_checkpoint(str(written)).digest()
    assert open_checkpoint(str(written)).digest() == first
    twin = load_twin(str(written))
    megatron.write(written, twin, layout=Layout(1, 2))
    assert open_checkpoint(str(written)).digest() != first
