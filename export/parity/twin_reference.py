"""The reference of a parity check if transformers has no such model: our PyTorch twin, position by position.

It serves models whose layers share keys and values, have windows, or mask the diagonal. The twin runs by its definition
(:mod:`shortstack.export.twin.sequential`), which shares neither code nor the order of computation with the graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.arch import ARCHITECTURES, resolve
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.kept_blocks import KeptBlocks
from shortstack.export.parity.bundle_weights import BundleWeights, WeightError, compare_with, put_into_twin
from shortstack.export.parity.kept import compare_kept
from shortstack.export.tensors import ModelTensors
from shortstack.export.twin.folder import twin_of
from shortstack.export.twin.sequential import sequential
from shortstack.graphs import names
from shortstack.graphs.spec import ModelSpec
from shortstack.runtime.engine.whole_text import Activations, Array


def needs_twin(spec: ModelSpec, source: str = "") -> bool:
    """Whether transformers has no model of this kind, or does not read the folder ``source``."""
    has_model = ARCHITECTURES[spec.model_type].is_in_transformers(spec)
    return not has_model or (Path(source) / names.GENAI_CONFIG_FILE).is_file()


class TwinReference:
    """The twin of a checkpoint, in float32 on the CPU; the methods are those of ``Reference``.

    Args:
        source: What :func:`shortstack.export.checkpoint.open_checkpoint` takes.
        revision: Branch, tag or commit of a hub id.
        adapter: A LoRA adapter to add to its weights, as peft saves it.
        follow_links: Follow links that lead out of its folder.
        weights: Those of a quantized bundle, which the twin then holds; None leaves it the checkpoint's.
        allow_pickle: Read tensors from pickles.

    Attributes:
        spec: What shortstack reads from its config.

    Raises:
        CheckpointError: It is not a checkpoint that shortstack exports.
    """

    def __init__(
        self,
        source: str,
        revision: str | None = None,
        adapter: Path | None = None,
        follow_links: bool = False,
        weights: BundleWeights | None = None,
        allow_pickle: bool = False,
    ) -> None:
        checkpoint = open_checkpoint(source, revision=revision, follow_links=follow_links, allow_pickle=allow_pickle)
        adapted = checkpoint if adapter is None else AdaptedCheckpoint(checkpoint, adapter)
        self._twin = twin_of(adapted).eval()
        self.spec = self._twin.spec
        self.own_heads = {} if weights is None else weights.own_heads()
        self.weight_errors: list[WeightError] = []
        if weights is not None:
            arch, spec = resolve(adapted)
            self.weight_errors = compare_with(ModelTensors(adapted, arch, spec, KeptBlocks()), weights)
            self.weight_errors += compare_kept(adapted, arch, spec, weights)
            put_into_twin(self._twin, weights)

    @torch.no_grad()
    def run_text(self, tokens: Sequence[int], depths: Sequence[int]) -> Activations:
        """Run one text through the model and read it at several depths; depth L stands for the final head."""
        ids, last = torch.tensor([list(tokens)]), self.spec.num_hidden_layers
        found = sequential(self._twin, ids)
        inner = [depth for depth in depths if depth != last]
        boundaries = self._twin.boundaries(ids, inner) if inner else {}
        hidden = {depth: boundary.hidden[0].numpy() for depth, boundary in boundaries.items()}
        heads = {depth: self._head(boundary.hidden, depth)[0].numpy() for depth, boundary in boundaries.items()}
        heads[last] = found.logits[0].numpy()
        keys, values = ([found.caches[layer][part][0].numpy() for layer in self.spec.kv_map] for part in (0, 1))
        return Activations(heads, hidden, keys, values)

    @torch.no_grad()
    def streams(self, tokens: Sequence[int], depths: Sequence[int]) -> dict[int, Array]:
        """Return the residual stream [seq, hidden] after some depths, the model's own too, before any norm."""
        found = self._twin.boundaries(torch.tensor([list(tokens)]), set(depths))
        return {depth: found[depth].hidden[0].numpy() for depth in depths}

    def _head(self, hidden: torch.Tensor, depth: int) -> torch.Tensor:
        own = self.own_heads.get(depth)
        return self._twin.logits(hidden) if own is None else self._twin.scaled_logits(self._twin.state(hidden) @ own.T)

    @torch.no_grad()
    def greedy(self, tokens: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Continue a text greedily, end-of-sequence tokens included.

        Returns:
            The new token ids, and for each the gap between the best and the second-best logit.
        """
        new: list[int] = []
        gaps: list[float] = []
        caches, step = None, torch.tensor([list(tokens)])
        for _ in range(count):
            found = sequential(self._twin, step, caches)
            best = found.logits[0, -1].topk(2)
            new.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            caches, step = found.caches, best.indices[:1][None]
        return new, gaps
