"""Tiny Gemma 4 models with random assistants, and what transformers drafts with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedTextConfig,
    PreTrainedModel,
)
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from helpers.drafters import gated
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec

ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
CENTROIDS = {"use_ordered_embeddings": True, "num_centroids": 4, "centroid_intermediate_top_k": 2}
"""Fields of an assistant's config: a head with centroids."""
Round = tuple[list[int], list[int]]  # the text before a round, and its drafts


@dataclass(frozen=True)
class Gemma4Pair:
    """A Gemma 4 and an assistant for it.

    Attributes:
        seed: Of the weights of both.
        vocab: Token ids: a few, so that some drafts of random weights are accepted.
        window: Of the sliding layers.
        model: Further fields of the model's config.
        assistant: Further fields of the assistant's ``text_config``.
        head: Further fields of its config, such as of a head with centroids.
        drafts: How many tokens it drafts in a round.
        is_unified: The assistant is of the kind that the 12B model has.
    """

    seed: int = 0
    vocab: int = 8
    window: int = 64
    model: dict[str, Any] = field(default_factory=dict)
    assistant: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    drafts: int = 3
    is_unified: bool = False

    def made(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Return both, with random weights."""
        heads = {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": self.window,
            "vocab_size": self.vocab,
            "rope_parameters": ROPES,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "max_position_embeddings": 1024,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        types = (["sliding_attention"] * 2 + ["full_attention"]) * 2
        own = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "layer_types": types,
            "final_logit_softcapping": 30.0, **self.model,
        }  # fmt: skip
        text = {
            "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 4, "num_kv_shared_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"], **self.assistant,
        }  # fmt: skip
        torch.manual_seed(self.seed)
        model = Gemma4ForCausalLM(Gemma4TextConfig(**{**heads, **own})).eval()
        fields = {**heads, **text}
        if self.is_unified:
            fields = {name: value for name, value in fields.items() if not name.endswith("per_layer_input")}
            own_text = Gemma4UnifiedTextConfig(**fields)
            unified = Gemma4UnifiedAssistantConfig(text_config=own_text, backbone_hidden_size=32, **self.head)
            assistant = Gemma4UnifiedAssistantForCausalLM(unified).eval()
        else:
            usual = Gemma4AssistantConfig(text_config=Gemma4TextConfig(**fields), backbone_hidden_size=32, **self.head)
            assistant = Gemma4AssistantForCausalLM(usual).eval()
        for made in (model, assistant):
            randomise(made)
        assistant.generation_config.num_assistant_tokens = self.drafts
        if assistant.masked_embedding is not None:
            assistant.masked_embedding.token_ordering.copy_(torch.randperm(self.vocab))
        return model, assistant

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write both into new folders."""
        model, assistant = self.made()
        paths = folder / "model", folder / "assistant"
        model.save_pretrained(paths[0])
        assistant.save_pretrained(paths[1])
        write_words(paths[0], self.vocab)
        return paths


@dataclass
class MadePair:
    """A pair's folders and bundle."""

    pair: Gemma4Pair
    folder: Path

    def __post_init__(self) -> None:
        self.model, self.assistant = self.pair.write(self.folder)
        spec = ExportSpec(str(self.model), self.folder / "bundle", drafter=str(self.assistant))
        self.bundle = export_bundle(spec).folder


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Give matrices weights of a deviation of 0.25, and vectors weights around 1."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.25)
        else:
            parameter.uniform_(0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5)


def write_words(folder: Path, vocab: int) -> None:
    """Write a tokenizer whose tokens are words."""
    words = {f"w{number}": number for number in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def rounds_of(
    model: PreTrainedModel, assistant: PreTrainedModel, prompt: Sequence[int], tokens: int
) -> tuple[list[int], list[Round]]:
    """Return the text that transformers generates with an assistant, without the prompt, and its rounds.

    The reference leaves the keys and values of rejected drafts among those that the assistant reads. They are dropped
    here: with T tokens it sees positions 0 to T - 2, as it does after a prompt.
    """
    found: list[Round] = []

    class Clean(SinglePositionMultiTokenCandidateGenerator):
        def get_candidates(
            self, input_ids: Tensor, model_kwargs: Any, model_outputs: Any, is_first_iteration: bool,
            n_last_matches: int, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if not is_first_iteration and not self.is_main_model_prefill:
                stale = model_outputs.hidden_states[-1].shape[1] - 1 - n_last_matches
                if stale:
                    model_outputs.shared_kv_states = {
                        kind: (key[:, :, :-stale], value[:, :, :-stale])
                        for kind, (key, value) in model_outputs.shared_kv_states.items()
                    }
            given = super().get_candidates(
                input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **kwargs
            )
            if not is_first_iteration:
                count = input_ids.shape[1]
                found.append((input_ids[0].tolist(), given[0][0, count:].tolist()))
            return given

    from transformers.generation import utils

    usual = utils.SinglePositionMultiTokenCandidateGenerator
    utils.SinglePositionMultiTokenCandidateGenerator = Clean
    try:
        given = torch.tensor([list(prompt)])
        ids = model.generate(
            given,
            attention_mask=torch.ones_like(given),  # else a prompt's id 0 would be padding
            assistant_model=assistant,
            do_sample=False,
            max_new_tokens=tokens,
        )
    finally:
        utils.SinglePositionMultiTokenCandidateGenerator = usual
    return ids[0, len(prompt) :].tolist(), found


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


def edited(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of a folder, by name with ``__`` for dots; None takes one out."""
    file = folder / "model.safetensors"
    weights = load_file(str(file))
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    save_file(weights, str(file), {"format": "pt"})
