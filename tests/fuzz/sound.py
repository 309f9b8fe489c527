"""The sound inputs that are damaged: each is made once, and copied for every draw."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from helpers import adapters, exit_nodes, gguf_files, megatron, quantized_folders
from helpers.families import MadeFamily
from helpers.family_rows import ROWS
from helpers.gguf_cases import CASES
from helpers.gguf_written import written
from helpers.tiny_models import CHAT_TEMPLATE, END, TURN_END, TURN_START, TinyModel
from helpers.vocabularies import byte_tokens, pieces_of, sentencepiece_model, tekken_file, tiktoken_file
from shortstack.__main__ import run
from shortstack.graphs.plan import ExitSpec

TINY = TinyModel("fuzz", layers=3, hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=8, context=256)
PROMPTS = ("Turn the light on.", "What is the time?", "Play a song of the nineties.")


@dataclass(frozen=True)
class Sound:
    """The folder of all sound inputs, and the name of each of them."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def make(self) -> int:
        """Make them all; return an exit code."""
        checkpoint = TINY.write(self["checkpoint"])
        _add_token_files(checkpoint)
        tensors = gguf_files.of_checkpoint(checkpoint, TINY.layers)
        for name in ("token_embd.weight", "output.weight"):
            tensors[name] = tensors[name][:11]  # as many as the tokenizer of `byte_level` has
        gguf_files.write(self["model.gguf"], tensors, edit=gguf_files.byte_level, tiny=TINY)
        reordered = quantized_folders.gptq(4, 32, symmetric=False, act_order=True)
        quantized_folders.write_quantized(checkpoint, self["gptq"], reordered)
        quantized_folders.write_quantized(checkpoint, self["compressed"], quantized_folders.compressed(4, 32))
        exits = (ExitSpec(1, branch="linear", linear_mlp=16), ExitSpec(2, norm="own", head="own", has_gate=True))
        exit_nodes.write_random_exits(checkpoint, self["exits"], *exits)
        embedding = ExitSpec(1, norm="none")
        twin, nodes = exit_nodes.write_random_exits(checkpoint, self["megatron-exits"], embedding)
        megatron.write(self["megatron"], twin, nodes)
        adapters.lora(self["adapter"], checkpoint)
        _add_families(self["families"], self["ggufs"])
        _add_vocabularies(checkpoint, self["vocabularies"])
        lines = [json.dumps({"prompt": text}) + "\n" for text in PROMPTS * 4]
        self["prompts.jsonl"].write_text("".join(lines), encoding="utf-8")
        quiet = ["--method", "rtn", "--no-report"]
        return run(["export", str(checkpoint), str(self["bundle"]), "-e", "1"]) or run(
            ["quantize", str(self["bundle"]), str(self["int4"]), *quiet]
        )


def _add_token_files(checkpoint: Path) -> None:
    """Write the files that say special tokens in other places than tokenizer_config.json, and a generation config."""
    marked = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    contents: dict[str, object] = {
        "special_tokens_map.json": {"eos_token": {"content": END, **marked}, "additional_special_tokens": [TURN_END]},
        "added_tokens.json": {END: 0, TURN_START: 1, TURN_END: 2},
        "generation_config.json": {"eos_token_id": [0, 2], "pad_token_id": 0, "temperature": 0.7, "do_sample": True},
    }
    for name, content in contents.items():
        (checkpoint / name).write_text(json.dumps(content), encoding="utf-8")
    path = checkpoint / "tokenizer_config.json"
    added = {str(i): {"content": text, "special": True, **marked} for i, text in enumerate((END, TURN_START, TURN_END))}
    config = json.loads(path.read_text(encoding="utf-8")) | {
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }
    path.write_text(json.dumps(config), encoding="utf-8")


def _add_families(folders: Path, files: Path) -> None:
    """Write a checkpoint of each family, and a GGUF file of each architecture of llama.cpp."""
    files.mkdir()
    for row in ROWS:
        made = MadeFamily(row, folders / "made").checkpoint
        shutil.move(made, folders / row.name.replace(" ", "-").replace(",", ""))
    (folders / "made").rmdir()
    for case in {case.architecture: case for case in reversed(CASES)}.values():
        _, file = written(case, files / "made")
        shutil.move(file, files / f"{case.architecture}.gguf")
        shutil.rmtree(files / "made")


def _add_vocabularies(checkpoint: Path, folders: Path) -> None:
    """Write checkpoints whose tokenizers are files of other libraries than tokenizers."""
    vocab = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab()
    special = (END, TURN_START, TURN_END)
    tokens = byte_tokens(vocab, special)
    contents = {
        "sentencepiece": (
            "tokenizer.model",
            sentencepiece_model(pieces_of(["\u2581", *"abcdefghij", "ab", "\u2581ab"])),
        ),
        "tiktoken": ("tokenizer.model", tiktoken_file(tokens)),
        "tekken": ("tekken.json", tekken_file(tokens, special)),
    }
    folders.mkdir()
    for name, (file, content) in contents.items():
        folder = Path(shutil.copytree(checkpoint, folders / name))
        for old in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
            (folder / old).unlink()
        end = {str(len(tokens)): {"content": END, "special": True}}
        config = {"added_tokens_decoder": end, "eos_token": END} if name == "tiktoken" else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / file).write_bytes(content)
