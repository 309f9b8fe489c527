"""A bundle with its graphs open, ready to be run by a stack, a calibration or a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnxruntime as ort

from shortstack.graphs.bundle import Bundle
from shortstack.graphs.contract import cache_heads
from shortstack.graphs.errors import RequestError
from shortstack.graphs.names import CacheOwner
from shortstack.runtime.engine.cache import CachePlace, KVCache
from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.session import Device, Placement, open_sessions
from shortstack.runtime.engine.slot_cache import SlotCache


@dataclass(frozen=True, slots=True)
class OpenGraphs:
    """One session per segment of a bundle.

    Attributes:
        bundle: The bundle.
        sessions: Its graphs, bottom to top.
        devices: Where each graph's cache lives.
        is_packed: They are in the form of several sequences.
        drafter: The graphs of a trained drafter; None without one.
    """

    bundle: Bundle
    sessions: tuple[ort.InferenceSession, ...]
    devices: tuple[Device, ...]
    is_packed: bool = False
    drafter: DrafterGraphs | None = None

    def new_cache(self, max_length: int) -> KVCache:
        """Return a cache for one sequence of at most ``max_length`` positions; it has no room until it is reserved."""
        return KVCache(self._owners(), max_length)

    def new_slots(self, slots: int, most_rows: int) -> SlotCache:
        """Return a cache for several sequences, each as long as the context; see :class:`SlotCache`."""
        return SlotCache(self._owners(), slots, self.bundle.manifest.max_length, most_rows)

    def _owners(self) -> dict[CacheOwner, CachePlace]:
        manifest = self.bundle.manifest
        return {
            owner: CachePlace(cache_type, self.devices[segment.index], *cache_heads(manifest.spec, owner))
            for segment in manifest.plan.segments
            for owner, cache_type in manifest.cache_types(segment).items()
        }


def open_graphs(
    bundle: Bundle,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    upper: Placement | None = None,
    *,
    is_packed: bool = False,
) -> OpenGraphs:
    """Open a bundle's graphs; see :func:`~shortstack.runtime.engine.session.open_sessions` for arguments and errors."""
    sessions, devices = open_sessions(bundle, providers, threads, upper, is_packed=is_packed)
    drafter = None
    if bundle.manifest.plan.drafter is not None:
        device = _drafter_device(bundle, devices)
        wanted = providers if upper is None or device == devices[0] else upper.providers
        drafter = DrafterGraphs(bundle, wanted, threads, device)
    return OpenGraphs(bundle, tuple(sessions), tuple(devices), is_packed, drafter)


def _drafter_device(bundle: Bundle, devices: Sequence[Device]) -> Device:
    """Return where a drafter computes: where the caches are that it reads, or where the lowest segment does.

    Raises:
        RequestError: The caches are on several devices.
    """
    plan = bundle.manifest.plan
    assert plan.drafter is not None
    owners = plan.drafter.shared
    found = {devices[segment.index] for segment in plan.segments for j in owners if segment.start <= j < segment.end}
    if len(found) > 1:
        raise RequestError(
            f"the drafter of {bundle.folder} reads caches on several devices",
            found=", ".join(sorted(device.kind for device in found)),
            expected="one",
            remedy="let all segments compute on one device",
        )
    return next(iter(found), devices[0])
