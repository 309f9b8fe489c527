"""The folder of a trained assistant, in the format of docs/drafters.md, which ``export --drafter`` reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from shortstack.export.drafters import Drafter, ModelOfDrafter, open_drafter
from shortstack.graphs.drafter_weights import HEAD, HEAD_IDS
from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import ModelSpec
from shortstack.samples.recipes.training.assistant_head import Assistant, AssistantSpec
from shortstack.samples.recipes.training.drafter_files import trained_tensors, write_drafter_files


def write_assistant(assistant: Assistant, folder: Path) -> None:
    """Write an assistant; one that is there is replaced."""
    write_drafter_files(folder, assistant.spec.to_json(), trained_tensors(assistant, assistant.ids))


def read_assistant(folder: Path, model: ModelOfDrafter) -> Assistant:
    """Read an assistant that :func:`write_assistant` wrote, to train it further.

    Args:
        folder: The assistant.
        model: The model that it drafts for.

    Raises:
        CheckpointError: It cannot be read, or does not fit the model.
        RequestError: It is a drafter of another kind.
    """
    drafter = open_drafter(str(folder), model)
    spec = _trained_spec(drafter, model.spec)
    if spec is None:
        raise RequestError(
            f"{folder} cannot be trained further",
            found="a drafter of another kind",
            expected="an assistant that this recipe trained: Qwen3's layers, two norms in front, a trimmed head",
            remedy="name the folder `assistant` of a run of this recipe",
        )
    assistant = Assistant(spec, torch.from_numpy(drafter.part(HEAD_IDS)).long())
    tensors = {name: torch.from_numpy(drafter.checkpoint.tensor(name)) for name in assistant.state_dict()}
    tensors["lm_head.weight"] = torch.from_numpy(drafter.part(HEAD))  # rows in the order of their ids
    assistant.load_state_dict(tensors)
    return assistant


def _trained_spec(drafter: Drafter, model: ModelSpec) -> AssistantSpec | None:
    """Return what an opened drafter is, if it is one of this recipe's."""
    found = drafter.spec
    if not found.shared or not found.state_size or found.draft_vocab is None:
        return None
    first = found.layers[0].attention
    spec = AssistantSpec(
        model_hidden=found.state_size,
        vocab_size=model.vocab_size,
        kv_layers=found.shared,
        hidden_size=found.hidden_size,
        intermediate_size=found.layers[0].mlp.width,
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        ropes=tuple(layer.attention.rope for layer in found.layers),
        windows=tuple(max(layer.attention.window - 1, 0) for layer in found.layers),
        draft_vocab=found.draft_vocab,
        eps=found.norm.eps,
        max_positions=model.max_position_embeddings,
    )
    # A drafter's window counts the newest position, too.
    layers = [spec.layer(number) for number in range(len(found.layers))]
    layers = [
        replace(layer, attention=replace(layer.attention, window=window + 1 if window else 0))
        for layer, window in zip(layers, spec.windows, strict=True)
    ]
    is_ours = tuple(layers) == found.layers and found.has_token_norm and found.has_state_norm
    return spec if is_ours else None
