"""Exit depths in a terminal: a colour per depth, from green (shallow) to orange (deep), and a legend in the same.

The colours are of middle brightness, at least 3:1 against black and against white. What the whole model decided has
the terminal's own colour. Where there are no colours (a file, NO_COLOR), the depth follows in brackets after each
token that left early: ``the[4] cat[8] sat``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from shortstack.runtime.decode.stream import Token

_COLOURS = (28, 30, 32, 98, 133, 166)  # of the 256: green, teal, blue, violet, magenta, orange


@dataclass(frozen=True, slots=True)
class DepthCount:
    """Tokens of one depth.

    Attributes:
        depth: Layers run before the head that named them.
        tokens: How many.
        mean_confidence: Mean probability that this head gave its most likely token.
    """

    depth: int
    tokens: int
    mean_confidence: float


def count_depths(tokens: Sequence[Token]) -> list[DepthCount]:
    """Return how many tokens were named at each depth, shallow first."""
    confidences: dict[int, list[float]] = {}
    for token in tokens:
        confidences.setdefault(token.exit_layer, []).append(token.confidence)
    return [DepthCount(depth, len(each), sum(each) / len(each)) for depth, each in sorted(confidences.items())]


def bucket_of(depth: int, exit_layers: Sequence[int], buckets: int = len(_COLOURS)) -> int | None:
    """Return which of so many colours an exit has, 0 for the shallowest; None for the final head."""
    if depth not in exit_layers:
        return None
    rank = sorted(exit_layers).index(depth)
    return rank if len(exit_layers) <= buckets else rank * buckets // len(exit_layers)


@dataclass(frozen=True, slots=True)
class DepthMarks:
    """How the depths of one bundle are marked.

    Attributes:
        exit_layers: The bundle's exits.
        layers: Layers of the whole model.
        is_coloured: Whether there are colours.
    """

    exit_layers: tuple[int, ...]
    layers: int
    is_coloured: bool

    def mark(self, text: str, depth: int) -> str:
        """Return a token's text, marked."""
        bucket = bucket_of(depth, self.exit_layers)
        if bucket is None:
            return text
        if self.is_coloured:
            return click.style(text, fg=_COLOURS[bucket])
        body = text.rstrip()
        return f"{body}[{depth}]{text[len(body) :]}"

    def legend(self, tokens: Sequence[Token]) -> str:
        """Return a line per depth: how many tokens, which share, how sure the head was."""
        lines = []
        for count in count_depths(tokens):
            layers = f"{count.depth} layer{'s' if count.depth != 1 else ''}"
            words = f"all {layers}" if count.depth == self.layers else f"after {layers}"
            name = f"{words:<16}"
            bucket = bucket_of(count.depth, self.exit_layers)
            if self.is_coloured:
                name = f"■ {name}" if bucket is None else click.style(f"■ {name}", fg=_COLOURS[bucket])
            noun = "token " if count.tokens == 1 else "tokens"
            share = count.tokens / len(tokens)
            lines.append(f"{name}{count.tokens:>6} {noun} {share:>6.1%}   mean confidence {count.mean_confidence:.2f}")
        return "\n".join(lines)
