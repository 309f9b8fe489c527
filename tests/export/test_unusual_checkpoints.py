"""Checkpoints that transformers reads although they are unusual: they export, load, and decode as transformers does."""

from __future__ import annotations

import codecs
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shortstack
from helpers.bad_input import edit_json
from helpers.tiny_models import BASE, SWITCHES, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.twin.folder import load_twin

TIED = next(tiny for tiny in SWITCHES if tiny.name == "tied")
IDS = [5, 71, 33, 140, 9]
TOKENS = 12


def greedy(folder: Path) -> list[int]:
    """The greedy continuation by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = torch.tensor([IDS])
    with torch.no_grad():
        for _ in range(TOKENS):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    found: list[int] = text[0, len(IDS) :].tolist()
    return found


def exported(checkpoint: Path, out: Path) -> list[int]:
    """The greedy continuation by the bundle, after a chat that shows that its tokenizer loads."""
    assert run(["export", str(checkpoint), str(out), "-e", "1"]) == 0
    assert run(["generate", str(out), "Hello", "-n", "1"]) == 0
    with shortstack.load(out) as model:
        return list(model.generate(IDS, max_new_tokens=TOKENS, ignore_eos=True).tokens)


def copy_of(tiny_bundles: TinyBundles, tiny: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles.checkpoint(tiny), tmp_path / "checkpoint"))


def test_a_tied_model_may_hold_its_one_matrix_as_the_lm_head(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    checkpoint = copy_of(tiny_bundles, TIED, tmp_path)
    before = greedy(checkpoint)
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert greedy(checkpoint) == before
    assert exported(checkpoint, tmp_path / "out") == before
    twin = load_twin(str(checkpoint)).eval()
    with torch.no_grad():
        assert twin(torch.tensor([IDS]))[0, -1].argmax().item() == before[0]


@pytest.mark.parametrize("field", ["pad_token_id", "eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_token_id_of_minus_one_means_none(tiny_bundles: TinyBundles, tmp_path: Path, field: str, file: str) -> None:
    checkpoint = copy_of(tiny_bundles, BASE, tmp_path)
    if file == "config.json":
        (checkpoint / "generation_config.json").unlink()
    edit_json(checkpoint / file, **{field: -1})
    assert exported(checkpoint, tmp_path / "out") == greedy(checkpoint)


ENCODED: dict[str, Callable[[str], bytes]] = {
    "utf-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16": lambda text: text.encode("utf-16"),
}


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_text_file_may_begin_with_a_byte_order_mark(
    tiny_bundles: TinyBundles, tmp_path: Path, name: str, encoding: str
) -> None:
    checkpoint = copy_of(tiny_bundles, BASE, tmp_path)
    wanted = greedy(checkpoint)
    path = checkpoint / name
    if name == "chat_template.jinja":
        template = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
        path.write_text(template, encoding="utf-8")
    path.write_bytes(ENCODED[encoding](path.read_text(encoding="utf-8")))
    assert exported(checkpoint, tmp_path / "out") == wanted
    for file in (tmp_path / "out").glob("*.j*"):
        assert not file.read_bytes().startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE)), file


@pytest.mark.parametrize(
    "fields",
    [{"eos_token": 1e-300}, {"bos_token": []}, {"pad_token": {"content": 3}}, {"unk_token": [{"a": {"b": [1]}}]}],
    ids=str,
)
def test_a_tokenizer_config_that_the_runtime_would_refuse_is_refused_at_export(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, object]
) -> None:
    checkpoint = copy_of(tiny_bundles, BASE, tmp_path)
    edit_json(checkpoint / "tokenizer_config.json", **fields)
    assert run(["export", str(checkpoint), str(tmp_path / "out"), "-e", "1"]) == 2
    error = capsys.readouterr().err
    assert f"would become a bundle that does not load: tokenizer_config.json, field {next(iter(fields))}" in error
    assert error.endswith("Mend the file in the checkpoint.\n")
    assert not (tmp_path / "out").exists()


def test_checking_the_tokenizer_needs_no_onnxruntime() -> None:
    code = "import sys; import shortstack.export.text_files; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
