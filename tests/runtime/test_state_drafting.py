"""Exits that see a token or a state, on real graphs: the output is the same, and drafts equal a slow reference's.

The reference keeps no cache and no state. Before each draft it runs the whole PyTorch twin on the whole text and takes
the states from that run. So every state that the loop passes from run to run must follow from the text.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.quantized import INT4, INT8, QuantizedBundles, preset
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.export.twin.exits import ExitNode, save_exits
from shortstack.export.twin.folder import load_twin
from shortstack.export.twin.layer import unit_rms
from shortstack.export.twin.model import Boundary, Twin
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.precision import BlockFormat, KVType
from shortstack.graphs.spec import ModelSpec
from shortstack.runtime import DraftPolicy, ExitPolicy, Model, Result, SamplingParams, load, parse_criterion
from shortstack.runtime.early_exit.pending import PendingCap
from shortstack.runtime.engine.stack import PREFILL_ROWS, Stack

PROMPTS = 5
TOKENS = 40
SLOW_TOKENS = 24  # new tokens of the reference, which runs the whole text for each
POLICIES = [DraftPolicy(k, has_bonus=bonus) for k, bonus in product((1, 2, 3, 4), (False, True))]
# Often accepts and often rejects, which every grid below relies on.
ACCEPTANCE = (0.1, 0.9)
MIXED_IN = 0.3  # how much of what it sees a random exit mixes into the residual stream

# The exits of each bundle, by what is special about it. The exit that drafts is tried in every combination.
EXITS = {
    "state": [ExitSpec(3, branch="linear", sees_state=True)],
    "token-and-state": [ExitSpec(3, branch="linear", sees_token=True, sees_state=True)],
    "trimmed-mlp": [ExitSpec(3, draft_vocab=200, branch="linear", linear_mlp=24, sees_token=True, sees_state=True)],
    "second-of-three": [
        ExitSpec(1, branch="linear", sees_state=True),
        ExitSpec(3, branch="linear", sees_token=True, sees_state=True, has_gate=True),
        ExitSpec(4, branch="linear", sees_token=True),
    ],
}


@dataclass(frozen=True)
class Counts:
    """The tokens and draft counts of one generation."""

    tokens: tuple[int, ...]
    drafted: int
    accepted: int


@dataclass(frozen=True)
class SlowSpeculation:
    """Self-speculation that keeps nothing from run to run.

    Attributes:
        twin: The model.
        node: The exit that drafts.
        forgets: The exit always sees the state of the first token, to show how much the right state matters.
    """

    twin: Twin
    node: ExitNode
    forgets: bool = False

    def decode(self, prompt: Sequence[int], policy: DraftPolicy, count: int) -> Counts:
        text = [*prompt, self.wanted(prompt)[-1]]
        drafted = accepted = 0
        while left := len(prompt) + count - len(text):
            drafts = self.drafts(text, min(policy.max_draft_tokens, left))
            rows = min(len(drafts) + policy.has_bonus, left)
            wanted = self.wanted([*text, *drafts])[len(text) - 1 :]
            kept = next((i for i, draft in enumerate(drafts) if draft != wanted[i]), len(drafts))
            text += wanted[: min(kept + 1, rows)]
            drafted += len(drafts)
            accepted += kept
        return Counts(tuple(text[len(prompt) :]), drafted, accepted)

    @torch.no_grad()
    def wanted(self, text: Sequence[int]) -> list[int]:
        """Return the whole model's prediction after each token of a text."""
        return [int(token) for token in self.twin(torch.tensor([list(text)]))[0].argmax(-1)]

    @torch.no_grad()
    def drafts(self, text: Sequence[int], count: int) -> list[int]:
        """Return the exit's drafts after a text: the first from the model's state, the others from its estimates."""
        depth, exit_layer = self.twin.spec.num_hidden_layers, self.node.exit_spec.exit_layer
        final = self.twin.boundaries(torch.tensor([list(text[:-1])]), (depth,))[depth].hidden
        state: torch.Tensor | None = unit_rms(final[:, :1] if self.forgets else final[:, -1:], self.node.eps)
        drafts: list[int] = []
        for _ in range(count):
            ids = torch.tensor([[*text, *drafts]])
            below = self.twin.boundaries(ids, (exit_layer,))[exit_layer]
            newest = Boundary(below.hidden[:, -1:], below.middle[:, -1:])
            said = self.node(newest, self.twin.embedded(ids[:, -1:]), state, self.twin)
            row = int(said.logits[0, -1].argmax())
            drafts.append(row if self.node.ids is None else int(self.node.ids[row]))
            if not self.forgets:
                state = said.state
        return drafts


def random_exit(spec: ModelSpec, exit_spec: ExitSpec) -> ExitNode:
    """Return an exit that passes the residual stream on and mixes in much of what else it sees."""
    node = ExitNode(spec, exit_spec)
    generator = torch.Generator().manual_seed(zlib.crc32(repr(exit_spec).encode()))
    for name, parameter in node.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        starts_as_identity = name in ("linear.weight", "linear.bias")
        parameter.data = parameter.data + MIXED_IN * noise if starts_as_identity else noise
    if node.ids is not None:
        chosen = torch.randperm(spec.vocab_size, generator=generator)[: len(node.ids)].sort().values
        node.head.ids = chosen
    return node


def prompts(count: int = PROMPTS, length: int | None = None) -> list[list[int]]:
    """Return prompts of random token ids, the same for every test; 1 to 40 ids each, or ``length``."""
    rng = np.random.default_rng(7)
    return [rng.integers(3, SPECULATOR.vocab, length or rng.integers(1, 41)).tolist() for _ in range(count)]


def decode(model: Model, prompt: list[int], tokens: int = TOKENS, **options: Any) -> Result:
    result = model.generate(prompt, max_new_tokens=tokens, ignore_eos=True, **options)
    assert result.stats.is_balanced
    return result


def speculate(model: Model, prompt: list[int], policy: DraftPolicy, tokens: int = TOKENS, **options: Any) -> Counts:
    result = decode(model, prompt, tokens, strategy="self-speculative", draft=policy, **options)
    return Counts(result.tokens, result.stats.drafted, result.stats.accepted)


@dataclass(frozen=True)
class Sample:
    """A bundle, and the exit nodes that it was made from."""

    path: Path
    model: Model
    twin: Twin
    nodes: dict[int, ExitNode]

    def slow(self, exit_layer: int, forgets: bool = False) -> SlowSpeculation:
        return SlowSpeculation(self.twin, self.nodes[exit_layer], forgets)


@pytest.fixture(autouse=True)
def torch_is_kept_to_one_thread(one_torch_thread: Callable[[], None]) -> None:
    """Keep torch to one thread: the reference runs a tiny model many times, and threads would wait for each other."""


@pytest.fixture(scope="module", params=EXITS)
def sample(request: pytest.FixtureRequest, tiny_bundles: TinyBundles) -> Sample:
    return make_sample(tiny_bundles, request.param)


@pytest.fixture(scope="module")
def three(tiny_bundles: TinyBundles) -> Sample:
    return make_sample(tiny_bundles, "second-of-three")


def make_sample(tiny_bundles: TinyBundles, name: str) -> Sample:
    twin = load_twin(str(tiny_bundles.checkpoint(SPECULATOR)))
    nodes = [random_exit(twin.spec, exit_spec) for exit_spec in EXITS[name]]
    folder = tiny_bundles.folder / f"exits-{name}"
    save_exits(folder, twin.spec, nodes, dtype=np.float32)
    path = tiny_bundles.bundle(SPECULATOR, exits=folder)
    return Sample(path, load(path), twin, {node.exit_spec.exit_layer: node for node in nodes})


@pytest.mark.parametrize("slots", [1, 3])
def test_what_rollback_keeps_does_not_depend_on_what_runs_cost(
    tiny_bundles: TinyBundles, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of rows of a round decides which rows see a guess of the state, and rollback keeps exits' tokens."""
    policy = ExitPolicy(parse_criterion("always"), verify="rollback", rollback_below=0.001)
    path, found = make_sample(tiny_bundles, "state").path, []
    for costs_s in ({1: 1.0, 16: 1.0}, {1: 1.0, 16: 16.0}):  # long runs pay, or they do not
        monkeypatch.setattr(PendingCap, "_costs_s", lambda self, costs_s=costs_s: costs_s)
        with load(path, slots=slots) as model:
            found.append([decode(model, prompt, exits=policy).tokens for prompt in prompts()])
    assert found[0] == found[1]


def test_every_draft_length_gives_the_plain_tokens(sample: Sample) -> None:
    drafted = accepted = 0
    for prompt in prompts():
        expected = decode(sample.model, prompt).tokens
        for policy, exit_layer in product(POLICIES, sample.nodes):
            found = speculate(sample.model, prompt, policy, exit_layer=exit_layer)
            assert found.tokens == expected, (policy, exit_layer)
            drafted += found.drafted
            accepted += found.accepted
    low, high = ACCEPTANCE
    assert low < accepted / drafted < high, "the grid must meet accepted and rejected drafts"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"k{p.max_draft_tokens}{'-bonus' if p.has_bonus else ''}")
def test_drafts_equal_those_of_the_slow_reference(sample: Sample, policy: DraftPolicy) -> None:
    for prompt, exit_layer in product(prompts(2), sample.nodes):
        found = speculate(sample.model, prompt, policy, SLOW_TOKENS, exit_layer=exit_layer)
        assert found == sample.slow(exit_layer).decode(prompt, policy, SLOW_TOKENS)


def test_the_right_state_makes_a_difference_to_the_reference(sample: Sample) -> None:
    """If it made none, the tests here would show nothing."""
    counts = [
        [sample.slow(3, forgets).decode(prompt, POLICIES[-1], SLOW_TOKENS) for prompt in prompts(3)]
        for forgets in (False, True)
    ]
    assert counts[0] != counts[1]


def test_a_turn_drafts_the_same_on_a_reused_cache_as_on_a_fresh_one(three: Sample) -> None:
    """A turn ends at a limit or when its stream is closed, anywhere in a round, with any exit or none."""
    text = prompts(1, 20)[0]
    for turn, taken in enumerate((7, 1, 10, 5, 2, 6)):
        exit_layer, policy = (3, 1, 3, 4)[turn % 4], POLICIES[-1 - turn]
        expected = three.slow(exit_layer).decode(text, policy, SLOW_TOKENS)
        options: dict[str, Any] = {"exit_layer": exit_layer, "reuse_cache": turn > 0}
        if turn == 4:
            decode(three.model, text, 5, reuse_cache=True)  # plain decoding, then again from the same text
        assert speculate(three.model, text, policy, SLOW_TOKENS, **options) == expected
        stream = three.model.stream(
            text,
            max_new_tokens=SLOW_TOKENS,
            strategy="self-speculative",
            draft=policy,
            ignore_eos=True,
            exit_layer=exit_layer,
            reuse_cache=True,
        )
        emitted = [token.id for _, token in zip(range(taken), stream, strict=False)]
        stream.close()
        assert emitted == list(expected.tokens[:taken])
        text += [*emitted, 5 + turn]


@pytest.mark.parametrize("length", [1, 2, PREFILL_ROWS - 20, PREFILL_ROWS + 1])
def test_prompts_of_all_lengths_pass_on_the_last_state(three: Sample, length: int) -> None:
    """Lengths go from one token to more than a prefill chunk, and the cache grows."""
    model = load(three.path)
    prompt = prompts(1, length)[0]
    for policy in POLICIES[-2:]:
        expected = three.slow(3).decode(prompt, policy, SLOW_TOKENS)
        assert speculate(model, prompt, policy, SLOW_TOKENS, exit_layer=3) == expected


def test_a_stack_returns_the_confidence_of_the_gate(three: Sample) -> None:
    model, node = three.model, three.nodes[3]
    stack = Stack(model.graphs, model.cache, (3,))
    text = prompts(1, 30)[0]
    stack.prefill(text[:20], 0, with_logits=False)
    for row, token in enumerate(text[20:]):
        stack.put(row, token)
        stack.draft(row, 20, with_head=True, with_logits=False)
        with torch.no_grad():
            below = three.twin.boundaries(torch.tensor([text[: 21 + row]]), (3,))[3]
            expected = float(node.confidence(below.hidden[0, -1]))
        assert stack.exit.gate is not None
        assert float(stack.exit.gate[row]) == pytest.approx(expected, abs=1e-4)
    assert Stack(model.graphs, model.cache, (4,)).exit.gate is None


def test_the_next_draft_sees_the_drafts_chosen_in_python(three: Sample) -> None:
    """With a penalty or a seed, the drafted token may differ from the one that the graph chose."""
    penalty = SamplingParams(repetition_penalty=1.3)
    drawn = SamplingParams(temperature=0.8, top_p=0.95, seed=3)
    for prompt, policy in zip(prompts(), POLICIES[2:], strict=False):
        expected = decode(three.model, prompt, sampling=penalty).tokens
        assert speculate(three.model, prompt, policy, sampling=penalty, exit_layer=3).tokens == expected
        first = speculate(three.model, prompt, policy, sampling=drawn, exit_layer=3)
        assert speculate(load(three.path), prompt, policy, sampling=drawn, exit_layer=3) == first


def test_float16_states_draft_about_as_well(tiny_bundles: TinyBundles, three: Sample) -> None:
    model = load(tiny_bundles.bundle(SPECULATOR, exits=tiny_bundles.folder / "exits-second-of-three", dtype="float16"))
    found, expected = (
        [speculate(m, prompt, POLICIES[-1], exit_layer=3) for prompt in prompts()] for m in (model, three.model)
    )
    rates = [sum(c.accepted for c in counts) / sum(c.drafted for c in counts) for counts in (found, expected)]
    assert rates[0] == pytest.approx(rates[1], abs=0.1)


@pytest.mark.parametrize("weights", [INT4, INT8], ids=str)
@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_quantized_exits_give_the_plain_tokens_and_draft_repeatably(
    three: Sample, quantized: QuantizedBundles, weights: BlockFormat, kv_cache: KVType
) -> None:
    model = load(quantized(three.path, preset(weights, kv_cache)))
    drafted = accepted = 0
    for prompt in prompts(2):
        expected = decode(model, prompt).tokens
        for policy in POLICIES:
            found = speculate(model, prompt, policy, exit_layer=3)
            assert found.tokens == expected
            assert speculate(model, prompt, policy, exit_layer=3, reuse_cache=True) == found
            drafted += found.drafted
            accepted += found.accepted
    assert ACCEPTANCE[0] < accepted / drafted < ACCEPTANCE[1]
