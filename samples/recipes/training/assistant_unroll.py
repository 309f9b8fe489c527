"""The training-time test of an assistant: it runs on its own states, as in decoding, over texts that are known.

All drafts of a round stand at the position of the text's newest token, T - 1, and see the model's keys and values of
the positions before it, 0 to T - 2: :mod:`shortstack.runtime.engine.assistant_rows` draws it. Row p pairs the state at
p with x[p+1], so a round that begins at row p has T = p + 2. Step 0 runs the rows of a window as first drafts. Step j
runs the same rows as the j-th further draft of rounds that began j rows before, and takes what step j - 1 gave for row
p - 1 as its state::

    row p of step j    begins at row p-j: stands at p-j+1, sees positions 0 ... p-j, reads token x[p+1]

So nothing of a chain is seen but its state, and the window of positions moves back by one with every step. A layer that
reads one that slides sees the last positions of these, as many as its window is wide. All steps of a row draft the same
token x[p+2].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shortstack.export.twin.layer import KeyValue, Layer, Rotary
from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.assistant_head import Assistant
from shortstack.samples.recipes.training.drafter_batches import DraftBatch
from shortstack.samples.recipes.training.eagle_unroll import moved


def unroll(assistant: Assistant, twin: Twin, batch: DraftBatch, steps: int) -> Iterator[Tensor]:
    """Yield what each step gives for the window's rows: y, float [texts, window, hidden].

    The first j rows of step j begin in the prompt and mean nothing.

    Args:
        assistant: The assistant.
        twin: The model.
        batch: Some texts, with the residual stream at the depths of :attr:`AssistantSpec.depths`.
        steps: How many steps.
    """
    spec, seq = assistant.spec, batch.places.shape[1]
    tables = twin.rotaries(batch.places.new_empty(1, seq + 1))
    kept = model_key_values(twin, batch, spec.depths)
    with torch.no_grad():
        tokens, state = twin.embedded(batch.next_ids[batch.window]), twin.state(batch.before)
    positions, columns = batch.positions[batch.window], torch.arange(seq)
    for step in range(steps):
        # Rows that mean nothing, and padding, see position 0: a softmax over nothing is not a number.
        last = (positions - step).clamp(min=0)  # [texts, window]
        rotaries = [Rotary(t.cos[last + 1][:, None], t.sin[last + 1][:, None], last + 1) for t in tables]
        distance = last[..., None] - columns  # [texts, window, seq]
        seen = {window: (distance >= 0) & (distance < (window or seq)) for window in set(spec.windows)}
        read, masks = [kept[layer] for layer in spec.kv_layers], [seen[window] for window in spec.windows]
        y = assistant(assistant.pair(tokens, state), read, masks, rotaries)
        yield y
        state = moved(assistant.state(y), 1)


@torch.no_grad()
def model_key_values(twin: Twin, batch: DraftBatch, layers: tuple[int, ...]) -> dict[int, KeyValue]:
    """Return the model's keys and values of some layers, by layer, [texts, kv_heads, seq, head_dim] each.

    They are one norm and two products away from the residual stream below the layer, so they are not kept on disk.

    Args:
        twin: The model.
        batch: Some texts; its features are the stream below these layers.
        layers: Which, in the order of the features.
    """
    rotaries, found = twin.rotaries(batch.places), dict[int, KeyValue]()
    for number, index in enumerate(layers):
        layer = twin.model.layers[index]
        assert isinstance(layer, Layer)
        stream = batch.features[:, number][batch.places]  # [texts, seq, model hidden]
        found[index] = layer.self_attn.key_value(layer.input_layernorm(stream), rotaries)
    return found
