"""Tiny Gemma 4 models with random assistants, and what transformers drafts with them."""

from __future__ import annotations

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

from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec

ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
CENTROIDS = {"use_ordered_embeddings": True, "num_centroids": 4, "centroid_intermediate_top_k": 2}
"""Fields of an assistant's config: a head with centroids."""
KEYS = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
"""Fields of both configs: values from keys."""
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


def shared_keys_and_values(vocab: int) -> dict[str, Any]:
    """Return fields of a model's config: two layers share keys and values, each layer has embeddings."""
    return {
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": vocab,
    }


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


def edited(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of a folder, by name with ``__`` for dots; None takes one out."""
    file = folder / "model.safetensors"
    weights = load_file(str(file))
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    save_file(weights, str(file), {"format": "pt"})
