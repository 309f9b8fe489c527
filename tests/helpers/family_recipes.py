"""What every recipe does to the tiny model of a family: two steps, then a bundle that computes what was trained.

A check raises an AssertionError where a family fails it. ``tests/families/test_family_recipes.py`` runs all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner

from helpers.families import MadeFamily
from helpers.quantized import INT4_OFFSETS, preset
from helpers.recipe_runs import TRAINED_LOGITS, call, options, write_words
from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.exits import load_exits
from shortstack.export.twin.folder import load_twin, twin_of
from shortstack.export.twin.model import Twin
from shortstack.export.twin.sequential import sequential
from shortstack.graphs.kv_map import identity_kv_map
from shortstack.graphs.spec import ModelSpec
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import load
from shortstack.samples.recipes import assistant, eagle, ee_llm, ee_tuning, kv_sharing, layerskip

EXIT, TOKENS = 2, 16


def half_shared(spec: ModelSpec) -> tuple[int, ...]:
    """Return a map in which each layer of the upper half uses K,V of the nearest layer of the lower half that fits."""
    lower = spec.num_hidden_layers // 2

    def alike(layer: int) -> list[int]:
        own = spec.layers[layer].attention
        wanted = own.kv_heads, own.head_dim, own.rope, own.k_equals_v
        others = ((number, spec.layers[number].attention) for number in range(lower))
        return [n for n, other in others if (other.kv_heads, other.head_dim, other.rope, other.k_equals_v) == wanted]

    return tuple(alike(n)[-1] if n >= lower and alike(n) else n for n in range(spec.num_hidden_layers))


def shares(made: MadeFamily, folder: Path) -> None:
    """Half of the layers use K,V of others, in floats and in int4."""
    spec = load_twin(str(made.checkpoint)).spec
    kv_map = half_shared(spec)
    assert kv_map != identity_kv_map(len(kv_map))
    sharing = ["--kv-map", ",".join(map(str, kv_map)), "--exit-layer", EXIT]
    report = call(kv_sharing.main, made.checkpoint, folder / "run", *sharing, *options(write_words(folder), 2))
    assert report["kv_bytes_per_token"]["after"] < report["kv_bytes_per_token"]["before"]
    model = folder / "run" / "model"
    trained = load_twin(str(model)).eval()
    assert trained.spec.kv_map == kv_map
    assert trained.spec.layers == spec.layers
    stored = {name for name in open_checkpoint(str(model)).names() if "k_proj" in name or "q_proj" in name}
    owners = sum(n == owner for n, owner in enumerate(kv_map))
    assert not stored or sum("k_proj.weight" in name for name in stored) == owners
    export_bundle(ExportSpec(str(model), folder / "bundle", exits=model))
    _computes(folder / "bundle", trained, made)
    quantize_bundle(QuantizeSpec(folder / "bundle", folder / "int4", preset(INT4_OFFSETS, "int8")))
    _drafts(folder / "int4", made)


def skips(made: MadeFamily, folder: Path) -> None:
    """LayerSkip: layer dropout and an exit, all weights."""
    call(
        layerskip.main, made.checkpoint, folder / "run", "--exit-layer", EXIT, "--p-max", 0.3,
        *options(write_words(folder), 2),
    )  # fmt: skip
    model = folder / "run" / "model"
    export_bundle(ExportSpec(str(model), folder / "bundle", exits=model))
    _computes(folder / "bundle", load_twin(str(model)).eval(), made)


def adapts(made: MadeFamily, folder: Path) -> None:
    """LayerSkip with low-rank adapters and distillation of the model that it was."""
    lora = ["--lora-rank", 2, "--lora-rank-below", 4, "--distill", 0.5, "--exit-vocab", 64]
    data = write_words(folder)
    call(layerskip.main, made.checkpoint, folder / "run", "--exit-layer", EXIT, *lora, *options(data, 2))
    adapter = folder / "run" / "adapter"
    merged = twin_of(AdaptedCheckpoint(open_checkpoint(str(made.checkpoint)), adapter)).eval()
    before = load_twin(str(made.checkpoint)).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in merged.state_dict().items())
    export_bundle(ExportSpec(str(made.checkpoint), folder / "bundle", adapter=adapter, exits=adapter))
    _computes(folder / "bundle", merged, made)


def trains_exits(made: MadeFamily, folder: Path) -> None:
    """EE-LLM: stack and exits as one."""
    exits = ["--exit-layer", EXIT, "--kind", "mlp" if made.row.mlp_exits else "norm", "--head", "own"]
    call(ee_llm.main, made.checkpoint, folder / "run", *exits, *options(write_words(folder), 2))
    model = folder / "run" / "model"
    export_bundle(ExportSpec(str(model), folder / "bundle", exits=model))
    _computes(folder / "bundle", load_twin(str(model)).eval(), made, model)


def tunes(made: MadeFamily, folder: Path) -> None:
    """EE-Tuning: a draft head, distilled from the frozen model, that sees its token and its last state."""
    head = ["--kind", "linear", "--linear-mlp", "16", "--sees-token", "--sees-state", "--draft-vocab", "64", "--gate"]
    steps = options(write_words(folder), 2)
    call(ee_tuning.main, made.checkpoint, folder / "run", "--exit-layer", EXIT, *head, *steps)
    export_bundle(ExportSpec(str(made.checkpoint), folder / "bundle", exits=folder / "run"))
    _computes(folder / "bundle", load_twin(str(made.checkpoint)).eval(), made)


def tunes_a_block(made: MadeFamily, folder: Path) -> None:
    """EE-Tuning: an exit with a layer of its own."""
    steps = options(write_words(folder), 2)
    call(ee_tuning.main, made.checkpoint, folder / "run", "--exit-layer", EXIT, "--kind", "block", *steps)
    export_bundle(ExportSpec(str(made.checkpoint), folder / "bundle", exits=folder / "run"))
    _computes(folder / "bundle", load_twin(str(made.checkpoint)).eval(), made, folder / "run")


def trains_a_drafter(made: MadeFamily, folder: Path) -> None:
    """EAGLE-3: a head beside the frozen model."""
    head = ["--depth", EXIT, "--draft-vocab", "64", "--intermediate-size", "32"]
    call(eagle.main, made.checkpoint, folder / "run", *head, *options(write_words(folder), 2))
    export_bundle(ExportSpec(str(made.checkpoint), folder / "bundle", drafter=str(folder / "run" / "head")))
    _computes(folder / "bundle", load_twin(str(made.checkpoint)).eval(), made)


def trains_an_assistant(made: MadeFamily, folder: Path) -> None:
    """An assistant beside the frozen model, where its final norm has no bias."""
    sizes = ["--draft-vocab", "64", "--hidden-size", "16"]
    given = [made.checkpoint, folder / "run", *sizes, *options(write_words(folder), 2)]
    if load_twin(str(made.checkpoint)).spec.ends.final_norm.has_bias:
        refused = CliRunner().invoke(assistant.main, [str(a) for a in given])
        assert refused.exit_code == 2
        assert "final norm has a bias" in refused.stderr
        return
    call(assistant.main, *given)
    drafter = str(folder / "run" / "assistant")
    export_bundle(ExportSpec(str(made.checkpoint), folder / "bundle", drafter=drafter))
    _computes(folder / "bundle", load_twin(str(made.checkpoint)).eval(), made)


RECIPES: dict[str, Callable[[MadeFamily, Path], None]] = {
    "kv_sharing": shares,
    "layerskip": skips,
    "layerskip with adapters": adapts,
    "ee_llm": trains_exits,
    "ee_tuning of a draft head": tunes,
    "ee_tuning of a block": tunes_a_block,
    "eagle": trains_a_drafter,
    "assistant": trains_an_assistant,
}


def _computes(bundle: Path, twin: Twin, made: MadeFamily, exits: Path | None = None) -> None:
    """Check that a bundle computes what PyTorch does, also at exits that see no state, and drafts without a trace."""
    ids = made.text(20)
    found = load(bundle).activations(ids).heads
    text = torch.tensor([ids])
    with torch.no_grad():
        expected = {twin.spec.num_hidden_layers: sequential(twin, text).logits[0]}
        for node in [] if exits is None else load_exits(exits, twin.spec):
            depth = node.exit_spec.exit_layer
            boundary = twin.boundaries(text, (depth,))[depth]
            expected[depth] = node.eval()(boundary, twin.embedded(text), None, twin).logits[0]
    for depth, logits in expected.items():
        scale = max(1.0, float(logits.std()))
        np.testing.assert_allclose(found[depth], logits, rtol=0, atol=TRAINED_LOGITS * scale)
    _drafts(bundle, made)


def _drafts(bundle: Path, made: MadeFamily) -> None:
    model, prompt = load(bundle), made.text(9, seed=1)
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
    plain = model.generate(prompt, **settings)
    drafted = model.generate(prompt, strategy="self-speculative", **settings)
    assert len(plain.tokens) == TOKENS
    assert drafted.tokens == plain.tokens
    assert drafted.stats.drafted
