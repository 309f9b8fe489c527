"""The folder of a trained drafter, replaced as a whole: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def write_drafter_files(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a drafter; one that is there is replaced."""
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(dict(tensors), str(partial / WEIGHTS_FILE), metadata={"format": "pt"})
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def trained_tensors(drafter: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return its weights in float16, and ``d2t``, which says the token id of row i: i + d2t[i]."""
    tensors = {name: value.detach().half().contiguous() for name, value in drafter.state_dict().items()}
    return tensors | {"d2t": ids - torch.arange(len(ids))}
