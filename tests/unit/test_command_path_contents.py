"""What advice on wrong paths reads out of files: depths, trained exits, and the checkpoint of a bundle; in bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command_paths import Says, make_folder
from shortstack.graphs.path_kind import bundle_name
from shortstack.samples.fetch_model import MEMBER


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder("smol-bundle", "bundle.json", "weights.data")
    make_folder("smol", "config.json", "model.safetensors")
    Path("my model.gguf").touch()


@pytest.mark.parametrize(
    ("config", "depth"),
    [
        ('{"model_type": "llama", "num_hidden_layers": 30}', "7"),
        ('{"model_type": "llama", "num_hidden_layers": 8}', "2"),
        ('{"model_type": "llama", "num_hidden_layers": 2}', "1"),
        ('{"model_type": "llama", "num_hidden_layers": 1}', "E"),
        ('{"model_type": "llama", "num_hidden_layers": "8"}', "E"),
        ('{"model_type": "llama", "num_hidden_layers": true}', "E"),
        ('{"model_type": "llama", "num_hidden_layers": 8, "kv_map": [0, 1, 7, 7, 7, 7, 7, 7]}', "E"),
        ('{"model_type": "opt-llama", "num_hidden_layers": 8}', "E"),
        ('{"num_hidden_layers": 8}', "E"),
        ("[8]", "E"),
        ("{", "E"),
        ("\0", "E"),
    ],
)
def test_the_depth_of_an_exit_is_a_quarter_of_the_layers_or_left_open(says: Says, config: str, depth: str) -> None:
    make_folder("new", "model.safetensors")
    Path("new", "config.json").write_text(config, encoding="utf-8")
    expected = (
        f"Run: shortstack export new new-bundle --exit-layer {depth} && shortstack generate new-bundle Hi --compare"
    )
    assert says("generate", "new", "Hi", "--compare").endswith(expected)


def test_only_the_default_model_has_a_known_depth_among_gguf_files(says: Says) -> None:
    default = Path(MEMBER).name
    Path(default).touch()
    assert f"{bundle_name(default)} --exit-layer 8 && " in says("calibrate", default, "--data", "x")
    assert " --exit-layer E && " in says("calibrate", "my model.gguf", "--data", "x")


@pytest.mark.parametrize(
    ("options", "exits"),
    [
        (["--compare"], " --exits new"),
        (["--compare", "-e", "4"], " --exits new"),
        (["--compare", "-e", "3"], " --exit-layer 3"),
        (["--strategy", "early-exit", "-e", "4", "-e", "3"], " --exits new --exit-layer 3"),
        ([], ""),
    ],
)
def test_trained_exits_in_the_checkpoint_are_used_where_an_exit_is_needed(
    says: Says, options: list[str], exits: str
) -> None:
    make_folder("new", "config.json")
    Path("new", "exits.json").write_text('{"exits": [{"exit_layer": 2}, {"exit_layer": 4}]}', encoding="utf-8")
    assert f"Run: shortstack export new new-bundle{exits} && shortstack generate" in says(
        "generate", "new", "Hi", *options
    )


@pytest.mark.parametrize(
    ("source", "found"),
    [("smol", "smol"), ("my model.gguf + adapter", "'my model.gguf'"), ("org/name", "org/name")],
)
def test_a_bundle_tells_which_checkpoint_it_was_made_from(says: Says, source: str, found: str) -> None:
    Path("smol-bundle", "bundle.json").write_text(json.dumps({"source": {"name": source}}), encoding="utf-8")
    assert says("parity", "smol-bundle", "smol-bundle").endswith(f". Run: shortstack parity {found} smol-bundle")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("bundle.json", ["export", "{folder}", "{folder}-out"]),
        ("config.json", ["generate", "{folder}", "Hello", "--strategy", "self-speculative"]),
    ],
)
def test_a_pipe_in_place_of_a_file_is_never_waited_for(tmp_path: Path, name: str, command: list[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    os.mkfifo(folder / name)
    filled = [part.replace("{folder}", str(folder)) for part in command]
    done = subprocess.run(
        [sys.executable, "-m", "shortstack", *filled], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
