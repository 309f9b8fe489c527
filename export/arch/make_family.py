"""From the table of a family to what the exporter asks for."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType

from shortstack.export.arch.architecture import Architecture
from shortstack.export.arch.family import Family
from shortstack.export.arch.read_family import read_family
from shortstack.export.arch.write_family import write_family


def architecture(family: Family) -> Architecture:
    """Return the family as an :class:`Architecture`."""
    return Architecture(
        model_type=family.model_type,
        read_spec=partial(read_family, family),
        write_config=partial(write_family, family),
        sources=MappingProxyType(dict(family.sources)),
        prefixes=family.prefixes,
        rope_pairs=family.rope_pairs,
        is_in_transformers=family.is_in_transformers,
    )
