"""From the table of a family to what the exporter asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

from shortstack.export.arch.architecture import Architecture
from shortstack.export.arch.family import Family
from shortstack.export.arch.own_sharing import with_own_sharing
from shortstack.export.arch.read_family import read_family
from shortstack.export.arch.write_family import write_family
from shortstack.graphs.spec import ModelSpec


def architecture(family: Family, write_config: Callable[[ModelSpec], dict[str, Any]] | None = None) -> Architecture:
    """Return the family as an :class:`Architecture`; ``write_config`` replaces what its table would write."""
    found = Architecture(
        model_type=family.model_type,
        read_spec=partial(read_family, family),
        write_config=write_config or partial(write_family, family),
        sources=MappingProxyType(dict(family.sources)),
        prefixes=family.prefixes,
        rope_pairs=family.rope_pairs,
        is_in_transformers=family.is_in_transformers,
    )
    return found if family.reads_sharing else with_own_sharing(found)
