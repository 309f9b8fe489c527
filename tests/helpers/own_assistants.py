"""Tiny assistants in our own format for Llama-like models, and what their formula drafts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from helpers.drafters import gated


@dataclass(frozen=True)
class LlamaAssistant:
    """An assistant in our own format for a tiny Llama: hidden 64, 4 heads of 16, 2 for keys and values, 300 tokens.

    Attributes:
        kv_layers: The layers of the model whose keys and values it reads; None: not said, the last one for all.
        head: ``tied`` (its embedding), ``trimmed`` (the ids that ``d2t`` says) or ``model`` (the model's).
        has_norms: Token and state are normalised.
        hidden: Width of its layers.
    """

    kv_layers: tuple[int, ...] | None = (1, 3)
    head: str = "tied"
    has_norms: bool = False
    hidden: int = 32

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        random, hidden = torch.Generator().manual_seed(3), self.hidden

        def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=random) * scale * columns**-0.5

        def norm(size: int) -> Tensor:
            return torch.rand(size, generator=random) + 0.5

        found = {
            "pre_projection.weight": matrix(hidden, 128),
            "post_projection.weight": matrix(64, hidden, 2.0),
            "model.norm.weight": norm(hidden),
        }
        for layer in (0, 1):
            found |= {
                f"model.layers.{layer}.{name}.weight": value
                for name, value in {
                    "input_layernorm": norm(hidden),
                    "self_attn.q_proj": matrix(64, hidden, 2.0),
                    "self_attn.o_proj": matrix(hidden, 64),
                    "post_attention_layernorm": norm(hidden),
                    "mlp.gate_proj": matrix(48, hidden),
                    "mlp.up_proj": matrix(48, hidden),
                    "mlp.down_proj": matrix(hidden, 48),
                }.items()
            }
        if self.has_norms:
            found |= {"token_norm.weight": norm(64), "state_norm.weight": norm(64)}
        if self.head == "tied":
            found["model.embed_tokens.weight"] = matrix(300, hidden, 3.0)
        if self.head == "trimmed":
            ids = torch.randperm(300, generator=random)[:50]
            found |= {"lm_head.weight": matrix(50, hidden, 3.0), "d2t": ids - torch.arange(50)}
        return found

    def write(self, folder: Path) -> Path:
        """Write it into a new folder."""
        folder.mkdir(parents=True)
        text = {
            "model_type": "llama", "hidden_size": self.hidden, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "rope_theta": 10000.0, "vocab_size": 300, "max_position_embeddings": 1024,
        }  # fmt: skip
        config: dict[str, Any] = {"model_type": "shortstack_assistant", "backbone_hidden_size": 64, "text_config": text}
        if self.kv_layers is not None:
            config["kv_layers"] = list(self.kv_layers)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(self.tensors(), str(folder / "model.safetensors"), {"format": "pt"})
        return folder

    @torch.no_grad()
    def drafts(self, model: PreTrainedModel, tokens: Sequence[int], count: int) -> list[int]:
        """Return the drafts after a text, computed from its formula."""
        w = self.tensors()
        seen = model(torch.tensor([list(tokens[:-1])]), output_hidden_states=True, use_cache=True)
        state, token, found = seen.hidden_states[-1][0, -1], tokens[-1], list[int]()
        for _ in range(count):
            e = model.model.embed_tokens.weight[token]
            if self.has_norms:
                e, state = _rms(e, w["token_norm.weight"]), _rms(state, w["state_norm.weight"])
            x = w["pre_projection.weight"] @ torch.cat([e, state])
            for layer, owner in enumerate(self.kv_layers or (3, 3)):
                cached = seen.past_key_values.layers[owner]
                x = self._layer(w, f"model.layers.{layer}", x, cached.keys[0], cached.values[0], len(tokens) - 1)
            y = _rms(x, w["model.norm.weight"])
            state = w["post_projection.weight"] @ y
            if self.head == "model":
                token = int((model.lm_head.weight @ state).argmax())
            else:
                token = int(
                    (w["lm_head.weight" if self.head == "trimmed" else "model.embed_tokens.weight"] @ y).argmax()
                )
                token += int(w["d2t"][token]) if self.head == "trimmed" else 0
            found.append(token)
        return found

    @torch.no_grad()
    def forced(
        self, w: dict[str, Tensor], model: PreTrainedModel, tokens: Sequence[int], known: int, further: int, window: int
    ) -> list[Tensor]:
        """Return y of the first draft behind a text, and of further ones that read a given text.

        Args:
            w: Its weights, with norms of token and state.
            model: The model.
            tokens: The text; draft j reads token known - 2 + j.
            known: How many tokens there are when the round begins.
            further: How many drafts behind the first one.
            window: How many positions before the newest token each layer sees; 0 is all.
        """
        seen = model(torch.tensor([list(tokens[: known - 1])]), output_hidden_states=True, use_cache=True)
        state, found = seen.hidden_states[-1][0, -1], list[Tensor]()
        for token in tokens[known - 1 : known + further]:
            e = _rms(model.model.embed_tokens.weight[token], w["token_norm.weight"])
            x = w["pre_projection.weight"] @ torch.cat([e, _rms(state, w["state_norm.weight"])])
            for layer, owner in enumerate(self.kv_layers or ()):
                cached = seen.past_key_values.layers[owner]
                keys, values = cached.keys[0][:, -window:], cached.values[0][:, -window:]
                x = self._layer(w, f"model.layers.{layer}", x, keys, values, known - 1)
            found.append(_rms(x, w["model.norm.weight"]))
            state = w["post_projection.weight"] @ found[-1]
        return found

    def _layer(self, w: dict[str, Tensor], name: str, x: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        q = (w[f"{name}.self_attn.q_proj.weight"] @ _rms(x, w[f"{name}.input_layernorm.weight"])).view(4, 16)
        if f"{name}.self_attn.q_norm.weight" in w:
            q = _rms(q, w[f"{name}.self_attn.q_norm.weight"])
        angles = position * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
        a, b = q.chunk(2, dim=-1)
        q = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)
        keys, values = keys.repeat_interleave(2, dim=0), values.repeat_interleave(2, dim=0)  # [4, positions, 16]
        scores = (keys @ q[:, :, None])[..., 0] * 16**-0.5
        mixed = (scores.softmax(-1)[:, None] @ values)[:, 0].reshape(64)
        x = x + w[f"{name}.self_attn.o_proj.weight"] @ mixed
        return x + gated(w, f"{name}.mlp", _rms(x, w[f"{name}.post_attention_layernorm.weight"]))


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
