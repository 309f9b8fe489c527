"""Reads trained drafters: the small networks that published checkpoints bring along to draft for a model.

Each kind is one file that turns a config and tensor names into a :class:`~.drafter.DrafterSource`; what a drafter is,
is data (:mod:`shortstack.graphs.drafter_spec`).
"""

from __future__ import annotations

from pathlib import Path

from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.checkpoint import Checkpoint
from shortstack.export.drafters.assistant import is_assistant, read_assistant
from shortstack.export.drafters.drafter import Drafter, ModelOfDrafter
from shortstack.export.drafters.eagle import read_eagle
from shortstack.export.drafters.eagle3 import is_eagle3, read_eagle3
from shortstack.export.drafters.mtp import read_mtp
from shortstack.export.spec import OWN_DRAFTER
from shortstack.graphs.errors import CheckpointError

__all__ = ["Drafter", "ModelOfDrafter", "open_drafter"]


def open_drafter(
    source: str, model: ModelOfDrafter, *, follow_links: bool = False, allow_pickle: bool = False
) -> Drafter:
    """Open a drafter and check it against its model, without reading its weights.

    Args:
        source: A folder, a GGUF file or a hub id; :data:`OWN_DRAFTER` for the layers that the model's own checkpoint
            has.
        model: The model.
        follow_links: See :func:`open_checkpoint`.
        allow_pickle: See :func:`open_checkpoint`.

    Raises:
        CheckpointError: It cannot be read, or does not fit the model; lists all that does not.
        UnsupportedError: It is of a kind that this version cannot export.
    """
    if source == OWN_DRAFTER:
        return read_mtp(model)
    checkpoint = _open_gguf(source) or open_checkpoint(source, follow_links=follow_links, allow_pickle=allow_pickle)
    if is_assistant(checkpoint):
        return read_assistant(checkpoint, model)
    _check_has_tensors(checkpoint)
    return read_eagle3(checkpoint, model) if is_eagle3(checkpoint) else read_eagle(checkpoint, model)


def _open_gguf(source: str) -> Checkpoint | None:
    """Open a GGUF file of a drafter; None if the name is none of such a file."""
    path = Path(source)
    if path.suffix.lower() != ".gguf" or not path.expanduser().is_file():
        return None
    from shortstack.export.checkpoint.gguf_eagle3 import open_gguf_drafter

    return open_gguf_drafter(path.expanduser(), source)


def _check_has_tensors(checkpoint: Checkpoint) -> None:
    present = checkpoint.names()
    if "fc.weight" not in present:
        some = ", ".join(sorted(present)[:3])
        raise CheckpointError(
            f"{checkpoint.source} is no drafter that this version knows: it has no tensor fc.weight",
            found=f"tensors such as {some}",
            expected="an EAGLE, EAGLE-2 or EAGLE-3 head, as EAGLE or speculators saves it, or an assistant of Gemma 4",
            remedy=f"name the drafter's folder, or --drafter {OWN_DRAFTER} for layers in the model's own checkpoint",
        )
