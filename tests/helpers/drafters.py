"""Random drafters for tiny models, written as they are published, and what they draft, computed from their formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from shortstack.runtime.decode.choice import Choice
from shortstack.runtime.decode.drafters import Draft
from shortstack.runtime.decode.runs import Asking
from shortstack.runtime.decode.trained_drafter import FromDrafter, TrainedDrafter
from shortstack.runtime.engine.decoder import State

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Eagle3:
    """An EAGLE-3 head (https://arxiv.org/abs/2503.01840) for a tiny model.

    Attributes:
        hidden: Width of its states.
        target_hidden: Of the model's.
        features: The depths that it reads.
        vocab: Token ids of the model.
        draft_vocab: Rows of its head; None uses all token ids.
        options: Further fields of its config, by which the published variants differ.
        has_embedding: It has an embedding of its own.
        first: What the names of its layer begin with.
        heads: Query heads; half as many for keys and values.
        head_dim: Width of one.
        theta: Base of its rotary embedding.
    """

    hidden: int = 64
    target_hidden: int = 64
    features: tuple[int, ...] = (2, 3, 4)
    vocab: int = 300
    draft_vocab: int | None = 60
    options: Mapping[str, Any] = field(default_factory=dict)
    has_embedding: bool = False
    first: str = "midlayer"
    heads: int = 4
    head_dim: int = 16
    theta: float = 10000.0
    in_speculators: bool = False
    seed: int = 0

    def write(self, folder: Path, weights: Rows | None = None) -> Path:
        """Write it into a new folder, with other weights than :meth:`tensors` if some are given."""
        folder.mkdir(parents=True)
        layer: dict[str, Any] = {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": 96,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "num_hidden_layers": 1,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "max_position_embeddings": 1024,
            "hidden_act": "silu",
        }
        own = {"eagle_aux_hidden_state_layer_ids": list(self.features), **self.options}
        if self.draft_vocab is not None:
            own["draft_vocab_size"] = self.draft_vocab
        if self.in_speculators:
            config = {"speculators_model_type": "eagle3", "transformer_layer_config": layer, **own}
        else:
            config = {"architectures": ["LlamaForCausalLMEagle3"], **layer, **own}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(self.tensors() if weights is None else weights, str(folder / "model.safetensors"))
        return folder

    def tensors(self) -> Rows:
        """Return its tensors by their published names."""
        random = torch.Generator().manual_seed(self.seed)

        def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=random) * scale * columns**-0.5

        def norm(size: int) -> Tensor:
            return torch.rand(size, generator=random) + 0.5

        width, kv_width = self.heads * self.head_dim, self.heads // 2 * self.head_dim
        rows = self.vocab if self.draft_vocab is None else self.draft_vocab
        found = {
            "fc.weight": matrix(self.hidden, len(self.features) * self.target_hidden),
            f"{self.first}.hidden_norm.weight": norm(self.hidden),
            f"{self.first}.input_layernorm.weight": norm(self.hidden),
            f"{self.first}.self_attn.q_proj.weight": matrix(width, 2 * self.hidden, 2.0),
            f"{self.first}.self_attn.k_proj.weight": matrix(kv_width, 2 * self.hidden, 2.0),
            f"{self.first}.self_attn.v_proj.weight": matrix(kv_width, 2 * self.hidden),
            f"{self.first}.self_attn.o_proj.weight": matrix(self.hidden, width),
            f"{self.first}.post_attention_layernorm.weight": norm(self.hidden),
            f"{self.first}.mlp.gate_proj.weight": matrix(96, self.hidden),
            f"{self.first}.mlp.up_proj.weight": matrix(96, self.hidden),
            f"{self.first}.mlp.down_proj.weight": matrix(self.hidden, 96),
            "norm.weight": norm(self.hidden),
            "lm_head.weight": matrix(rows, self.hidden, 3.0),
        }
        if self.draft_vocab is not None:
            ids = torch.randperm(self.vocab, generator=random)[: self.draft_vocab]
            ids = ids if self.seed % 2 else ids.sort().values
            found["d2t"] = ids - torch.arange(self.draft_vocab)
            found["t2d"] = torch.zeros(self.vocab, dtype=torch.bool).index_fill(0, ids, True)
        if self.has_embedding:
            found["embed_tokens.weight"] = matrix(self.vocab, self.hidden, 3.0)
        if self.options.get("norm_before_fc"):
            found["input_norm.weight"] = norm(len(self.features) * self.target_hidden)
        if self.options.get("fc_norm"):
            found |= {f"fc_norm.{i}.weight": norm(self.target_hidden) for i in range(len(self.features))}
        return found

    def fitted(self, texts: Sequence[Sequence[int]], states: Sequence[Sequence[Tensor]], embedding: Tensor) -> Rows:
        """Return weights that were trained for a moment on the first drafts of some texts, so that many are right."""
        w = {name: value.clone() for name, value in self.tensors().items()}
        learned = [value.requires_grad_() for value in w.values() if value.is_floating_point()]
        optimizer = torch.optim.AdamW(learned, lr=3e-3)
        row_of = None if self.draft_vocab is None else {int(i + w["d2t"][i]): i for i in range(self.draft_vocab)}
        for _ in range(60):
            losses = []
            for tokens, own in zip(texts, states, strict=True):
                u = self._fused(w, own, len(tokens) - 2)
                _, normed = self._layer(w, u, embedding[list(tokens[1:-1])])
                rows = [token if row_of is None else row_of.get(token, -100) for token in tokens[2:]]
                losses.append(F.cross_entropy(normed @ w["lm_head.weight"].T, torch.tensor(rows)))
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: value.detach() for name, value in w.items()}

    def drafts(
        self, w: Rows, states: Sequence[Tensor], tokens: Sequence[int], count: int, embedding: Tensor
    ) -> list[int]:
        """Return the drafts after a text, every row computed anew.

        Args:
            w: Its weights.
            states: The model's residual stream before layer 0, 1, ..., [positions, hidden] each; the last position is
                not read.
            tokens: The text.
            count: How many drafts.
            embedding: The model's embedding [vocab, hidden].
        """
        embedding = w.get("embed_tokens.weight", embedding)
        u, ids, found = self._fused(w, states, len(tokens) - 1), list(tokens[1:]), list[int]()
        for _ in range(count):
            g, normed = self._layer(w, u, embedding[ids])
            logits = normed[-1] @ w["lm_head.weight"].T
            row = int(logits.argmax())
            found.append(row if self.draft_vocab is None else row + int(w["d2t"][row]))
            u = torch.cat([u, (normed if self.options.get("norm_output") else g)[-1:]])
            ids.append(found[-1])
        return found

    def forced(
        self, w: Rows, states: Sequence[Tensor], tokens: Sequence[int], true: int, further: int, embedding: Tensor
    ) -> list[Tensor]:
        """Return g of the last of some true rows, then of further rows on the head's own states, all of a given text.

        Args:
            w: Its weights.
            states: As for :meth:`drafts`.
            tokens: The text; row p reads token p + 1.
            true: How many true rows.
            further: How many rows behind them.
            embedding: The model's embedding [vocab, hidden].
        """
        u, found = self._fused(w, states, true), list[Tensor]()
        for row in range(true, true + further + 1):
            g, _ = self._layer(w, u, embedding[list(tokens[1 : row + 1])])
            found.append(g[-1])
            u = torch.cat([u, g[-1:]])
        return found

    def _fused(self, w: Rows, states: Sequence[Tensor], rows: int) -> Tensor:
        features = [states[depth][:rows] for depth in self.features]
        if self.options.get("fc_norm"):
            features = [_rms(x, w[f"fc_norm.{i}.weight"]) for i, x in enumerate(features)]
        joined = torch.cat(features, dim=-1)
        if self.options.get("norm_before_fc"):
            joined = _rms(joined, w["input_norm.weight"])
        return joined @ w["fc.weight"].T

    def _layer(self, w: Rows, u: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        state = _rms(u, w[f"{self.first}.hidden_norm.weight"])
        read = torch.cat([_rms(e, w[f"{self.first}.input_layernorm.weight"]), state], dim=-1)
        stream = state if self.options.get("norm_before_residual") else u
        g = stream + attention(w, f"{self.first}.self_attn", read, self.heads, self.head_dim, self.theta)
        g = g + gated(w, f"{self.first}.mlp", _rms(g, w[f"{self.first}.post_attention_layernorm.weight"]))
        return g, _rms(g, w["norm.weight"])


def attention(w: Rows, name: str, x: Tensor, heads: int, head_dim: int, theta: float) -> Tensor:
    """Return causal attention of rows [seq, width], each at its own position."""
    count = len(x)
    q = (x @ w[f"{name}.q_proj.weight"].T).view(count, heads, head_dim).transpose(0, 1)
    k = (x @ w[f"{name}.k_proj.weight"].T).view(count, heads // 2, head_dim).transpose(0, 1)
    v = (x @ w[f"{name}.v_proj.weight"].T).view(count, heads // 2, head_dim).transpose(0, 1)
    angles = torch.arange(count)[:, None] * theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = angles.cos(), angles.sin()

    def rotated(t: Tensor) -> Tensor:
        a, b = t.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    q, k = rotated(q), rotated(k).repeat_interleave(2, dim=0)
    mixed = F.scaled_dot_product_attention(q, k, v.repeat_interleave(2, dim=0), is_causal=True)
    return mixed.transpose(0, 1).reshape(count, heads * head_dim) @ w[f"{name}.o_proj.weight"].T


def gated(w: Rows, name: str, x: Tensor) -> Tensor:
    """Return a gated MLP of rows."""
    inner = F.silu(x @ w[f"{name}.gate_proj.weight"].T) * (x @ w[f"{name}.up_proj.weight"].T)
    return inner @ w[f"{name}.down_proj.weight"].T


def _rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@torch.no_grad()
def residual_streams(model: PreTrainedModel, tokens: Sequence[int]) -> list[Tensor]:
    """Return the residual stream before each layer and after the last, before any norm, [positions, hidden] each."""
    last: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, given: last.append(given[0][0]))
    states = model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
    hook.remove()
    return [*(state[0] for state in states[:-1]), last[0]]


@dataclass(frozen=True)
class Recorded(FromDrafter):
    """Drafts with the bundle's drafter, and records each round.

    Attributes:
        rounds: The text before each round, and what was drafted.
    """

    rounds: list[tuple[list[int], list[int]]] = field(default_factory=list, compare=False)

    def drafter(self, stack: State, choice: Choice) -> TrainedDrafter:
        """Return a drafter that records."""
        rounds = self.rounds

        class Recording(TrainedDrafter):
            def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Asking[Draft]:
                text = list(tokens)
                draft = yield from super().draft(past, tokens, most, least_confidence)
                rounds.append((text, [proposal.token for proposal in draft.proposals]))
                return draft

        return Recording(stack, choice)


@dataclass(frozen=True)
class Projected:
    """An EAGLE-1 head, or a layer for multi-token prediction, of a tiny Llama with hidden 64.

    Attributes:
        kind: ``eagle`` (https://arxiv.org/abs/2401.15077), ``mimo`` or ``deepseek`` (MTP, as these name it).
        has_bias: The projection of an EAGLE head has a bias.
        layers: Of the model.
    """

    kind: str
    has_bias: bool = True
    layers: int = 4

    @property
    def prefix(self) -> str:
        """What the names of the layer begin with."""
        return {"eagle": "layers.0", "mimo": "model.mtp_layers.0"}.get(self.kind, f"model.layers.{self.layers}")

    def tensors(self) -> Rows:
        """Return its tensors by their published names."""
        w = Eagle3(seed=7).tensors()
        width = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
        random = torch.Generator().manual_seed(11)
        found = {
            name.replace("midlayer", self.prefix): value
            for name, value in w.items()
            if name.startswith("midlayer.") and not name.split(".")[2].startswith(tuple(width))
        }
        for name, rows in width.items():
            found[f"{self.prefix}.self_attn.{name}.weight"] = torch.randn(rows, 64, generator=random) / 4
        found.pop(f"{self.prefix}.hidden_norm.weight")
        first, both = found[f"{self.prefix}.input_layernorm.weight"], torch.randn(64, 128, generator=random) / 8
        if self.kind == "eagle":
            del found[f"{self.prefix}.input_layernorm.weight"]
            return found | {"fc.weight": both} | ({"fc.bias": first} if self.has_bias else {})
        own = {
            "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
            "deepseek": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
        }[self.kind]
        norms = [torch.rand(64, generator=random) + 0.5 for _ in range(3)]
        values = (norms[0], norms[1], both, norms[2])
        return found | {f"{self.prefix}.{name}.weight": value for name, value in zip(own, values, strict=True)}

    def drafts(self, model: PreTrainedModel, tokens: Sequence[int], count: int) -> list[int]:
        """Return the drafts after a text, every row computed anew."""
        eps = 1e-5 if self.kind == "eagle" else 1e-6
        w, prefix = self.tensors(), self.prefix
        normed = model.model.norm(residual_streams(model, tokens)[-1]).detach()
        u, ids, found = normed[: len(tokens) - 1], list(tokens[1:]), list[int]()
        for _ in range(count):
            x = self._projected(w, model.model.embed_tokens.weight.detach()[ids], u)
            read = x if self.kind == "eagle" else _rms(x, w[f"{prefix}.input_layernorm.weight"], eps)
            g = x + attention(w, f"{prefix}.self_attn", read, 4, 16, 10000.0)
            g = g + gated(w, f"{prefix}.mlp", _rms(g, w[f"{prefix}.post_attention_layernorm.weight"], eps))
            if self.kind != "eagle":
                own = "final_layernorm" if self.kind == "mimo" else "shared_head.norm"
                g = _rms(g, w[f"{prefix}.{own}.weight"], eps)
            found.append(int((g[-1] @ model.lm_head.weight.detach().T).argmax()))
            u = torch.cat([u, g[-1:]])
            ids.append(found[-1])
        return found

    def _projected(self, w: Rows, e: Tensor, u: Tensor, eps: float = 1e-6) -> Tensor:
        prefix = self.prefix
        if self.kind == "eagle":
            return torch.cat([e, u], dim=-1) @ w["fc.weight"].T + w.get("fc.bias", torch.zeros(64))
        if self.kind == "mimo":
            e, u = (
                _rms(e, w[f"{prefix}.token_layernorm.weight"], eps),
                _rms(u, w[f"{prefix}.hidden_layernorm.weight"], eps),
            )
            return torch.cat([u, e], dim=-1) @ w[f"{prefix}.input_proj.weight"].T
        e, u = _rms(e, w[f"{prefix}.enorm.weight"], eps), _rms(u, w[f"{prefix}.hnorm.weight"], eps)
        return torch.cat([e, u], dim=-1) @ w[f"{prefix}.eh_proj.weight"].T
