"""Reads any checkpoint that ``export`` reads into the twin, and writes the folder that ``export`` reads back.

::

    config.json          the spec under the family's names; kv_map, windows and masks_diagonal if a Llama has them;
                         forward_passes and backward_passes, LCKV's names, if it has iterated groups
    model.safetensors    the weights under the family's tensor names, stacked and turned as it has them
    tokenizer.json ...   copied from the source
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from shortstack.export.arch import ARCHITECTURES, resolve
from shortstack.export.arch.architecture import LM_HEAD, end_shapes
from shortstack.export.checkpoint import Checkpoint, open_checkpoint
from shortstack.export.checkpoint.checkpoint import ROPE_FACTORS
from shortstack.export.checkpoint.config import Config
from shortstack.export.kept_blocks import KeptBlocks
from shortstack.export.sources import checkpoint_tensors
from shortstack.export.tensors import Floats, ModelTensors
from shortstack.export.twin.model import Passes, Twin
from shortstack.graphs.bundle import staged_folder
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.kv_map import iterated_groups
from shortstack.graphs.layer_weights import parameter_name
from shortstack.graphs.spec import ModelSpec


def load_twin(source: str) -> Twin:
    """Load a checkpoint.

    Args:
        source: A folder, a GGUF file or a hub id.

    Raises:
        CheckpointError: It cannot be read.
        UnsupportedError: It can be read, but this version does not know its kind.
    """
    return twin_of(open_checkpoint(source))


def twin_of(checkpoint: Checkpoint) -> Twin:
    """Build the twin of an open checkpoint, in float32; errors as in :func:`load_twin`."""
    arch, spec = resolve(checkpoint)
    tensors = ModelTensors(checkpoint, arch, spec, KeptBlocks())
    with torch.device("meta"):  # no time spent on random weights
        twin = Twin(spec)
    twin = twin.to_empty(device="cpu")
    twin.rope_factors = tensors.rope_factors()
    twin.passes = read_passes(checkpoint.config)
    state = {twin_parameter(role): tensors.vector(role) for role in end_shapes(spec)}
    for layer in range(spec.num_hidden_layers):
        state |= {twin_parameter(role, layer): value for role, value in tensors.layer_roles(layer).items()}
    twin.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return twin


def twin_parameter(role: str, layer: int | None = None) -> str:
    """Return the twin's name of a weight, by its role; ``layer`` is None outside the layers."""
    if layer is not None:
        return f"model.layers.{layer}.{parameter_name(role)}"
    return role if role == LM_HEAD else f"model.{role.replace('final_norm', 'norm')}"


def check_sharing_is_saved(spec: ModelSpec) -> None:
    """Check that a config of the model's family can say which layers share keys and values, and which slide.

    Some families say by one field which layers slide and which are rotated, and how.

    Raises:
        UnsupportedError: It cannot: the folder would be read as another model.
    """
    arch = ARCHITECTURES[spec.model_type]
    try:
        found = arch.read_spec(Config(arch.write_config(spec), "config.json"))
    except CheckpointError:
        found = None
    if found is None or _sharing(found) != _sharing(spec):
        raise UnsupportedError(
            f"no config of {spec.model_type} can say how these layers share keys and values, and what each sees",
            found=f"kv_map {list(spec.kv_map)}, windows {list(spec.windows)}",
            expected="the windows that the model has, where its sliding layers have another rotary embedding",
            remedy="leave --sliding-window and the marks of sliding layers out",
        )


def _sharing(spec: ModelSpec) -> tuple[object, ...]:
    """Return whose K,V each layer uses, what it sees, and how it is rotated."""
    numbers = (layer.attention.rope for layer in spec.layers)
    ropes = [None if number is None else spec.ropes[number] for number in numbers]
    rotations = [None if rope is None else (rope.theta, rope.dims, rope.scaling.kind) for rope in ropes]
    return spec.kv_map, spec.windows, spec.masks_diagonal, rotations


def save_twin(twin: Twin, folder: Path, files: Mapping[str, bytes], *, dtype: torch.dtype = torch.float32) -> None:
    """Write a twin as a checkpoint folder, which appears complete or not at all.

    Args:
        twin: The model.
        folder: The folder to write.
        files: The tokenizer's files, as :meth:`Checkpoint.files` returns them.
        dtype: Type of the stored weights.

    Raises:
        BundleError: The folder is not empty, or cannot be written.
    """
    arch = ARCHITECTURES[twin.spec.model_type]
    own = twin.state_dict()
    ends = {role: own[twin_parameter(role)] for role in end_shapes(twin.spec)}
    layers = [
        {weight.role: own[twin_parameter(weight.role, layer)] for weight in twin.spec.weights(layer)}
        for layer in range(twin.spec.num_hidden_layers)
    ]
    state = {
        name: torch.from_numpy(value).to(dtype).contiguous()
        for name, value in checkpoint_tensors(arch, twin.spec, _arrays(ends), [_arrays(x) for x in layers])
    }
    if twin.rope_factors is not None:
        state[ROPE_FACTORS] = torch.from_numpy(twin.rope_factors)
    config = arch.write_config(twin.spec) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    if iterated_groups(twin.spec.kv_map):
        config["forward_passes"] = twin.passes.without_gradient
        config["backward_passes"] = twin.passes.with_gradient
    with staged_folder(folder) as staged:
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(state, staged / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (staged / name).write_bytes(content)


def _arrays(weights: Mapping[str, torch.Tensor]) -> dict[str, Floats]:
    return {role: weight.detach().cpu().float().numpy() for role, weight in weights.items()}


def read_passes(config: Config) -> Passes:
    """Read how often iterated groups run in training, from the fields of LCKV's configs.

    Raises:
        CheckpointError: A field is not an integer, or is too small.
    """
    default = Passes()
    without = config.read(int, "forward_passes", default.without_gradient)
    if without < 0:
        raise config.wrong("forward_passes", "0 or more")
    with_gradient = config.read(int, "backward_passes", default.with_gradient)
    if with_gradient < 1:
        raise config.wrong("backward_passes", "1 or more")
    return Passes(without, with_gradient)
