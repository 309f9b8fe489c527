"""A run folder belongs to one set of settings: what is found there must be what is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortstack.graphs.errors import RequestError


def check_settings(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Compare the settings of an earlier run with those of this one.

    Args:
        what: What was made, and that its settings are other ones.
        found: The earlier settings.
        wanted: Those of this call.
        remedy: What the user can do.

    Raises:
        RequestError: They differ; the message lists every setting that does.
    """
    other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if other:
        raise RequestError(
            what,
            found=", ".join(f"{name} = {found.get(name)}" for name in other),
            expected=", ".join(f"{name} = {wanted.get(name)}" for name in other),
            remedy=remedy,
        )
