"""How many sequences to run at once where nobody has said it."""

from __future__ import annotations

from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import RequestError
from shortstack.runtime.engine.session import check_packed

USUAL_SLOTS = 8


def usual_slots(bundle: Bundle) -> int:
    """Return how many slots to load a bundle with: 8, or 1 where it or onnxruntime runs one sequence at a time."""
    try:
        check_packed(bundle)
    except RequestError:
        return 1
    return USUAL_SLOTS
