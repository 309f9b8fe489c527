"""Turns a model whose layers each own their keys and values into one that shares them, as a start for uptraining.

Each consumer loses its W_K and W_V (and their biases), and a producer gets, by what is asked for::

    target    its own: what the consumers had is dropped (https://arxiv.org/abs/2405.10637, its convert_pretrained.py)
    mean      the mean over all layers that attend to it, itself among them (MLKV, https://arxiv.org/abs/2406.09297)

All other weights are copied. Heads of different layers are not aligned and each layer keeps its own norm, so a mean is
a start and no equivalent; the authors of LCKV found it usually the better one.

Layers may get sliding windows on the way: YOCO's self-decoder, or those that a string in LCKV's style marks.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import torch

from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_map import (
    complete_from,
    consumers,
    identity_kv_map,
    parse_kv_map,
    parse_layer_types,
    validate_kv_map,
)

KeysValues = Literal["mean", "target"]
_MARKED = re.compile(r"\d+s")


def parse_sharing(text: str, window: int | None, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read what a user asks for: whose K,V each layer uses, and how many positions it sees.

    ::

        yoco          with a window: the layers below the shared producer see that many positions, the others all
        0s_1s_2_2     LCKV's own strings: those marked s see a window's positions, the others all
        other maps    as in :func:`shortstack.graphs.kv_map.parse_kv_map`; no windows

    Args:
        text: The map.
        window: How many positions a sliding layer sees, its own included; None for no sliding layers.
        num_layers: L.

    Returns:
        The map, and the windows by layer; no windows if none was asked for.

    Raises:
        RequestError: It is no map, marks have no window, or the window no layer.
    """
    parts = re.split("[,_ ]+", text.strip())
    is_marked = any(_MARKED.fullmatch(part) for part in parts)
    if is_marked:
        try:
            kv_map, is_sliding = parse_layer_types("_".join(parts), num_layers)
        except ValueError as error:
            raise RequestError(f"K,V map {text!r}: {error}") from None
    else:
        kv_map = parse_kv_map(text, num_layers)
        below = complete_from(kv_map) - 1 if text.strip().lower() == "yoco" else 0
        is_sliding = tuple(layer < below for layer in range(num_layers))
    if window is None:
        if is_marked:
            raise RequestError(
                "--sliding-window is missing",
                found=f"layers marked s in --kv-map {text}",
                expected="how many positions they see",
                remedy="add --sliding-window, or leave the marks out",
            )
        return kv_map, ()
    if not any(is_sliding):
        raise RequestError(
            f"--sliding-window {window} applies to no layer of --kv-map {text}",
            expected="yoco with two layers or more, or layers marked s such as 0s_1s_2_2",
            remedy="mark the layers that are to slide, or leave --sliding-window out",
        )
    return kv_map, tuple(window if slides else 0 for slides in is_sliding)


@torch.no_grad()
def share_keys_values(
    twin: Twin, kv_map: tuple[int, ...], keys_values: KeysValues = "mean", windows: tuple[int, ...] = ()
) -> Twin:
    """Return a model with a K,V map, its weights taken from one without.

    Args:
        twin: The model, which stays as it is.
        kv_map: Whose K,V each layer is to use.
        keys_values: What a producer's W_K and W_V become.
        windows: How many positions each layer is to see, 0 for all; without any, as many as before.

    Returns:
        A new model on the same device, in evaluation mode, with the passes of the old one.

    Raises:
        RequestError: The model shares already: which of its layers own what would be lost. Or layers would share that
            have different heads or rotary embeddings.
        ValueError: The map or the windows do not fit the model.
    """
    validate_kv_map(kv_map, twin.spec.num_hidden_layers)
    if twin.spec.kv_map != identity_kv_map(twin.spec.num_hidden_layers):
        raise RequestError(
            "the model's layers share keys and values already",
            found=f"kv_map {list(twin.spec.kv_map)}",
            expected="a model in which every layer owns its K,V",
            remedy="start from the checkpoint that it was made of",
        )
    try:
        spec = replace(twin.spec.with_windows(windows or twin.spec.windows), kv_map=kv_map)
    except ValueError as error:
        raise RequestError(
            f"the model's layers cannot share keys and values like this: {error}",
            remedy="let layers share that have the same heads and rotary embedding",
        ) from None
    with torch.device("meta"):  # no time spent on random weights
        shared = Twin(spec)
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
