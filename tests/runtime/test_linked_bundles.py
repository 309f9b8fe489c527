"""Bundles whose files are links, as the hub's cache and backups keep them; and links that nothing may follow."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import shortstack
from helpers.bad_input import Refused
from shortstack.__main__ import run
from shortstack.graphs.bundle import describe_files, write_manifest
from shortstack.graphs.manifest import read_manifest

PROMPT = ["Hello", "-n", "6", "--json"]


def in_the_cache(bundle: Path, root: Path, *, blobs_elsewhere: bool) -> Path:
    """Lay a bundle out as the hub's cache does: a snapshot of links into blobs."""
    home = root / "models--org--name"
    snapshot, blobs = home / "snapshots" / "0123abcd", home / "blobs"
    snapshot.mkdir(parents=True)
    if blobs_elsewhere:
        (root / "disk").mkdir()
        blobs.symlink_to(root / "disk")
    else:
        blobs.mkdir()
    for number, file in enumerate(sorted(bundle.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


@pytest.mark.parametrize("blobs_elsewhere", [False, True])
def test_a_bundle_in_the_cache_of_the_hub_works_in_every_command(
    bundle: Path, tmp_path: Path, blobs_elsewhere: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = in_the_cache(bundle, tmp_path, blobs_elsewhere=blobs_elsewhere)
    assert run(["generate", str(bundle), *PROMPT, "--verify"]) == 0
    wanted = shortstack.load(bundle).generate("Hello", max_new_tokens=6)
    assert shortstack.load(snapshot).generate("Hello", max_new_tokens=6).tokens == wanted.tokens
    for command in (
        ["generate", str(snapshot), *PROMPT, "--verify"],
        ["inspect", str(snapshot)],
        ["quantize", str(snapshot), str(tmp_path / "out"), "--method", "rtn", "--no-report"],
        ["generate", str(tmp_path / "out"), *PROMPT, "--verify"],
    ):
        assert run(command) == 0, capsys.readouterr().err


def test_a_report_in_the_cache_replaces_links_and_leaves_blobs_alone(bundle: Path, tmp_path: Path) -> None:
    snapshot = in_the_cache(bundle, tmp_path, blobs_elsewhere=False)
    blobs = snapshot.parents[1] / "blobs"
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n' * 9, encoding="utf-8")
    quick = ["-n", "2", "--grid", "0.9", "--delta", "0.9", "--epsilon", "0.5", "-e", "1"]
    (snapshot / "exit-profile.json").symlink_to("../../blobs/profile")
    assert run(["calibrate", str(snapshot), "--data", str(prompts), *quick]) in (0, 1)
    assert not (snapshot / "exit-profile.json").is_symlink()
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before


def test_a_bundle_with_hard_links_elsewhere_can_be_quantized(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "backup", copy_function=os.link)
    options = ["--method", "rtn", "--no-report"]
    assert run(["quantize", str(bundle), str(tmp_path / "linked"), *options]) == 0
    shutil.copytree(tmp_path / "backup", tmp_path / "copy")
    assert run(["quantize", str(tmp_path / "copy"), str(tmp_path / "plain"), *options]) == 0
    for file in (tmp_path / "plain").iterdir():
        if file.name not in ("bundle.json", "quantization.json"):
            assert file.read_bytes() == (tmp_path / "linked" / file.name).read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "bundle.json"])  # onnxruntime itself refuses weights elsewhere
def test_a_link_that_leads_elsewhere_is_followed_to_the_right_content_alone(
    bundle: Path, tmp_path: Path, refused: Refused, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (bundle / name).rename(elsewhere)
    (bundle / name).symlink_to(elsewhere)
    generate = ["generate", bundle, "Hello", "-n", "2"]
    assert run([str(word) for word in generate]) == 0
    if name != "bundle.json":
        content = bytearray(elsewhere.read_bytes())
        content[len(content) // 2] ^= 1
        elsewhere.write_bytes(content)
        refused(generate, f"{name} has another sha256 than bundle.json says")


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "quantization.json"])
def test_a_file_that_bundle_json_does_not_list_is_never_read(
    bundle: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{{ a secret", encoding="utf-8")
    (bundle / name).unlink(missing_ok=True)
    (bundle / name).symlink_to(secret)
    manifest = read_manifest(bundle / "bundle.json")
    files = {file: entry for file, entry in manifest.files.items() if file != name}
    write_manifest(bundle, replace(manifest, files=files))
    for command in (
        ["generate", str(bundle), "Hello", "-n", "2", "--raw"],
        ["inspect", str(bundle)],
        ["quantize", str(bundle), str(tmp_path / "out"), "--method", "rtn", "--no-report"],
    ):
        assert run(command) == 0, capsys.readouterr().err
        assert "secret" not in capsys.readouterr().out
    assert not (tmp_path / "out" / name).is_symlink()


def test_a_graph_that_names_bytes_beyond_the_weights_is_refused(bundle: Path, tmp_path: Path, refused: Refused) -> None:
    path = bundle / "layers-01-03.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    for entry in tensor.external_data:
        if entry.key == "offset":
            entry.value = str(10**12)
    path.write_bytes(model.SerializeToString())
    write_manifest(bundle, replace(read_manifest(bundle / "bundle.json"), files=describe_files(bundle)))
    quantize = ["quantize", bundle, tmp_path / "out", "--method", "rtn", "--no-report"]
    refused(quantize, f"tensor {tensor.name}", "found bytes 1000000000000")
