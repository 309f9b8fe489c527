"""The folder of an EAGLE-3 head, as EAGLE's own code names its tensors and ``export --drafter`` reads them.

::

    config.json          a Llama layer's fields, draft_vocab_size, eagle_aux_hidden_state_layer_ids
    model.safetensors    fc, midlayer..., norm, lm_head in float16; d2t: token id of row i = i + d2t[i]; t2d
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shortstack.export.checkpoint.config import Config
from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import CheckpointError, RequestError
from shortstack.graphs.read_file import read_json_object
from shortstack.samples.recipes.training.drafter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    trained_tensors,
    write_drafter_files,
)
from shortstack.samples.recipes.training.eagle_head import EagleHead, HeadSpec


def write_head(head: EagleHead, folder: Path) -> None:
    """Write a head; one that is there is replaced."""
    tensors = trained_tensors(head, head.ids) | {"t2d": head.row_of >= 0}
    write_drafter_files(folder, head.spec.to_json(), tensors)


def read_head(folder: Path, twin: Twin, drafts: int) -> EagleHead:
    """Read a head that :func:`write_head` wrote, to train it further.

    Args:
        folder: The head.
        twin: The model that it drafts for.
        drafts: Steps of its training-time test from now on.

    Raises:
        CheckpointError: A file cannot be read or lacks a field.
        RequestError: The head is one of another kind, or for another model.
    """
    config = Config(read_json_object(folder / CONFIG_FILE, CheckpointError), str(folder / CONFIG_FILE))
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} cannot be read ({error})") from None
    offsets = tensors.pop("d2t", torch.zeros(0))
    tensors.pop("t2d", None)
    spec = HeadSpec(
        model_hidden=config.read(int, "hidden_size"),
        vocab_size=config.read(int, "vocab_size"),
        features=config.read_ints("eagle_aux_hidden_state_layer_ids"),
        feature_norm="each" if config.read(bool, "fc_norm", False) else "none",
        intermediate_size=config.read(int, "intermediate_size"),
        heads=config.read(int, "num_attention_heads"),
        kv_heads=config.read(int, "num_key_value_heads"),
        head_dim=config.read(int, "head_dim"),
        draft_vocab=len(offsets),
        theta=config.read(float, "rope_theta"),
        eps=config.read(float, "rms_norm_eps"),
        max_positions=config.read(int, "max_position_embeddings"),
        drafts=drafts,
    )
    problems = _problems(spec, offsets, twin)
    if not problems:
        with torch.device("meta"):
            wanted = EagleHead(spec, offsets).state_dict()
        problems = [
            f"tensor {name} is {_shape(tensors, name)}, not {list(wanted[name].shape)}"
            if name in wanted
            else f"tensor {name} is not part of it"
            for name in sorted({*wanted, *tensors})
            if name not in wanted or _shape(tensors, name) != list(wanted[name].shape)
        ]
    if problems:
        raise RequestError(
            f"{folder} cannot be trained further for this model: {'; '.join(problems)}",
            remedy="name the folder `head` of a run of this recipe with the same model",
        )
    head = EagleHead(spec, offsets + torch.arange(len(offsets)))
    head.load_state_dict({name: value.float() for name, value in tensors.items()})
    return head


def _shape(tensors: dict[str, Tensor], name: str) -> list[int] | str:
    return list(tensors[name].shape) if name in tensors else "missing"


def _problems(spec: HeadSpec, offsets: Tensor, twin: Twin) -> list[str]:
    """Return what is wrong with sizes and token ids."""
    model, found = twin.spec, list[str]()
    for what, own, wanted in (
        ("hidden_size", spec.model_hidden, model.hidden_size),
        ("vocab_size", spec.vocab_size, model.vocab_size),
    ):
        if own != wanted:
            found.append(f"{what} is {own}, and the model's {wanted}")
    if not spec.features or not all(2 <= depth < model.num_hidden_layers for depth in spec.features):
        found.append(f"its depths {list(spec.features)} are not within 2..{model.num_hidden_layers - 1}")
    least = min(spec.intermediate_size, spec.heads, spec.kv_heads, spec.head_dim)
    if least < 1 or spec.heads % max(spec.kv_heads, 1) or spec.head_dim % 2:
        found.append(f"{spec.heads} heads, {spec.kv_heads} for keys, of width {spec.head_dim} make no layer")
    if offsets.dim() != 1 or offsets.is_floating_point() or len(offsets) < 2:
        return [*found, "d2t is not a list of whole numbers"]
    ids = offsets + torch.arange(len(offsets))
    if int(ids.min()) < 0 or int(ids.max()) >= model.vocab_size or not bool((ids.diff() > 0).all()):
        found.append(f"d2t does not name ascending token ids below {model.vocab_size}")
    return found
