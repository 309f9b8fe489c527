"""Adapters with random factors, saved by peft, and functions that change their tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEM = "base_model.model.model.layers.2.self_attn.q_proj"  # prefix of the tensors that tests change
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


def lora(folder: Path, checkpoint: Path, **options: Any) -> Path:
    """Save an adapter with random factors through peft."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": list(ALL_LINEAR)} | options
    saving = {"save_embedding_layers": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft gives advice, such as on rsLoRA with patterns
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(0.0, 0.1)
        adapted.save_pretrained(folder, **saving)
    return folder


def edit_tensors(adapter: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)
