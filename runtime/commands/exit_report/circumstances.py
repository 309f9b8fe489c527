"""When, where and with what the report's figures were measured: without that, a speed says nothing."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import UTC, datetime

import onnxruntime as ort

from shortstack import __version__
from shortstack.graphs.manifest import Manifest
from shortstack.runtime.calibration.profile import precision_words
from shortstack.runtime.commands.machine import processor
from shortstack.threads import common_threads


@dataclass(frozen=True, slots=True)
class Circumstances:
    """See the attributes.

    Attributes:
        made_at: When the report was made, in UTC.
        versions: Package to version.
        system: The operating system and the architecture.
        processor: The processor's name.
        threads: Of the pool that all graphs share; None where each graph has a pool of its own.
        weights_sha256: The identity of the bundle's weights.
        precision: How they are stored, in words.
    """

    made_at: datetime
    versions: dict[str, str]
    system: str
    processor: str
    threads: int | None
    weights_sha256: str
    precision: str


def find_circumstances(manifest: Manifest) -> Circumstances:
    """Ask the process and the machine.

    Args:
        manifest: Of the bundle that was measured.
    """
    return Circumstances(
        made_at=datetime.now(UTC),
        versions={
            "shortstack": __version__,
            "onnxruntime": ort.__version__,
            "Python": platform.python_version(),
        },
        system=f"{platform.system()} {platform.machine()}",
        processor=processor()[0],
        threads=common_threads(),
        weights_sha256=manifest.weights_sha256,
        precision=precision_words(manifest),
    )
