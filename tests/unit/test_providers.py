"""Execution providers that cannot run a bundle, or not this one, are refused with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from helpers.bad_input import Refused
from helpers.tiny_models import BASE, TinyBundles


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


@pytest.fixture
def no_driver(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is installed, and raises as soon as a session asks for it."""
    real = ort.InferenceSession

    def open_session(path: str, options: ort.SessionOptions, *, providers: list[str], **others: Any) -> object:
        if providers[0] == "CUDAExecutionProvider":
            raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected ; GPU=-1")
        return real(path, options, providers=providers, **others)

    monkeypatch.setattr(ort, "InferenceSession", open_session)


@pytest.mark.usefixtures("no_driver")
def test_a_provider_that_does_not_start_is_named_with_its_own_words(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused
) -> None:
    half = tiny_bundles.bundle(BASE, 1, dtype="float16")
    cuda = ["--provider", "cuda"]
    refused(["generate", half, "Hello", *cuda], "does not start", "no CUDA-capable device", "choose another provider")
    damaged = Path(shutil.copytree(half, tmp_path / "damaged"))
    graph = damaged / "layers-01-04.onnx"
    graph.write_bytes(b"{" * graph.stat().st_size)
    refused(["generate", damaged, "Hello", *cuda], f"{graph} cannot be loaded", "Copy the bundle again")
