r"""An assistant in PyTorch: a drafter that reads the model's own keys and values, as Gemma 4's do.

With x a text, s the model's normalised final state at p, or what the assistant itself gave for the row before::

    z = pre_projection [token_norm(embedding of x[p+1]); state_norm(s)]
    z = layers(z)                 Qwen3's, with q_proj, q_norm and o_proj alone: each attends to a layer of the model
    y = norm(z)
    lm_head(y)                    scores of x[p+2], over a trimmed vocabulary
    post_projection(y)            s of the next row

The formula is Gemma4AssistantForCausalLM's in transformers, but for the two norms in front. Layers are Qwen3's whatever
the model is. Parameters have the names of the format in docs/drafters.md;
:mod:`shortstack.samples.recipes.training.assistant_files` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortstack.export.twin.layer import KeyValue, Layer, Norm, Rotary
from shortstack.graphs import layer_spec
from shortstack.samples.recipes.training.drafting_net import DraftingNet
from shortstack.samples.recipes.training.eagle_unroll import chain_attention


@dataclass(frozen=True, slots=True)
class AssistantSpec:
    """What an assistant is.

    Attributes:
        model_hidden: Width of the model's residual stream.
        vocab_size: Token ids of the model.
        kv_layers: The layer of the model whose keys and values each layer reads.
        hidden_size: Width of its layers.
        intermediate_size: Width of their MLP.
        heads: Query heads.
        kv_heads: Key/value heads of the layers that it reads.
        head_dim: Width of one.
        ropes: For each layer the number of that layer's rotary embedding in the model; None for none.
        windows: For each layer how many positions before the newest one it sees; 0 is all.
        draft_vocab: Rows of its LM head.
        eps: Of its norms.
        max_positions: Of the model, for the config.
    """

    model_hidden: int
    vocab_size: int
    kv_layers: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ropes: tuple[int | None, ...]
    windows: tuple[int, ...]
    draft_vocab: int
    eps: float
    max_positions: int

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths of the model's residual stream that its keys and values are computed from, ascending."""
        return tuple(sorted(set(self.kv_layers)))

    def layer(self, number: int) -> layer_spec.Layer:
        """Return one of its layers."""
        norm = layer_spec.Norm(eps=self.eps)
        rope = self.ropes[number]
        attention = layer_spec.Attention(self.heads, self.kv_heads, self.head_dim, rope=rope, qk_norm=norm)
        mlp = layer_spec.Mlp(self.intermediate_size)
        return layer_spec.Layer(attention, mlp, before_attention=norm, before_mlp=norm)

    def to_json(self) -> dict[str, Any]:
        """Return the assistant's ``config.json``; its rotary embedding is the model's, so none is said."""
        window = max(self.windows)
        sliding = {
            "use_sliding_window": True,
            "sliding_window": window,
            "layer_types": ["sliding_attention" if own else "full_attention" for own in self.windows],
        }
        return {
            "model_type": "shortstack_assistant",
            "backbone_hidden_size": self.model_hidden,
            "kv_layers": list(self.kv_layers),
            "text_config": {
                "model_type": "qwen3",
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_hidden_layers": len(self.kv_layers),
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim,
                "hidden_act": "silu",
                "rms_norm_eps": self.eps,
                "vocab_size": self.vocab_size,
                "max_position_embeddings": self.max_positions,
                **(sliding if window else {}),
            },
        }


class AssistantLayers(nn.Module):
    """The layers and the norm above them."""

    def __init__(self, spec: AssistantSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(spec.layer(number), spec.hidden_size, is_consumer=True) for number in range(len(spec.kv_layers))
        )
        self.norm = Norm(spec.hidden_size, layer_spec.Norm(eps=spec.eps))


class Assistant(DraftingNet):
    """The assistant.

    Args:
        spec: What it is.
        ids: As in :class:`DraftingNet`.
    """

    spec: AssistantSpec

    def __init__(self, spec: AssistantSpec, ids: Tensor) -> None:
        super().__init__(spec, ids)
        norm = layer_spec.Norm(eps=spec.eps)
        self.token_norm, self.state_norm = Norm(spec.model_hidden, norm), Norm(spec.model_hidden, norm)
        self.pre_projection = nn.Linear(2 * spec.model_hidden, spec.hidden_size, bias=False)
        self.model = AssistantLayers(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.draft_vocab, bias=False)
        self.post_projection = nn.Linear(spec.hidden_size, spec.model_hidden, bias=False)

    def pair(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Return token and state side by side, normalised: [..., model hidden] twice -> [..., 2 * model hidden]."""
        return torch.cat([self.token_norm(tokens), self.state_norm(states)], dim=-1)

    def forward(
        self, pair: Tensor, read: Sequence[KeyValue], seen: Sequence[Tensor], rotaries: Sequence[Rotary]
    ) -> Tensor:
        """Return y of some rows, [batch, rows, hidden].

        Args:
            pair: What :meth:`pair` gives for them, [batch, rows, 2 * model hidden].
            read: The model's keys and values of each layer, [batch, kv_heads, seq, head_dim] each.
            seen: Which of these positions the rows see, bool [batch, rows, seq], for each layer.
            rotaries: The model's tables at the positions of the rows, [batch, 1, rows, head_dim / 2].
        """
        x = self.pre_projection(pair).float()
        for layer, key_value, mask in zip(self.model.layers, read, seen, strict=True):
            assert isinstance(layer, Layer)
            normed = layer.input_layernorm(x)
            mixed = chain_attention(layer.self_attn.query(normed, rotaries), key_value, (), mask)
            x = layer.above(x, normed, layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2)))[1]
        return self.model.norm(x)  # type: ignore[no-any-return]

    def logits(self, y: Tensor) -> Tensor:
        """Return the scores of the rows' tokens: [..., hidden] -> [..., draft vocabulary]."""
        return self.lm_head(y)  # type: ignore[no-any-return]

    def state(self, y: Tensor) -> Tensor:
        """Return the states of the next rows: [..., hidden] -> [..., model hidden]."""
        return self.post_projection(y).float()  # type: ignore[no-any-return]
