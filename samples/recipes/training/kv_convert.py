"""Turns a model whose layers each own their keys and values into one that shares them, as a start for uptraining.

Each consumer loses its W_K and W_V (and their biases), and a producer gets, by what is asked for::

    target    its own: what the consumers had is dropped (https://arxiv.org/abs/2405.10637, its convert_pretrained.py)
    mean      the mean over all layers that attend to it, itself among them (MLKV, https://arxiv.org/abs/2406.09297)

All other weights are copied. Heads of different layers are not aligned and each layer keeps its own norm, so a mean is
a start and no equivalent; the authors of LCKV found it usually the better one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_map import consumers, identity_kv_map, validate_kv_map

KeysValues = Literal["mean", "target"]


@torch.no_grad()
def share_keys_values(twin: Twin, kv_map: tuple[int, ...], keys_values: KeysValues = "mean") -> Twin:
    """Return a model with a K,V map, its weights taken from one without.

    Args:
        twin: The model, which stays as it is.
        kv_map: Whose K,V each layer is to use.
        keys_values: What a producer's W_K and W_V become.

    Returns:
        A new model on the same device, in evaluation mode, with the passes of the old one.

    Raises:
        RequestError: The model shares already: which of its layers own what would be lost.
        ValueError: The map does not fit the model.
    """
    validate_kv_map(kv_map, twin.spec.num_hidden_layers)
    if twin.spec.kv_map != identity_kv_map(twin.spec.num_hidden_layers):
        raise RequestError(
            "the model's layers share keys and values already",
            found=f"kv_map {list(twin.spec.kv_map)}",
            expected="a model in which every layer owns its K,V",
            remedy="start from the checkpoint that it was made of",
        )
    with torch.device("meta"):  # no time spent on random weights
        shared = Twin(replace(twin.spec, kv_map=kv_map))
    shared = shared.to_empty(device=twin.head_weight.device)
    shared.rope_factors = twin.rope_factors
    shared.passes = twin.passes
    before = twin.state_dict()
    after = {name: before[name].clone() for name in shared.state_dict()}
    if keys_values == "mean":
        for name in after:
            place = name.split(".")  # model.layers.3.self_attn.k_proj.weight
            if place[-2] in ("k_proj", "v_proj"):
                producer = int(place[2])
                users = (producer, *consumers(kv_map, producer))
                alike = [before[".".join([*place[:2], str(user), *place[3:]])] for user in users]
                after[name] = torch.stack(alike).mean(0)
    shared.load_state_dict(after)
    return shared.eval()
