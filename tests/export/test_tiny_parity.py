"""Every option of a config in a random tiny model: the bundle computes what transformers computes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from helpers import tolerances
from helpers.tiny_models import BASE, LLAMA3_ROPE, SWITCHES, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.parity.compare import ParityReport, Tolerance, compare
from shortstack.export.parity.reference import Reference
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.contract import GraphContract, Port, PortType, check_ports
from shortstack.runtime import load

GREEDY_TOKENS = 12
DRAFT_VOCAB = 48
EVERYTHING = TinyModel("everything", layers=3, attention_bias=True, mlp_bias=True, head_dim=40, rope=LLAMA3_ROPE)
HALF_PRECISION = ("base", "all-biases-tied", "head-dim-40", "head-dim-64", "odd-sizes", "rope-llama3", "stored-float16")
ROOM = replace(BASE, name="room", hidden=256, intermediate=768, heads=8, kv_heads=4, head_dim=32, layers=8, vocab=2048)
_PORT_TYPES: dict[int, PortType] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
}


def texts(tiny: TinyModel) -> list[list[int]]:
    """Return random token ids: a single one, a few, and a text beyond the rope-llama3 models' original context."""
    return [np.random.randint(3, tiny.vocab, size=length).tolist() for length in (1, 2, 17, 100)]


@pytest.fixture
def check(tiny_bundles: TinyBundles, one_torch_thread: Callable[[], None]) -> Callable[..., ParityReport]:
    def check(tiny: TinyModel, bundle: Path, tolerance: Tolerance) -> ParityReport:
        reference = Reference(str(tiny_bundles.checkpoint(tiny)))
        one_torch_thread()
        report = compare(load(bundle), reference, texts(tiny), greedy_tokens=GREEDY_TOKENS)
        assert report.positions == 120
        assert report.greedy_tokens == 4 * GREEDY_TOKENS
        assert not report.problems()
        for head in report.heads:
            assert head.max_abs <= tolerance.max_abs, head
            assert head.mean_abs <= tolerance.mean_abs, head
        assert len(report.layers) == 2 * tiny.layers + len(report.heads) - 1
        for layer in report.layers:
            assert layer.relative <= tolerance.relative, layer
        assert all(fork.gap < tolerance.tie for fork in report.forks), report.forks
        print(f"{tiny.name}: {max(h.max_abs for h in report.heads):.1e}, forks {report.forks}")
        return report

    return check


@pytest.mark.parametrize("exits", [1, 2])
@pytest.mark.parametrize("tiny", SWITCHES, ids=lambda tiny: tiny.name)
def test_a_bundle_computes_what_transformers_computes(
    tiny_bundles: TinyBundles, check: Callable[..., ParityReport], tiny: TinyModel, exits: int
) -> None:
    depths = (1, tiny.layers - 1)[:exits]
    if len(set(depths)) < exits:
        pytest.skip("two layers have one boundary")
    report = check(tiny, tiny_bundles.bundle(tiny, *depths), tolerances.TINY)
    assert [head.depth for head in report.heads] == [*depths, tiny.layers]


@pytest.mark.parametrize("tiny", [BASE, EVERYTHING], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("depths", [(), (1, 2)])
def test_any_number_of_cuts_computes_the_same(
    tiny_bundles: TinyBundles, check: Callable[..., ParityReport], tiny: TinyModel, depths: tuple[int, ...]
) -> None:
    check(tiny, tiny_bundles.bundle(tiny, *depths), tolerances.TINY)


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_a_float16_bundle_stays_within_half_precision(
    tiny_bundles: TinyBundles, check: Callable[..., ParityReport], name: str
) -> None:
    tiny = next(tiny for tiny in SWITCHES if tiny.name == name)
    bundle = tiny_bundles.bundle(tiny, 1, 3, dtype="float16")
    check(tiny, bundle, tolerances.TINY_FP16)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_trimmed_head_gives_some_columns_of_the_full_one(
    tiny_bundles: TinyBundles, check: Callable[..., ParityReport], is_tied: bool
) -> None:
    tiny = replace(BASE, name=f"trimmed-{is_tied}", is_tied=is_tied)
    bundle = tiny_bundles.bundle(tiny, 1, 3, draft_vocab=DRAFT_VOCAB)
    check(tiny, bundle, tolerances.TINY)
    full = load(tiny_bundles.bundle(tiny, 1, 3))
    trimmed = load(bundle)
    tokens = texts(tiny)[-1]
    for depth in (1, 3):
        ids = np.load(bundle / names.draft_vocab_file(depth), allow_pickle=False)
        assert ids.dtype == np.int64
        assert ids.shape == (DRAFT_VOCAB,)
        assert (np.diff(ids) > 0).all()
        ours, theirs = trimmed.activations(tokens).heads[depth], full.activations(tokens).heads[depth]
        np.testing.assert_allclose(ours, theirs[:, ids], atol=tolerances.TINY.max_abs)


@pytest.mark.parametrize("options", [{}, {"draft_vocab": DRAFT_VOCAB}], ids=["full", "trimmed"])
def test_token_and_confidence_of_every_head_follow_from_its_logits(
    tiny_bundles: TinyBundles, options: dict[str, int]
) -> None:
    bundle = tiny_bundles.bundle(BASE, 1, 3, **options)
    model = load(bundle)
    tokens = np.array([texts(BASE)[-1]])
    rows = tokens.shape[1]
    below = tokens
    for segment, session in zip(model.bundle.manifest.plan.segments, model.graphs.sessions, strict=True):
        first, *_ = model.bundle.manifest.contract(segment).inputs
        feeds = {
            first.name: below,
            names.SEQLENS_K: np.array([rows - 1], np.int32),
            names.TOTAL_SEQUENCE_LENGTH: np.array(rows, np.int32),
            names.NUM_ROWS: np.array(rows),
        }
        for layer in range(segment.start, segment.end):
            for part in names.KV_PARTS:
                feeds[names.past(layer, part)] = np.zeros((1, BASE.kv_heads, rows, BASE.head_dim), np.float32)
        outputs = dict(zip([port.name for port in session.get_outputs()], session.run(None, feeds), strict=True))
        below = outputs.get(names.HIDDEN_STATES_OUT)
        logits = outputs[names.LOGITS].astype(np.float64)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        ids = np.arange(BASE.vocab)
        if options and not segment.is_last:
            ids = np.load(bundle / names.draft_vocab_file(segment.end), allow_pickle=False)
        second, top = np.sort(probs, -1)[..., -2:].transpose(2, 0, 1)
        np.testing.assert_array_equal(outputs[names.TOKEN], ids[logits.argmax(-1)])
        for name, expected in (
            (names.TOP_PROB, top),
            (names.MARGIN, top - second),
            (names.ENTROPY, -(probs * np.log(probs)).sum(-1)),
        ):
            np.testing.assert_allclose(outputs[name], expected, atol=tolerances.HEAD_OUTPUTS_FP32, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("depths", [(), (1,), (1, 2)])
@pytest.mark.parametrize("tiny", [BASE, EVERYTHING], ids=lambda tiny: tiny.name)
def test_every_graph_is_valid_onnx_with_the_ports_of_its_contract(
    tiny_bundles: TinyBundles, tiny: TinyModel, depths: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(tiny_bundles.bundle(tiny, *depths, dtype=dtype), verify_hashes=True)
    monkeypatch.chdir(bundle.folder)  # the folder in which the checker looks for weights.data
    for segment in bundle.manifest.plan.segments:
        path = bundle.graph_path(segment)
        graph = onnx.load(path, load_external_data=False)
        found = GraphContract(_ports(graph.graph.input), _ports(graph.graph.output))
        check_ports(str(path), found, bundle.manifest.contract(segment))
        # onnxruntime has this operator in ONNX's own domain, but onnx does not know it.
        for node in graph.graph.node:
            if node.op_type == "SimplifiedLayerNormalization":
                node.domain = "com.microsoft"
        onnx.checker.check_model(graph)
        assert all(node.name for node in graph.graph.node)


def _ports(values: Iterator[onnx.ValueInfoProto]) -> tuple[Port, ...]:
    return tuple(
        Port(
            value.name,
            _PORT_TYPES[value.type.tensor_type.elem_type],
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


@dataclass(frozen=True)
class Stored:
    offset: int
    length: int


def stored_tensors(bundle: Path) -> dict[str, Stored]:
    """Return where each tensor lies in weights.data, from all graphs, which agree on every name."""
    found: dict[str, Stored] = {}
    for path in sorted(bundle.glob("*.onnx")):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == names.WEIGHTS_FILE
            stored = Stored(int(entries["offset"]), int(entries["length"]))
            assert found.setdefault(tensor.name, stored) == stored
    return found


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"draft_vocab": DRAFT_VOCAB}], ids=["full", "trimmed"])
@pytest.mark.parametrize("depths", [(1,), (1, 2, 3)])
def test_every_weight_is_stored_once(
    tiny_bundles: TinyBundles, depths: tuple[int, ...], options: dict[str, int], is_tied: bool
) -> None:
    bundle = tiny_bundles.bundle(replace(BASE, name=f"stored-{is_tied}", is_tied=is_tied), *depths, **options)
    data = (bundle / names.WEIGHTS_FILE).read_bytes()
    places = sorted(set(stored_tensors(bundle).values()), key=lambda stored: stored.offset)
    end = 0
    for place in places:
        assert 0 <= place.offset - end < 64, "a gap, or an overlap"
        assert not any(data[end : place.offset])
        end = place.offset + place.length
    assert end == len(data)
    contents = [data[place.offset : place.offset + place.length] for place in places]
    assert len(set(contents)) == len(contents)
    embedding_bytes = BASE.vocab * BASE.hidden * 4
    assert sum(len(content) == embedding_bytes for content in contents) == (1 if is_tied else 2)


def test_four_segments_are_no_larger_than_one_graph(tiny_bundles: TinyBundles) -> None:
    def size_bytes(bundle: Path) -> int:
        return sum(file.stat().st_size for file in bundle.iterdir())

    whole, cut = tiny_bundles.bundle(ROOM), tiny_bundles.bundle(ROOM, 2, 4, 6)
    assert (whole / names.WEIGHTS_FILE).read_bytes() == (cut / names.WEIGHTS_FILE).read_bytes()
    assert size_bytes(cut) <= 1.02 * size_bytes(whole)


def break_weight(source: Path, out: Path, name: str, at: int = -1) -> Path:
    """Copy a bundle and change one value of one tensor; all sizes stay the same."""
    shutil.copytree(source, out)
    place = stored_tensors(out)[name]
    with (out / names.WEIGHTS_FILE).open("r+b") as file:
        file.seek(place.offset)
        values = np.frombuffer(file.read(place.length), np.float32).copy()
        values[at] += 1.0
        file.seek(place.offset)
        file.write(values.tobytes())
    return out


BROKEN = [
    *((names.layer_weight(j, "attn.qkv_proj.weight"), rf"1e-03 is layer {j} (key|value)") for j in range(4)),
    (names.layer_weight(1, "attn.o_proj.weight"), "1e-03 is hidden after 2 layers"),
    (names.layer_weight(0, "mlp.down_proj.weight"), r"1e-03 is layer 1 (key|value)"),
    (names.layer_weight(2, "input_norm.weight"), r"1e-03 is layer 2 (key|value)"),
    (names.FINAL_NORM, "up to the LM head"),
    (names.LM_HEAD, "up to the LM head"),
    (names.rope_table(0, "cos"), "1e-03 is layer 0 key"),
]


@pytest.mark.parametrize(("weight", "says"), BROKEN)
def test_one_broken_value_is_found_and_its_layer_is_named(
    tiny_bundles: TinyBundles, one_torch_thread: Callable[[], None], tmp_path: Path, weight: str, says: str
) -> None:
    at = (
        BASE.head_dim // 2 if weight == names.rope_table(0, "cos") else -1
    )  # position 1, since no text reaches the last position
    bundle = break_weight(tiny_bundles.bundle(BASE, 2), tmp_path / "broken", weight, at)
    reference = Reference(str(tiny_bundles.checkpoint(BASE)))
    one_torch_thread()
    problems = compare(load(bundle), reference, texts(BASE), greedy_tokens=0).problems()
    assert problems
    assert re.search(says, "; ".join(problems)), problems


def test_the_parity_command_accepts_a_sound_bundle_and_rejects_a_broken_one(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, sound = str(tiny_bundles.checkpoint(BASE)), tiny_bundles.bundle(BASE, 2)
    few = ("--prompts", "2", "--greedy-tokens", "4")
    assert run(["parity", checkpoint, str(sound), *few]) == 0
    assert "greedy continuations: identical" in capsys.readouterr().out
    broken = break_weight(sound, tmp_path / "broken", names.layer_weight(3, "attn.qkv_proj.weight"))
    assert run(["parity", checkpoint, str(broken), *few]) == 1
    error = capsys.readouterr().err
    assert "head after 4 layers" in error
    assert "layer 3" in error
    assert "head after 2 layers" not in error
