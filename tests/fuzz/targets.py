"""What is damaged, and the command that then runs on it.

An input is one folder: ``in``, or ``in.SUFFIX``, is the damaged copy; the command may leave ``out`` and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fuzz import oracle, templates
from fuzz.damage import HUGE_BYTES, damage_bytes, damage_file, damage_json, damage_value
from fuzz.sound import Sound

Damage = Callable[[random.Random, Path], str]
"""Damages the copy and says what was done."""

Commands = Callable[[random.Random, Sound, Path], list[str]]
"""Returns the command line for a damaged copy."""


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        sound: The name of the sound input, or of a folder of which each draw takes one.
        damage: Damages a copy of it.
        command: The command line.
        is_right: Returns what is wrong after the command has succeeded, or why the result is right.
    """

    sound: str
    damage: Damage
    command: Commands
    is_right: oracle.Oracle
    is_one_of: bool = False


def _any_file(rng: random.Random, copy: Path) -> str:
    """Damage any file of a folder: mostly JSON files by value, sometimes a file as such, otherwise its bytes."""
    path = rng.choice(sorted(p for p in copy.rglob("*") if p.is_file()))
    if rng.randrange(8) == 0:
        return f"{path.name} is {damage_file(rng, path, copy.parent)}"
    if path.suffix == ".json":
        damage_json(rng, path)
    elif path.suffix == ".safetensors" and rng.randrange(2):
        _damage_safetensors_header(rng, path)
    else:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    return path.name


def _json_file(*names: str) -> Damage:
    """Damage one of these JSON files."""

    def damage(rng: random.Random, copy: Path) -> str:
        path = copy / rng.choice(names)
        damage_json(rng, path)
        return path.name

    return damage


def _damage_safetensors_header(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(damage_value(rng, json.loads(data[8 : 8 + size]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


def _sealed_bundle(rng: random.Random, copy: Path) -> str:
    """Damage a bundle and then write the sizes, hashes and digest that fit, as someone who means harm would."""
    manifest = copy / "bundle.json"
    said = _any_file(rng, copy)
    if not _can_be_read(manifest):
        return said
    try:
        data = json.loads(manifest.read_bytes())
        for name, entry in data["files"].items():
            file = copy / name
            if not _can_be_read(file):
                continue
            content = file.read_bytes()
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        body = {key: value for key, value in data.items() if key != "digest"}
        data["digest"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        manifest.write_text(json.dumps(data, indent=2), encoding="utf-8")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{said}, left unsealed"
    return f"{said}, sealed"


def _can_be_read(path: Path) -> bool:
    """Whether a damaged file is a regular one and of a usual size."""
    return path.is_file() and path.stat().st_size < HUGE_BYTES


def _one_file(rng: random.Random, copy: Path) -> str:
    """Damage an input that is one file, near its start as often as anywhere."""
    if rng.randrange(12) == 0:
        return damage_file(rng, copy, copy.parent, is_text=copy.suffix == ".jsonl")
    data = copy.read_bytes()
    start = min(len(data), rng.choice((4096, len(data))))
    copy.write_bytes(damage_bytes(rng, data[:start]) + data[start:])
    return copy.name


def _template(rng: random.Random, copy: Path) -> str:
    """Give a checkpoint another chat template, in one of the places where templates are."""
    text = templates.draw(rng)
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if rng.randrange(2):
        del config["chat_template"]
        (copy / "chat_template.jinja").write_text(text, encoding="utf-8", errors="replace")
    else:
        config["chat_template"] = text
    path.write_text(json.dumps(config), encoding="utf-8")
    return text


def _vocabulary(rng: random.Random, copy: Path) -> str:
    """Damage the file of another library's vocabulary, mostly, or the config of the tokenizer beside it."""
    path = rng.choice([file for file in sorted(copy.iterdir()) if file.name.startswith(("tokenizer", "tekken"))])
    if rng.randrange(10) == 0:
        return f"{path.name} is {damage_file(rng, path, copy.parent)}"
    if path.suffix == ".json":
        damage_json(rng, path)
    elif rng.randrange(3) == 0 and (lines := path.read_bytes().splitlines(keepends=True))[0].endswith(b" 0\n"):
        path.write_bytes(_damage_lines(rng, lines))
    else:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    return path.name


def _damage_lines(rng: random.Random, lines: list[bytes]) -> bytes:
    """Exchange, repeat, remove or replace whole lines of a text file."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(4):
            case 0:
                lines[one], lines[other] = lines[other], lines[one]
            case 1:
                lines.insert(one, lines[other])
            case 2:
                del lines[one]
            case _:
                lines[one] = rng.choice((b"\n", b"IQ== -1\n", b"IQ== 99999999999\n", b"!!!! 3\n", b" \n", b"IQ==\n"))
    return b"".join(lines)


def _export(*options: str) -> Commands:
    def command(rng: random.Random, sound: Sound, copy: Path) -> list[str]:
        return ["export", str(copy), str(copy.parent / "out"), "-e", "1", *options]

    return command


def _export_with(option: str) -> Commands:
    """Export the sound checkpoint with a damaged folder."""

    def command(rng: random.Random, sound: Sound, copy: Path) -> list[str]:
        cut = [] if option == "--exits" else ["-e", "1"]
        return ["export", str(sound["checkpoint"]), str(copy.parent / "out"), *cut, option, str(copy)]

    return command


def _use_bundle(rng: random.Random, sound: Sound, copy: Path) -> list[str]:
    bundle, out = str(copy), str(copy.parent / "out")
    prompt = ["Turn the light on.", "-n", "6", "--threads", "1"]
    return rng.choice(
        (
            ["generate", bundle, *prompt, "--strategy", "self-speculative"],
            ["generate", bundle, *prompt, "--raw", "--verify"],
            ["generate", bundle, *prompt, "--strategy", "early-exit", "--exit-when", "top_prob >= 0.5"],
            ["inspect", bundle],
            ["inspect", bundle, "--json"],
            ["quantize", bundle, out, "--method", "rtn", "--no-report"],
        )
    )


def _calibrate(rng: random.Random, sound: Sound, copy: Path) -> list[str]:
    options = ["-n", "4", "--grid", "0.9 0.5", "--delta", "0.9", "--epsilon", "0.5", "--threads", "1"]
    return ["calibrate", str(sound["bundle"]), "--data", str(copy), "--out", str(copy.parent / "out"), *options]


def _quantize_calibrated(rng: random.Random, sound: Sound, copy: Path) -> list[str]:
    options = ["--method", "gptq", "--calibration-tokens", "64", "--no-report", "--calibration", str(copy)]
    return ["quantize", str(sound["bundle"]), str(copy.parent / "out"), *options]


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "checkpoint": Target("checkpoint", _any_file, _export(), oracle.as_transformers),
        "config": Target("checkpoint", _json_file("config.json"), _export(), oracle.as_transformers),
        "tokenizer": Target("checkpoint", _json_file(*_TOKENIZER_FILES), _export(), oracle.as_tokenizer),
        "template": Target("checkpoint", _template, _export(), oracle.as_template),
        "family-config": Target(
            "families", _json_file("config.json"), _export(), oracle.as_transformers, is_one_of=True
        ),
        "vocabulary": Target("vocabularies", _vocabulary, _export(), oracle.as_tokenizer, is_one_of=True),
        "family-gguf": Target("ggufs", _one_file, _export(), oracle.decodes_alike, is_one_of=True),
        "gguf": Target("model.gguf", _one_file, _export(), oracle.decodes_alike),
        "gptq": Target("gptq", _any_file, _export("--keep-blocks"), oracle.decodes_alike),
        "compressed": Target("compressed", _any_file, _export("--keep-blocks"), oracle.decodes_alike),
        "megatron": Target("megatron", _any_file, _export(), oracle.decodes_alike),
        "exits": Target("exits", _any_file, _export_with("--exits"), oracle.decodes_alike),
        "adapter": Target("adapter", _any_file, _export_with("--adapter"), oracle.decodes_alike),
        "bundle": Target("bundle", _any_file, _use_bundle, oracle.still_exact),
        "sealed-bundle": Target("bundle", _sealed_bundle, _use_bundle, oracle.still_exact),
        "sealed-int4": Target("int4", _sealed_bundle, _use_bundle, oracle.still_exact),
        "prompts": Target("prompts.jsonl", _one_file, _calibrate, oracle.said_so),
        "calibration-text": Target("prompts.jsonl", _one_file, _quantize_calibrated, oracle.decodes_alike),
    }
)


def prepare(target: Target, rng: random.Random, sound: Sound, folder: Path) -> tuple[str, list[str]]:
    """Copy the sound input into a folder and damage it; return what was done, and the command line."""
    source = sound[target.sound]
    if target.is_one_of:
        source = rng.choice(sorted(source.iterdir()))
    copy = folder / f"in{source.suffix}"
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy(source, copy)
    said = f"{source.name}: " if target.is_one_of else ""
    return said + target.damage(rng, copy), target.command(rng, sound, copy)
