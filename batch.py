"""Public names for batches on several machines, see docs/batches.md. Importing it does not import ray."""

from __future__ import annotations

from shortstack.runtime.workers.ray_generator import RayGenerator

__all__ = ["RayGenerator"]
