"""An EAGLE-3 head in PyTorch (https://arxiv.org/abs/2503.01840).

With p a position, x the text, and h the model's residual stream at some depths::

    u = fc [h_low; h_mid; h_high] at p         of a true row; of a drafted one the head's own g of the row before
    a = [norm(embedding of x[p+1]); norm(u)]   what q_proj, k_proj and v_proj read
    g = u + o_proj(attention(a))
    g = g + mlp(norm(g))
    lm_head(norm(g))                           scores of x[p+2], over a trimmed vocabulary

Row p is rotated to position p. Parameters have EAGLE's own names;
:mod:`shortstack.samples.recipes.training.eagle_files` reads and writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shortstack.export.rope import rope_tables
from shortstack.export.twin.layer import MLP, Attention, KeyValue, Norm, Rotary
from shortstack.export.twin.model import Twin
from shortstack.graphs import layer_spec
from shortstack.samples.recipes.training.drafting_net import DraftingNet

FeatureNorm = Literal["none", "each"]
_MOST_POSITIONS = 4096  # of the first rotary table


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What a head is.

    Attributes:
        model_hidden: Width of the model's residual stream, and of the head's own.
        vocab_size: Token ids of the model.
        features: Depths that it reads, ascending, each the number of layers run before.
        feature_norm: ``each`` normalises every feature before ``fc``.
        intermediate_size: Width of the MLP.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of one.
        draft_vocab: Rows of its LM head.
        theta: Base of its rotary embedding.
        eps: Of its norms.
        max_positions: Of the model, for the config.
        drafts: Steps of its training-time test: how many drafts of a round it was trained for.
    """

    model_hidden: int
    vocab_size: int
    features: tuple[int, ...]
    feature_norm: FeatureNorm
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    draft_vocab: int
    theta: float
    eps: float
    max_positions: int
    drafts: int

    def to_json(self) -> dict[str, Any]:
        """Return the head's ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": self.model_hidden,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": 1,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "eagle_aux_hidden_state_layer_ids": list(self.features),
            **({"fc_norm": True} if self.feature_norm == "each" else {}),
            "speculators_config": {"proposal_methods": [{"speculative_tokens": self.drafts}]},
        }


class MidLayer(nn.Module):
    """The decoder layer; its attention reads token and state side by side."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        hidden, norm = spec.model_hidden, layer_spec.Norm(eps=spec.eps)
        self.hidden_norm = Norm(hidden, norm)
        self.input_layernorm = Norm(hidden, norm)
        attention = layer_spec.Attention(spec.heads, spec.kv_heads, spec.head_dim)
        self.self_attn = Attention(attention, 2 * hidden)
        self.self_attn.o_proj = nn.Linear(spec.heads * spec.head_dim, hidden, bias=False)
        self.post_attention_layernorm = Norm(hidden, norm)
        self.mlp = MLP(layer_spec.Mlp(spec.intermediate_size), hidden)

    def read(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Return what the attention reads: [..., hidden] twice -> [..., 2 * hidden]."""
        return torch.cat([self.input_layernorm(embeddings), self.hidden_norm(states)], dim=-1)

    def after_attention(self, states: Tensor, mixed: Tensor) -> Tensor:
        """Return g of rows from their states and what attention mixed, [..., heads * head_dim]."""
        g = states + self.self_attn.o_proj(mixed)
        return g + self.mlp(self.post_attention_layernorm(g))  # type: ignore[no-any-return]


class EagleHead(DraftingNet):
    """The head.

    Args:
        spec: What it is.
        ids: As in :class:`DraftingNet`.
    """

    spec: HeadSpec

    def __init__(self, spec: HeadSpec, ids: Tensor) -> None:
        super().__init__(spec, ids)
        hidden, count = spec.model_hidden, len(spec.features)
        if spec.feature_norm == "each":
            self.fc_norm = nn.ModuleList(Norm(hidden, layer_spec.Norm(eps=spec.eps)) for _ in range(count))
        self.fc = nn.Linear(count * hidden, hidden, bias=False)
        self.midlayer = MidLayer(spec)
        self.norm = Norm(hidden, layer_spec.Norm(eps=spec.eps))
        self.lm_head = nn.Linear(hidden, spec.draft_vocab, bias=False)
        self._rotary: Rotary | None = None

    def fused(self, features: Tensor) -> Tensor:
        """Return u of true rows: [rows, features, hidden] -> [rows, hidden]."""
        if self.spec.feature_norm == "each":
            parts = [norm(part) for norm, part in zip(self.fc_norm, features.unbind(-2), strict=True)]
            return self.fc(torch.cat(parts, dim=-1)).float()  # type: ignore[no-any-return]
        return self.fc(features.flatten(-2)).float()  # type: ignore[no-any-return]

    def logits(self, g: Tensor) -> Tensor:
        """Return the scores of the rows' tokens: [..., hidden] -> [..., draft vocabulary]."""
        return self.lm_head(self.norm(g))  # type: ignore[no-any-return]

    def rotary(self, positions: Tensor) -> Rotary:
        """Return the tables of rows at some positions, int64 [batch, rows], for any number of heads."""
        most = int(positions.max()) + 1 if positions.numel() else 1
        if self._rotary is None or most > len(self._rotary.cos):
            rope = layer_spec.Rope(self.spec.theta, self.spec.head_dim, self.spec.head_dim)
            cos, sin = (torch.from_numpy(table) for table in rope_tables(rope, max(most, _MOST_POSITIONS)))
            self._rotary = Rotary(cos, sin, torch.arange(len(cos)))
        # [batch, rows, head_dim / 2] -> [batch, 1, rows, head_dim / 2]
        return Rotary(self._rotary.cos[positions][:, None], self._rotary.sin[positions][:, None], positions)

    def key_value(self, read: Tensor, positions: Tensor) -> KeyValue:
        """Return keys and values of rows [batch, rows, 2 * hidden], [batch, kv_heads, rows, head_dim] each."""
        return self.midlayer.self_attn.key_value(read, (self.rotary(positions),))

    def query(self, read: Tensor, positions: Tensor) -> Tensor:
        """Return the queries of rows, [batch, heads, rows, head_dim]."""
        return self.midlayer.self_attn.query(read, (self.rotary(positions),))


def new_head(twin: Twin, spec: HeadSpec, ids: Tensor) -> EagleHead:
    """Return a head to train.

    It starts as one that passes the deepest feature on to the model's own final norm and head, plus a layer that adds
    nothing yet.
    """
    head = EagleHead(spec, ids)
    hidden, last = spec.model_hidden, len(spec.features) - 1
    with torch.no_grad():
        for linear in head.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.normal_(0.0, linear.in_features**-0.5)
        for linear in (head.midlayer.self_attn.o_proj, head.midlayer.mlp.down_proj):
            linear.weight.mul_(0.1)
        head.fc.weight.mul_(0.1)
        head.fc.weight[:, last * hidden :] += torch.eye(hidden)
        head.lm_head.weight.copy_(twin.head_weight[ids])
        if isinstance(twin.model.norm, Norm):
            head.norm.weight.copy_(twin.model.norm.weight)
    return head
