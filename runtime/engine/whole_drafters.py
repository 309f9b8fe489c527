"""Which class runs a bundle's trained drafter over a whole text."""

from __future__ import annotations

from collections.abc import Sequence

from shortstack.runtime.engine.assistant_rows import SharedCache
from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.whole_assistant import WholeAssistant
from shortstack.runtime.engine.whole_drafter import WholeDrafter
from shortstack.runtime.engine.whole_stages import WholeChain, WholeStages


def whole_drafter(graphs: DrafterGraphs, tokens: Sequence[int], cache: SharedCache, further: int) -> WholeDrafter:
    """Return a bundle's drafter for one text.

    Args:
        graphs: The drafter's graphs.
        tokens: The text, 2 tokens or more.
        cache: What the model left of it (:func:`~shortstack.runtime.engine.whole_text.run_for_drafter`).
        further: The most drafts of a round.

    Raises:
        ShortstackError: A graph cannot be opened; see :func:`~shortstack.runtime.engine.session.open_sessions`.
    """
    drafter = graphs.bundle.manifest.plan.drafter
    assert drafter is not None, "the bundle has no drafter"
    if drafter.shared:
        return WholeAssistant(graphs, tokens, cache)
    return WholeStages(graphs, tokens) if drafter.layer_per_draft else WholeChain(graphs, tokens, further)
