"""SmolLM2-135M-Instruct in float32, loaded once for the files here."""

from __future__ import annotations

from pathlib import Path

import pytest

from shortstack.runtime import Model, load


@pytest.fixture(scope="session")
def model(smollm2_bundle: Path) -> Model:
    return load(smollm2_bundle)
