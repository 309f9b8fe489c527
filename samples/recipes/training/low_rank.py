"""LoRA on a twin, through peft: inject, train, save as peft saves it for transformers' model of the same names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from shortstack.export.twin.model import Twin

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."


def add_lora(twin: Twin, rank: int, lower_rank: int, lower_layers: int) -> LoraConfig:
    """Freeze a twin and add adapters to every projection, in place.

    Args:
        twin: The model.
        rank: Rank of the adapters.
        lower_rank: Rank in the layers that an exit runs: they have more to learn.
        lower_layers: How many layers that is.

    Returns:
        peft's configuration; alpha equals the rank everywhere, so a delta is B A.
    """
    raised = {
        f"model.layers.{layer}.{'mlp' if part.endswith(('gate_proj', 'up_proj', 'down_proj')) else 'self_attn'}.{part}"
        for layer in range(lower_layers)
        for part in _PROJECTIONS
    }
    pattern = dict.fromkeys(sorted(raised), lower_rank) if lower_rank != rank else {}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(_PROJECTIONS),
        task_type="CAUSAL_LM",
    )
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(config, twin)
    return config


def adapter_tensors(twin: Twin) -> dict[str, Tensor]:
    """Return the adapters' tensors under the names peft saves."""
    return {
        _PREFIX + name.replace(".default.", "."): value.detach()
        for name, value in twin.named_parameters()
        if ".lora_" in name
    }


def save_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], base: str, dtype: torch.dtype = torch.float16
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, each under another name first.

    Args:
        folder: Where to.
        config: peft's configuration.
        tensors: What :func:`adapter_tensors` returned.
        base: The model that it belongs to.
        dtype: Type of the stored tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = config.to_dict()  # type: ignore[no-untyped-call]
    described = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    described["base_model_name_or_path"] = base
    described["inference_mode"] = True
    partial = folder / ".adapter.partial"
    stored = {name: value.to("cpu", dtype).contiguous() for name, value in tensors.items()}
    save_file(stored, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "adapter_model.safetensors")
    partial.write_text(json.dumps(described, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, folder / "adapter_config.json")
