"""LoRA on a twin, through peft: inject, train, save as peft saves it for transformers' model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from shortstack.export.arch import ARCHITECTURES
from shortstack.export.sources import Piece, layer_pieces
from shortstack.export.twin.folder import twin_parameter
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
    below = tuple(f"model.layers.{layer}." for layer in range(lower_layers))
    raised = {
        name for name, _ in twin.named_modules() if name.startswith(below) and name.rsplit(".", 1)[1] in _PROJECTIONS
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
    """Return the adapters' tensors under the names that peft would save for the twin."""
    return {
        _PREFIX + name.replace(".default.", "."): value.detach()
        for name, value in twin.named_parameters()
        if ".lora_" in name
    }


def checkpoint_factors(twin: Twin) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A [rank, in] and B [out, rank] of each matrix of the twin's checkpoint, by its module's name there.

    A matrix that holds several of the twin's, such as q, k and v of GPT-2, has the sum of their ranks. Rows are in the
    checkpoint's order, which in many families is another one than the twin's.
    """
    own, spec = adapter_tensors(twin), twin.spec
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in range(spec.num_hidden_layers):
        parts: dict[str, list[tuple[Piece, Tensor, Tensor]]] = {}
        for role, piece in layer_pieces(ARCHITECTURES[spec.model_type], spec, layer).items():
            module = _PREFIX + twin_parameter(role, layer).removesuffix(".weight")
            if f"{module}.lora_A.weight" in own:
                factors = own[f"{module}.lora_A.weight"], own[f"{module}.lora_B.weight"]
                parts.setdefault(piece.tensor.removesuffix(".weight"), []).append((piece, *factors))
        for module, pieces in parts.items():
            left = pieces[0][2].new_zeros(sum(len(b) for _, _, b in pieces), sum(len(a) for _, a, _ in pieces))
            first = 0
            for piece, a, b in pieces:
                rows = slice(None) if piece.rows is None else torch.from_numpy(piece.rows)
                left[rows, first : first + len(a)] = b
                first += len(a)
            found[module] = torch.cat([a for _, a, _ in pieces]), left
    return found


def save_adapter(folder: Path, config: LoraConfig, twin: Twin, base: str, dtype: torch.dtype = torch.float16) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, each under another name first.

    Args:
        folder: Where to.
        config: peft's configuration of the twin.
        twin: The model with the adapters.
        base: The model that it belongs to.
        dtype: Type of the stored tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    factors = checkpoint_factors(twin)
    fields = config.to_dict()  # type: ignore[no-untyped-call]
    described = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    described["base_model_name_or_path"] = base
    described["inference_mode"] = True
    described["target_modules"] = sorted({module.rsplit(".", 1)[1] for module in factors})
    ranks = {module: len(a) for module, (a, _) in sorted(factors.items()) if len(a) != config.r}
    described["rank_pattern"] = described["alpha_pattern"] = ranks
    sources = ARCHITECTURES[twin.spec.model_type].sources
    described["fan_in_fan_out"] = sources["q_proj.weight"].transposed
    partial = folder / ".adapter.partial"
    tensors = {
        f"{_PREFIX}{module}.lora_{name}.weight": value
        for module, pair in factors.items()
        for name, value in zip("AB", pair, strict=True)
    }
    stored = {name: value.detach().to("cpu", dtype).contiguous() for name, value in tensors.items()}
    save_file(stored, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "adapter_model.safetensors")
    partial.write_text(json.dumps(described, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, folder / "adapter_config.json")
