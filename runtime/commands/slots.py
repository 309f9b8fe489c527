"""How many sequences a command runs at once."""

from __future__ import annotations

import click
import onnxruntime as ort

from shortstack.graphs.bundle import Bundle
from shortstack.graphs.packing import LEAST_ONNXRUNTIME, can_pack
from shortstack.runtime.batch.many import USUAL_SLOTS

slots_option = click.option(
    "--slots",
    type=int,
    metavar="N",
    help=f"How many sequences run at once.  [default: {USUAL_SLOTS}, and 1 where bundle or onnxruntime cannot]",
)


def usual_slots(bundle: Bundle, asked: int | None) -> int:
    """Return how many slots to load a bundle with: those asked for, or as many as it can have up to a usual number."""
    if asked is not None:
        return asked
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if can_pack(bundle.manifest.spec) and bundle.manifest.has_packed_form and version >= LEAST_ONNXRUNTIME:
        return USUAL_SLOTS
    click.echo("note: this bundle or this onnxruntime runs one sequence at a time", err=True)
    return 1
