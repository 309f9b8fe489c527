"""Bundles and prompts with which decoding by lookup is tested."""

from __future__ import annotations

import random
from pathlib import Path

from helpers.quantized import QuantizedBundles, preset
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.graphs.precision import BlockFormat

BUNDLES = ("float", "float, uncut", "int4", "int4 with an int8 cache", "int4 with an int8 cache, uncut")
"""The bundles of :func:`bundles`."""


def bundles(tiny_bundles: TinyBundles, quantized: QuantizedBundles) -> dict[str, Path]:
    """Return a tiny model in every kind of cache, cut and uncut."""
    cut, uncut = tiny_bundles.bundle(SPECULATOR, 1, 3), tiny_bundles.bundle(SPECULATOR)
    return {
        "float": cut,
        "float, uncut": uncut,
        "int4": quantized(cut, preset(BlockFormat(4))),
        "int4 with an int8 cache": quantized(cut, preset(BlockFormat(4), "int8")),
        "int4 with an int8 cache, uncut": quantized(uncut, preset(BlockFormat(4), "int8")),
    }


def prompts(count: int) -> list[list[int]]:
    """Return prompts of random tokens in which pieces come twice, so that lookup finds something, right or wrong."""
    rng = random.Random(3)
    found = []
    for _ in range(count):
        words = [[rng.randrange(3, SPECULATOR.vocab) for _ in range(3)] for _ in range(4)]
        found.append([token for _ in range(rng.randint(2, 9)) for token in rng.choice(words)])
    return found
