"""The reference of a parity check: transformers' own PyTorch model, run teacher-forced and greedily."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.arch import ARCHITECTURES, resolve
from shortstack.export.arch.architecture import FINAL_NORM, LM_HEAD
from shortstack.export.checkpoint import Checkpoint, open_checkpoint
from shortstack.export.checkpoint.consolidated import ConsolidatedCheckpoint
from shortstack.export.checkpoint.gguf import GgufCheckpoint
from shortstack.export.checkpoint.hf import HuggingFaceCheckpoint
from shortstack.export.checkpoint.megatron import MegatronCheckpoint
from shortstack.export.checkpoint.quantized import QuantizedCheckpoint
from shortstack.export.kept_blocks import KeptBlocks
from shortstack.export.parity.bundle_weights import BundleWeights, WeightError, compare_with, put_into_transformers
from shortstack.export.parity.kept import compare_kept
from shortstack.export.sources import rotary_order
from shortstack.export.tensors import ModelTensors
from shortstack.export.twin.folder import save_twin, twin_of
from shortstack.export.twin.layer import soft_capped
from shortstack.graphs.errors import CheckpointError
from shortstack.runtime.engine.whole_text import Activations, Array


class Reference:
    """The model that transformers loads from a checkpoint, in float32 on the CPU.

    Args:
        source: What :func:`shortstack.export.checkpoint.open_checkpoint` takes.
        revision: Branch, tag or commit of a hub id.
        adapter: A LoRA adapter to add to its weights, as peft saves it.
        follow_links: Follow links that lead out of its folder.
        weights: Those of a quantized bundle, which the model then holds; None leaves it the checkpoint's.
        allow_pickle: Read tensors from pickles.

    Attributes:
        spec: What shortstack reads from the same config.
        own_heads: Of the bundle's exits, by depth: rows of the LM head that were rounded by themselves, [rows, hidden].
        weight_errors: How far each of the bundle's weights is from the checkpoint's.

    Raises:
        CheckpointError: It is not a checkpoint that shortstack exports, or transformers cannot load it.
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
        from transformers.utils import logging

        logging.disable_progress_bar()
        # Our own reader comes first: it says what is wrong with a folder, refuses pickles, and checks names and shapes.
        checkpoint = open_checkpoint(source, revision=revision, follow_links=follow_links, allow_pickle=allow_pickle)
        self._arch, self.spec = resolve(checkpoint)
        adapted = None if adapter is None else AdaptedCheckpoint(checkpoint, adapter)
        path = Path(source).expanduser()
        arguments: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
        if _is_read_by_us_alone(checkpoint) or self._arch.model_type != self.spec.model_type:
            self._model: Any = _through_a_folder(checkpoint, arguments)
        else:
            self._model = _load(source, revision, path, arguments)
        self._model.eval()
        # transformers 5.24 renamed the argument.
        accepted = inspect.signature(self._model.forward).parameters
        self._cache_argument = "cache" if "cache" in accepted else "past_key_values"
        if adapted is not None:
            head = self._arch.tensor_name(LM_HEAD)  # some models have another name for it than their files
            for parameter, tensor in adapted.touched.items():
                own = self._model.get_output_embeddings().weight if tensor == head else None
                own = self._model.get_parameter(parameter) if own is None else own
                own.data += torch.from_numpy(adapted.delta(tensor))
        self.own_heads = {} if weights is None else weights.own_heads()
        self.weight_errors: list[WeightError] = []
        if weights is not None:
            read = checkpoint if adapted is None else adapted
            tensors = ModelTensors(read, self._arch, self.spec, KeptBlocks())
            self.weight_errors = compare_with(tensors, weights)
            self.weight_errors += compare_kept(read, self._arch, self.spec, weights)
            put_into_transformers(self._model, weights)
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)

    @torch.no_grad()
    def run_text(self, tokens: Sequence[int], depths: Sequence[int]) -> Activations:
        """Run one text through the model and read it at several depths.

        Args:
            tokens: The text.
            depths: Numbers of layers run before each head; the model's own depth L stands for the final head.
        """
        cache = self._new_cache()
        out = self._model(
            torch.tensor([list(tokens)]),
            **{self._cache_argument: cache},
            output_hidden_states=True,
            use_cache=True,
            return_dict=True,
        )
        last = len(out.hidden_states) - 1
        heads, hidden = {}, {}
        for depth in depths:
            if depth == last:  # transformers has already applied the norm to its last hidden state
                heads[depth] = out.logits[0].numpy()
            else:
                stream = out.hidden_states[depth]
                hidden[depth] = stream[0].numpy()
                heads[depth] = self._logits(stream, depth)[0].numpy()
        owners = [cache.layers[producer] for producer in self.spec.kv_map]
        keys = [self._as_rotated(number, owner.keys[0].numpy()) for number, owner in enumerate(owners)]
        return Activations(heads, hidden, keys, [owner.values[0].numpy() for owner in owners])

    @torch.no_grad()
    def streams(self, tokens: Sequence[int], depths: Sequence[int]) -> dict[int, Array]:
        """Return the residual stream [seq, hidden] after some depths, the model's own too, before any norm."""
        last: list[torch.Tensor] = []
        hook = self._final_norm().register_forward_pre_hook(lambda _, given: last.append(given[0]))
        try:
            found = self._model(
                torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False, return_dict=True
            ).hidden_states
        finally:
            hook.remove()
        return {depth: (last[0] if depth == len(found) - 1 else found[depth])[0].numpy() for depth in depths}

    def _final_norm(self) -> torch.nn.Module:
        name = ARCHITECTURES[self.spec.model_type].tensor_name(FINAL_NORM).removesuffix(".weight")
        module: torch.nn.Module = self._model.get_submodule(name)
        return module

    def _logits(self, stream: torch.Tensor, depth: int) -> torch.Tensor:
        """Apply norm and head to a residual stream below the top, as the model does at the top."""
        own = self.own_heads.get(depth)
        normed = self._final_norm()(stream)
        products = self._model.get_output_embeddings()(normed) if own is None else normed @ own.T
        return soft_capped(products * self.spec.ends.logit_scale, self.spec.ends.logit_softcap)

    def _as_rotated(self, layer: int, keys: Array) -> Array:
        """Return keys [kv_heads, seq, head_dim] with their columns in the order in which a bundle rotates them."""
        rope = self.spec.layers[layer].attention.rope
        return keys if rope is None else keys[..., rotary_order(self.spec.ropes[rope], self._arch.rope_pairs)]

    @torch.no_grad()
    def greedy(self, tokens: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Continue a text greedily, end-of-sequence tokens included.

        Returns:
            The new token ids, and for each the gap between the best and the second-best logit.
        """
        new: list[int] = []
        gaps: list[float] = []
        cache, step = self._new_cache(), torch.tensor([list(tokens)])
        for _ in range(count):
            out = self._model(step, **{self._cache_argument: cache}, use_cache=True, return_dict=True)
            best = out.logits[0, -1].topk(2)
            new.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            step = best.indices[:1][None]
        return new, gaps

    def _new_cache(self) -> Any:
        """Return an empty cache.

        Without a config it keeps all positions, also those that sliding layers no longer see.
        """
        from transformers import DynamicCache

        return DynamicCache()


def _is_read_by_us_alone(checkpoint: Checkpoint) -> bool:
    """Return whether transformers does not read a checkpoint, or not right.

    It reads GGUF files of few architectures, and of those it leaves out one thing or another: the scaling of rotary
    embeddings, the share of a head that is rotated, the width of heads. Of quantized folders the reference holds the
    dequantized weights, in float32 and without the kernels of the tool.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.architecture != "llama"
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        return checkpoint.is_pickled  # transformers finds few of the files that we do
    return isinstance(checkpoint, MegatronCheckpoint | ConsolidatedCheckpoint | QuantizedCheckpoint)


def _load(source: str, revision: str | None, path: Path, arguments: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    name = source
    if path.is_dir() and not any(path.glob("*.safetensors")) and (found := sorted(path.glob("*.gguf"))):
        path = found[0]
    if path.is_file():
        name, arguments["gguf_file"] = str(path.parent), path.name
    elif path.is_dir():
        arguments["use_safetensors"] = True
    elif revision is not None:
        arguments["revision"] = revision
    try:
        # `weights_only` holds in every loader of transformers 5; safetensors and GGUF hold no pickles anyway.
        return AutoModelForCausalLM.from_pretrained(name, **arguments)
    except Exception as error:  # of many kinds: of config classes, of the hub, of torch
        said = " ".join(str(error).split())
        raise CheckpointError(f"transformers cannot load {source}: {said or type(error).__name__}") from None


def _through_a_folder(checkpoint: Checkpoint, arguments: dict[str, Any]) -> Any:
    """Load a checkpoint that transformers cannot read, from a copy with the numbers that our own reader found."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the model may still map the files
        copy = Path(folder) / "model"
        save_twin(twin_of(checkpoint), copy, {})
        return _load(str(copy), None, copy, arguments)
