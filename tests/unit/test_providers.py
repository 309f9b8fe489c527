"""Execution providers that cannot run a bundle, or not this one, are refused with what to do."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest

from helpers.bad_input import Refused


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: found)


@pytest.mark.usefixtures("gpu")
def test_a_float32_bundle_is_refused_on_cuda_with_the_command_that_makes_another(sound: Path, refused: Refused) -> None:
    refused(
        ["generate", sound, "Hello", "--provider", "cuda"],
        f"{sound} computes in float32",
        "shortstack export checkpoint-base OUT --dtype fp16",
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["TensorrtExecutionProvider", "AzureExecutionProvider"])
def test_a_provider_that_runs_no_bundle_is_refused(sound: Path, refused: Refused, name: str) -> None:
    refused(["generate", sound, "Hello", "--provider", name], f"provider '{name}' cannot run a bundle", "cpu or cuda")


@pytest.mark.usefixtures("gpu")
def test_providers_that_run_no_bundle_are_not_offered(sound: Path, refused: Refused) -> None:
    error = refused(["generate", sound, "Hello", "--provider", "rocm"], "expected one of CUDAExecutionProvider")
    assert "Azure" not in error
    assert "Tensorrt" not in error
