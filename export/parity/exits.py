"""The reference of a parity check for exits with their own weights: the PyTorch twin, fed what the graphs are fed.

transformers knows no exits. The model below an exit is still compared with transformers, so the twin is trusted for
nothing but the exit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.arch import resolve
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.checkpoint import StoredExit
from shortstack.export.parity.bundle_weights import BundleWeights, WeightError, compare_exit, put_into_twin
from shortstack.export.twin.exits import ExitNode, load_exits
from shortstack.export.twin.folder import twin_of
from shortstack.export.twin.model import Twin
from shortstack.graphs import names
from shortstack.graphs.errors import RequestError
from shortstack.graphs.exit_parts import HEAD_IDS
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.plan import ExitSpec
from shortstack.runtime.engine.draft_vocab import read_draft_vocab
from shortstack.runtime.engine.whole_text import Array
from shortstack.runtime.model import Model


@dataclass(frozen=True, slots=True)
class TwinExits:
    """Trained exits, and the model that they are for.

    Attributes:
        twin: The model; with the weights of a quantized bundle, if that is compared.
        nodes: The exits as they were trained, by depth.
        stand_ins: The exits with the weights of a quantized bundle, by depth; none for a bundle of floats.
        weight_errors: How far these weights are from those of ``nodes``.
    """

    twin: Twin
    nodes: Mapping[int, ExitNode]
    stand_ins: Mapping[int, ExitNode] = field(default_factory=dict)
    weight_errors: Sequence[WeightError] = ()

    @torch.no_grad()
    def logits(self, model: Model, tokens: Sequence[int], state: Array) -> dict[int, Array]:
        """Return the twin's logits [seq, rows] of each exit, by depth, for the rows that the bundle's heads have.

        Args:
            model: The bundle.
            tokens: The text.
            state: The states to feed to exits that see states, [seq, hidden].
        """
        ids = torch.tensor([list(tokens)])
        found = self.twin.boundaries(ids, set(self.nodes))
        embeddings = self.twin.embedded(ids)
        results = {}
        computing = {**self.nodes, **self.stand_ins}
        for exit_spec in model.bundle.manifest.plan.exits:
            if (node := computing.get(exit_spec.exit_layer)) is None:
                continue
            out = node(found[exit_spec.exit_layer], embeddings, torch.from_numpy(state)[None], self.twin)
            logits = out.logits[0].numpy()
            was_trimmed = node.ids is not None  # when it was trained, not by the export
            results[exit_spec.exit_layer] = logits if was_trimmed else columns(model, exit_spec.exit_layer, logits)
        return results


def load_twin_exits(
    source: str,
    folder: Path | None,
    revision: str | None = None,
    adapter: Path | None = None,
    follow_links: bool = False,
    weights: BundleWeights | None = None,
    allow_pickle: bool = False,
) -> TwinExits | None:
    """Load the twin of a checkpoint and the exits of a folder; errors as in the export.

    Without a folder the exits are those in the checkpoint itself. Returns None if it holds none. With the weights of a
    quantized bundle, these compute.
    """
    checkpoint = open_checkpoint(source, revision=revision, follow_links=follow_links, allow_pickle=allow_pickle)
    stored = checkpoint.exits(resolve(checkpoint)[1]) if folder is None else ()
    if folder is None and not stored:
        return None
    twin = twin_of(checkpoint if adapter is None else AdaptedCheckpoint(checkpoint, adapter)).eval()
    nodes = [_node_of(exit_, twin) for exit_ in stored] if folder is None else load_exits(folder, twin.spec)
    trained = {node.exit_spec.exit_layer: node.eval() for node in nodes}
    if weights is None:
        return TwinExits(twin, trained)
    check_exits(weights.bundle.manifest, TwinExits(twin, trained))
    stand_ins, errors = _stand_ins(weights, twin, trained)
    put_into_twin(twin, weights)
    return TwinExits(twin, trained, stand_ins, errors)


def _stand_ins(
    weights: BundleWeights, twin: Twin, trained: Mapping[int, ExitNode]
) -> tuple[dict[int, ExitNode], list[WeightError]]:
    """Return nodes that hold a bundle's weights, by depth, and how far these are from the trained ones.

    Where the bundle has rows of the LM head that were rounded by themselves, the node's head is its own.
    """
    found, errors, own_heads = dict[int, ExitNode](), list[WeightError](), weights.own_heads()
    for exit_spec in weights.bundle.manifest.plan.exits:
        depth = exit_spec.exit_layer
        if (before := trained.get(depth)) is None:
            continue
        stored: dict[str, Any] = weights.exit(exit_spec)
        was = {part: value.numpy() for part, value in before.state_dict().items() if part != HEAD_IDS}
        compared = compare_exit({part: stored[part] for part in was}, was, twin.spec.exit_block_layer(depth))
        errors += [WeightError(names.exit_weight(depth, part), error) for part, error in compared.items()]
        if depth in own_heads:
            exit_spec, stored["head.weight"] = replace(exit_spec, head="own"), own_heads[depth].numpy()
        node = ExitNode(twin.spec, exit_spec)
        node.load_state_dict({part: torch.from_numpy(np.array(stored[part])) for part in node.state_dict()})
        found[depth] = node.eval()
    return found, errors


def _node_of(exit_: StoredExit, twin: Twin) -> ExitNode:
    node, tensors = ExitNode(twin.spec, exit_.spec), exit_.read()
    depth = exit_.spec.exit_layer
    node.load_state_dict(
        {part: torch.from_numpy(tensors[names.exit_weight(depth, part)]) for part in node.state_dict()}
    )
    return node


def check_exits(manifest: Manifest, exits: TwinExits | None) -> None:
    """Check that there is a reference for every exit of a bundle that has its own weights.

    Raises:
        RequestError: A reference is missing, or is of another kind.
    """
    nodes = {} if exits is None else exits.nodes
    for exit_spec in manifest.plan.exits:
        node = nodes.get(exit_spec.exit_layer)
        if node is None and not exit_spec.is_plain:
            raise RequestError(
                f"the exit after {exit_spec.exit_layer} layers has its own weights, and there is nothing to compare "
                "it with",
                remedy="name the folder that the bundle was exported with: --exits FOLDER",
            )
        if node is not None and _trained(exit_spec, node) != node.exit_spec:
            raise RequestError(
                f"the exit after {exit_spec.exit_layer} layers differs from the one in the folder of exits",
                found=node.exit_spec,
                expected=exit_spec,
                remedy="name the folder that the bundle was exported with: --exits FOLDER",
            )


def _trained(exit_spec: ExitSpec, node: ExitNode) -> ExitSpec:
    """Return an exit as it was trained, before an export trimmed its shared head."""
    return replace(exit_spec, draft_vocab=None) if node.ids is None and exit_spec.head == "shared" else exit_spec


def columns(model: Model, depth: int, logits: Array) -> Array:
    """Return the reference's logits for those tokens that a trimmed head keeps."""
    exits = {e.exit_layer: e for e in model.bundle.manifest.plan.exits}
    ids = read_draft_vocab(model.bundle, exits[depth]) if depth in exits else None
    return logits if ids is None else logits[:, ids]


def random_states(model: Model, tokens: Sequence[int]) -> Array:
    """Return random states [seq, hidden], the same for the same text; the formula must hold for any states."""
    shape = (len(tokens), model.bundle.manifest.spec.hidden_size)
    return np.random.default_rng(list(tokens)).standard_normal(shape).astype(np.float32)
