"""The weights that a quantized bundle computes with, for the reference of a parity check.

They are put into the reference, so that its logits and those of the graphs differ by the arithmetic alone. Before, each
is compared with the checkpoint's: a matrix that is not what the bundle was made from is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shortstack.export.arch import ARCHITECTURES
from shortstack.export.arch.architecture import EMBEDDING, FINAL_NORM, LM_HEAD, POSITIONS, end_shapes
from shortstack.export.sources import checkpoint_tensors
from shortstack.export.tensors import ModelTensors, unpacked
from shortstack.export.twin.drafter_parts import DrafterWeights
from shortstack.export.twin.folder import twin_parameter
from shortstack.export.twin.model import Twin
from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.drafter_weights import HEAD_IDS as DRAFTER_IDS
from shortstack.graphs.drafter_weights import drafter_layer_weights, end_parts
from shortstack.graphs.exit_parts import BLOCK, HEAD_IDS, MLP_NORM, head_rows, stored_parts
from shortstack.graphs.ir.read_matrix import StoredMatrices
from shortstack.graphs.layer_spec import Attention, Layer
from shortstack.graphs.layer_weights import Weight, parameter_name, parameter_role, stored_shapes
from shortstack.graphs.plan import ExitSpec

Floats = npt.NDArray[np.float32]
Named = dict[str, npt.NDArray[Any]]
_ENDS = {
    EMBEDDING: names.EMBED_TOKENS,
    POSITIONS: names.EMBED_POSITIONS,
    FINAL_NORM: names.FINAL_NORM,
    "final_norm.bias": names.FINAL_NORM_BIAS,
    LM_HEAD: names.LM_HEAD,
}
"""The names in a bundle of the weights outside the layers, by role."""


class BundleWeights:
    """Reads a bundle's weights by role, as floats: matrices [out, in], heads not padded.

    Args:
        bundle: The bundle.

    Attributes:
        bundle: The bundle.

    Raises:
        BundleError: A graph cannot be read; later, a tensor is missing or does not fit.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._spec = bundle.manifest.spec
        self._stored = StoredMatrices(bundle)

    def ends(self) -> dict[str, Floats]:
        """Return the weights outside the layers, by role."""
        found = {}
        for role, shape in end_shapes(self._spec).items():
            read = self._stored.matrix if role in (EMBEDDING, LM_HEAD) else self._stored.floats
            found[role] = read(_ENDS[role], shape)
        return found

    def layer(self, layer: int) -> dict[str, Floats]:
        """Return the weights of a layer, by role."""
        return self._layer(names.layer_weights(layer), self._spec.weights(layer), self._spec.layers[layer].attention)

    def matrix(self, name: str, shape: tuple[int, int]) -> Floats:
        """Return a matrix [out, in] as it is stored, stacked and with padded heads, by its name in the bundle."""
        return self._stored.matrix(name, shape)

    def own_heads(self) -> dict[int, torch.Tensor]:
        """Return the heads [rows, hidden] that are stored for exits which share the LM head, by depth.

        They hold rows of the LM head, or all of it, rounded by themselves.
        """
        found = {}
        for exit_spec in self.bundle.manifest.plan.exits:
            name = names.exit_weight(exit_spec.exit_layer, "head.weight")
            if exit_spec.head == "shared" and name in self._stored:
                shape = (head_rows(self._spec, exit_spec), self._spec.hidden_size)
                found[exit_spec.exit_layer] = torch.from_numpy(np.array(self._stored.matrix(name, shape)))
        return found

    def exit(self, exit_spec: ExitSpec) -> Named:
        """Return an exit's own weights, but for a head of :meth:`own_heads`, by the keys of its node's state."""
        spec, depth = self._spec, exit_spec.exit_layer
        found: Named = {}
        for part, shape in stored_parts(spec, exit_spec).items():
            name = names.exit_weight(depth, part)
            if part == HEAD_IDS:
                found[part] = self._stored.array(name)
            elif not part.startswith(f"{BLOCK}."):
                read = self._stored.matrix if len(shape) == 2 else self._stored.floats
                found[part] = read(name, shape)
        if exit_spec.branch == "block":
            weights, attention = spec.exit_block_weights(depth), spec.exit_block_layer(depth).attention
            roles = self._layer(names.exit_weight(depth, BLOCK), weights, attention)
            found |= {f"{BLOCK}.{parameter_name(role)}": value for role, value in roles.items()}
        if exit_spec.branch == "mlp":  # the node takes the norm of the layer below, which AWQ may have scaled
            below = names.layer_weight(depth - 1, "post_attention_norm.weight")
            own, norm = (
                self._stored.floats(name, (spec.hidden_size,)) for name in (names.exit_weight(depth, MLP_NORM), below)
            )
            scale = np.divide(own, norm, out=np.ones_like(own), where=norm != 0)
            found |= {
                part: np.asarray(found[part] * scale, np.float32)
                for part in ("mlp.gate_proj.weight", "mlp.up_proj.weight")
                if part in found
            }
        return found

    def drafter(self) -> DrafterWeights:
        """Return a trained drafter's own weights; only where there is one."""
        spec, drafter = self._spec, self.bundle.manifest.plan.drafter
        assert drafter is not None, "the bundle has no drafter"
        parts: Named = {}
        for part, shape in end_parts(drafter, spec.hidden_size, spec.vocab_size).items():
            name = names.drafter_weight(part)
            if part == DRAFTER_IDS:
                parts[part] = self._stored.array(name)
            else:
                parts[part] = (self._stored.matrix if len(shape) == 2 else self._stored.floats)(name, shape)
        layers = (
            self._layer(names.drafter_weight(f"layers.{i}"), drafter_layer_weights(drafter, i), own.attention)
            for i, own in enumerate(drafter.layers)
        )
        return DrafterWeights(parts, tuple(layers))

    def _layer(self, prefix: str, weights: tuple[Weight, ...], attention: Attention) -> dict[str, Floats]:
        found: dict[str, Floats] = {}
        for part, shape in stored_shapes(weights, attention).items():
            read = self._stored.matrix if len(shape) == 2 else self._stored.floats
            own = [weight for weight in weights if weight.part == part]
            found |= unpacked(own, read(f"{prefix}.{part}", shape), attention)
        return found


@dataclass(frozen=True, slots=True)
class WeightError:
    """How far a weight of the bundle is from the checkpoint's.

    Attributes:
        what: The layer and the role.
        relative: Root mean square of the difference, divided by that of the checkpoint's values. Scales that
            quantization moved from one matrix into another are taken out first.
        is_kept: The matrix keeps the checkpoint's blocks, and is compared with these: nothing may differ.
    """

    what: str
    relative: float
    is_kept: bool = False


@torch.no_grad()
def put_into_transformers(model: Any, weights: BundleWeights) -> None:
    """Replace the parameters of transformers' model by a bundle's weights."""
    spec = weights.bundle.manifest.spec
    layers = [weights.layer(number) for number in range(spec.num_hidden_layers)]
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())  # a scalar is a buffer
    for name, value in checkpoint_tensors(ARCHITECTURES[spec.model_type], spec, weights.ends(), layers):
        parameter = held.get(name)
        if parameter is None:  # some files call the head by another name
            parameter = model.get_output_embeddings().weight
        parameter.copy_(torch.from_numpy(np.array(value)))  # what is mapped from a file cannot be written


@torch.no_grad()
def put_into_twin(twin: Twin, weights: BundleWeights) -> None:
    """Replace the parameters of a twin by a bundle's weights."""
    parts = [(weights.ends(), None), *((weights.layer(i), i) for i in range(twin.spec.num_hidden_layers))]
    for roles, layer in parts:
        for role, value in roles.items():
            twin.get_parameter(twin_parameter(role, layer)).copy_(torch.from_numpy(np.array(value)))


def compare_with(tensors: ModelTensors, weights: BundleWeights) -> list[WeightError]:
    """Return how far each weight of a bundle is from the checkpoint's.

    Args:
        tensors: The checkpoint's.
        weights: The bundle's.
    """
    spec, ours = tensors.spec, weights.ends()
    errors = [WeightError(role, relative(ours[role], tensors.vector(role))) for role in ours]
    for number, layer in enumerate(spec.layers):
        found = compare_layers(weights.layer(number), tensors.layer_roles(number), layer)
        errors += [WeightError(f"layer {number} {role}", error) for role, error in found.items()]
    return errors


def compare_exit(ours: Named, theirs: Named, layer: Layer) -> dict[str, float]:
    """Compare the weights of an exit, by the keys of its node's state.

    Args:
        ours: The bundle's.
        theirs: Those that were trained.
        layer: What the exit's block is, if it has one.
    """
    prefix = f"{BLOCK}."
    blocks = [
        {parameter_role(part.removeprefix(prefix)): value for part, value in weights.items() if part.startswith(prefix)}
        for weights in (ours, theirs)
    ]
    found = compare_layers(blocks[0], blocks[1], layer) if blocks[1] else {}
    others = {part: relative(ours[part], theirs[part]) for part in theirs if not part.startswith(prefix)}
    return {f"{BLOCK}.{role}": error for role, error in found.items()} | others


def compare_layers(ours: Mapping[str, Floats], theirs: Mapping[str, Floats], layer: Layer) -> dict[str, float]:
    """Compare the weights of one layer by role, whatever AWQ has scaled.

    AWQ divides what makes a projection's inputs and multiplies its columns: a norm's weight, the rows of v_proj or
    those of up_proj. So norms are multiplied into the projections behind them, and what the rows of v_proj and up_proj
    were multiplied with is taken from the columns of o_proj and down_proj.
    """
    a, b = (_with_norms(dict(weights), layer) for weights in (theirs, ours))
    pairs = [("v_proj", "o_proj")] + ([("up_proj", "down_proj")] if layer.mlp.is_gated else [])
    for rows, columns in pairs:
        if (name := f"{rows}.weight") not in a:
            continue
        scale = _row_scale(b[name], a[name])
        b[name] = b[name] / scale[:, None]
        if (bias := f"{rows}.bias") in b:
            b[bias] = b[bias] / scale
        reads = f"{columns}.weight"
        group = b[reads].shape[1] // len(scale)
        per_head = scale.reshape(layer.attention.kv_heads if rows == "v_proj" else 1, 1, -1)
        b[reads] = b[reads] * np.repeat(per_head, group, axis=1).reshape(-1)
    return {role: relative(b[role], a[role]) for role in a}


def _with_norms(weights: dict[str, Floats], layer: Layer) -> dict[str, Floats]:
    """Return weights with the norms before the branches multiplied into the projections that read them."""
    readers = {
        "input_norm": ("q_proj", "k_proj", "v_proj"),
        "post_attention_norm": ("gate_proj", "up_proj") if layer.mlp.is_gated else ("up_proj",),
    }
    for norm, projections in readers.items():
        scale, bias = weights.pop(f"{norm}.weight", None), weights.pop(f"{norm}.bias", None)
        for name in projections:
            if scale is not None and (role := f"{name}.weight") in weights:
                matrix = weights[role]
                weights[role] = matrix * scale
                if bias is not None:
                    weights[f"{name}.bias"] = weights.get(f"{name}.bias", np.float32(0)) + matrix @ bias
    return weights


def _row_scale(ours: Floats, theirs: Floats) -> Floats:
    """Return what each row of a matrix was multiplied with, by least squares; 1 where that cannot be said."""
    size = np.square(theirs).sum(axis=1)
    scale = np.divide((ours * theirs).sum(axis=1), size, out=np.ones_like(size), where=size > 0)
    return np.where(scale > 0, scale, np.float32(1))


def relative(ours: Floats, theirs: Floats) -> float:
    """Return the root mean square of the difference, divided by that of ``theirs``."""
    difference, size = (float(np.square(x).sum(dtype=np.float64)) for x in (ours - theirs, theirs))
    if difference == 0:
        return 0.0
    return float("inf") if size == 0 else float(np.sqrt(difference / size))
