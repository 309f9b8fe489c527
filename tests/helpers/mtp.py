"""Tiny models with layers for multi-token prediction, and what transformers drafts with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

from helpers.tiny_models import write_tokenizer

LAYERS, HIDDEN = 2, 32
Rounds = dict[tuple[int, ...], list[int]]


@dataclass(frozen=True)
class TinyMtp:
    """A Qwen2 whose answers depend most on the newest token, so that its layers guess many of them.

    Attributes:
        count: Layers for multi-token prediction.
        vocab: Token ids.
        seed: Of all weights.
        is_tied: The head is the embedding.
    """

    count: int
    vocab: int = 300
    seed: int = 0
    is_tied: bool = False

    def write(self, folder: Path) -> Path:
        """Write it as transformers would, with the names of DeepSeek's layers."""
        config = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=self.is_tied,
            bos_token_id=None,
            eos_token_id=None,
            num_mtp_layers=self.count,
            mtp_layer_types=["full_attention"] * self.count,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = Qwen2ForCausalLM(config)
            above = MtpModel(model, self.count)
            for name, value in [*model.named_parameters(), *above.layers.named_parameters()]:
                _fill(name, value)
        model.save_pretrained(folder)
        write_tokenizer(folder, self.vocab)
        own = {_published(name): value.detach().clone() for name, value in above.layers.state_dict().items()}
        file = folder / "model.safetensors"
        save_file({**load_file(file), **own}, file, {"format": "pt"})
        return folder


def _published(name: str) -> str:
    number, rest = name.split(".", 1)
    rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
    return f"model.layers.{LAYERS + int(number)}.{rest}"


@torch.no_grad()
def _fill(name: str, value: Tensor) -> None:
    if "norm" in name:
        value.copy_(torch.rand_like(value) * 0.5 + 0.75)
    elif name.endswith("eh_proj.weight"):
        value.copy_(torch.randn_like(value) * 0.04)
        value[:, :HIDDEN] += torch.eye(HIDDEN)
    elif "bias" in name:
        value.copy_(torch.randn_like(value) * 0.1)
    elif "embed_tokens" in name or "lm_head" in name:
        value.copy_(torch.randn_like(value))
    else:
        value.copy_(torch.randn_like(value) * value.shape[-1] ** -0.5 * 0.5)


@contextmanager
def reference(folder: Path) -> Iterator[PreTrainedModel]:
    """Give transformers' model, whose class knows that layers above its last one are for multi-token prediction."""
    before = Qwen2ForCausalLM._keys_to_ignore_on_load_unexpected
    Qwen2ForCausalLM._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS + i}\..*" for i in range(15)]
    try:
        yield AutoModelForCausalLM.from_pretrained(folder).eval()
    finally:
        Qwen2ForCausalLM._keys_to_ignore_on_load_unexpected = before


def reference_rounds(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> tuple[list[int], Rounds]:
    """Return what ``generate(use_mtp=True)`` emits, and what it drafts after each text."""
    rounds: Rounds = {}
    get_candidates = MTPCandidateGenerator.get_candidates

    def recorded(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = get_candidates(self, input_ids, *args, **kwargs)
        text = input_ids[0].tolist()
        if found[0].shape[1] > len(text):
            rounds[tuple(text)] = found[0][0, len(text) :].tolist()
        return found

    MTPCandidateGenerator.get_candidates = recorded
    try:
        ids = torch.tensor([list(prompt)])
        out = model.generate(ids, use_mtp=True, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    finally:
        MTPCandidateGenerator.get_candidates = get_candidates
    return out[0, len(prompt) :].tolist(), rounds


@torch.no_grad()
def recomputed(
    model: PreTrainedModel, text: Sequence[int], embedding: Tensor | None = None, head: Tensor | None = None
) -> list[int]:
    """Return transformers' drafts after a text, every row of every layer computed anew.

    Args:
        model: From :func:`reference`.
        text: The text.
        embedding: An embedding that all layers have of their own.
        head: Likewise a head.
    """
    layers = MtpModel.from_pretrained(model)
    if embedding is not None:
        layers.embed_tokens = torch.nn.Embedding.from_pretrained(embedding)
    if head is not None:
        layers.shared_head = torch.nn.Linear(HIDDEN, len(head), bias=False)
        layers.shared_head.weight.copy_(head)
    ids, positions = torch.tensor([list(text)]), torch.arange(1, len(text))[None]
    states = model.model(ids[:, :-1]).last_hidden_state
    cache = MtpCache(config=model.config.get_mtp_config())
    found, _, _ = layers(ids[:, 1:], states, None, positions, cache)
    return [int(token) for token in found[0]]


def change(folder: Path, changed: Mapping[str, Tensor | None]) -> Path:
    """Change tensors of a checkpoint, add others, and take out those that are None."""
    file = folder / "model.safetensors"
    found = {name: value for name, value in {**load_file(file), **changed}.items() if value is not None}
    save_file({name: value.clone().contiguous() for name, value in found.items()}, file, {"format": "pt"})
    return folder


def as_mimo(folder: Path) -> None:
    """Rename a checkpoint's layers as MiMo does, whose projection reads the state first."""
    names = {"enorm": "token_layernorm", "hnorm": "hidden_layernorm", "eh_proj": "input_proj"}
    names["shared_head.norm"] = "final_layernorm"
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    found = {}
    for name, value in load_file(file).items():
        number, rest = name.split(".", 3)[2:] if name.startswith("model.layers.") else ("0", name)
        if int(number) < LAYERS:
            found[name] = value
            continue
        stem = rest.removesuffix(".weight")
        if stem == "eh_proj":
            value = torch.cat([value[:, HIDDEN:], value[:, :HIDDEN]], dim=1)
        own = f"{names[stem]}.weight" if stem in names else rest
        found[f"model.mtp_layers.{int(number) - LAYERS}.{own}"] = value
    save_file(found, file, {"format": "pt"})
    own_fields = {"model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
    count = {"num_nextn_predict_layers": config["num_mtp_layers"]}
    (folder / "config.json").write_text(json.dumps({**config, **own_fields, **count}))
