"""The sessions of a bundle's trained drafter, opened when a text is decoded with it for the first time."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.runtime.engine.session import Device, open_graph, resolve_providers
from shortstack.threads import session_options

log = logging.getLogger(__name__)


class DrafterGraphs:
    """A drafter's graphs; they compute where the model's lowest segment does.

    Args:
        bundle: A bundle.
        providers: See :func:`~shortstack.runtime.engine.session.open_sessions`.
        threads: Likewise.

    Attributes:
        bundle: The bundle.
        device: Where the graphs compute.
    """

    def __init__(self, bundle: Bundle, providers: Sequence[str] | None, threads: int | None, device: Device) -> None:
        self.bundle = bundle
        self.device = device
        self._providers = providers
        self._threads = threads
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._has_warned = False

    def warn_of_overflow(self) -> None:
        """Log, once, that the drafter's numbers overflow, and that texts are decoded plainly from there on."""
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: the numbers of the trained drafter overflow, so texts are decoded plainly from there on; for its "
                "drafts, export it again, without fp16",
                self.bundle.folder,
            )

    def drafts(self, stage: int = 0) -> ort.InferenceSession:
        """Return the session of layers and head, or of one of its stages; errors as in :func:`open_sessions`."""
        return self._session(names.drafter_file(stage))

    def fuses(self) -> ort.InferenceSession | None:
        """Return the session that makes states from features; None where the drafter reads the final state."""
        has_it = names.FUSE_FILE in self.bundle.manifest.drafter_contracts()
        return self._session(names.FUSE_FILE) if has_it else None

    def _session(self, file: str) -> ort.InferenceSession:
        if file not in self._sessions:
            contract = self.bundle.manifest.drafter_contracts()[file]
            options = session_options(self._threads)
            self._sessions[file] = open_graph(
                self.bundle.folder / file, options, resolve_providers(self._providers), contract
            )
        return self._sessions[file]
