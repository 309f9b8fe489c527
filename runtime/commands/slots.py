"""How many sequences a command runs at once."""

from __future__ import annotations

import click

from shortstack.graphs.bundle import Bundle
from shortstack.runtime.batch.usual_slots import USUAL_SLOTS, usual_slots

slots_option = click.option(
    "--slots",
    type=int,
    metavar="N",
    help=f"How many sequences run at once.  [default: {USUAL_SLOTS}, and 1 where bundle or onnxruntime cannot]",
)


def choose_slots(bundle: Bundle, asked: int | None) -> int:
    """Return how many slots to load a bundle with: those asked for, or as many as usual, with a note if that is 1."""
    slots = usual_slots(bundle) if asked is None else asked
    if asked is None and slots == 1:
        click.echo("note: this bundle or this onnxruntime runs one sequence at a time", err=True)
    return slots
