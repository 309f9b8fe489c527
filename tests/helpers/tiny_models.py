"""Tiny Llama checkpoints with random weights, saved as transformers saves them, one switch away from each other.

Weights are large enough that logits are well spread, and the upper layers add little to the residual stream, so an exit
agrees with the final head about half the time: drafts are accepted and rejected in every pattern. The tokenizer is a
byte-level BPE with a handful of hand-written merges.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec

END, TURN_START, TURN_END = "<|end|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYER_MATRICES = (
    "attn.qkv_proj.weight",
    "attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
"""The matrices of a layer as a bundle names them, in the order of computation."""
_MERGES = (
    "Ġ t|h e|i n|e r|Ġ a|r e|o n|Ġt he|a t|Ġ s|e n|o u|i s|Ġ w|Ġ c|o r|e s|i t|Ġ b|e d|Ġ f|a n|Ġ p|in g|a l|a r|Ġa n|"
    "Ġ o|Ġ m|l e|i c|Ġan d|Ġ h|Ġt o|s t|Ġ d|Ġo f|r o|Ġ in|l l|o m"
)


@dataclass(frozen=True)
class TinyModel:
    """One configuration; the default is an untied 4-layer model with two query heads per key/value head.

    Attributes:
        name: What is special about it; also seeds its weights.
        layers: Layers.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of one head.
        vocab: Rows of the embedding.
        is_tied: The LM head is the embedding.
        attention_bias: The q, k, v and o projections have biases.
        mlp_bias: The gate, up and down projections have biases.
        rope: transformers' ``rope_parameters``.
        context: ``max_position_embeddings``.
        dtype: Type of the stored weights.
        shard_size: Largest weight file, as transformers writes it.
        upper_scale: Factor on what each layer but the first adds to the residual stream.
    """

    name: str
    layers: int = 4
    hidden: int = 64
    intermediate: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 300
    is_tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: tuple[tuple[str, Any], ...] = (("rope_type", "default"), ("rope_theta", 10000.0))
    context: int = 1024
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    shard_size: str = "1GB"
    upper_scale: float = 0.3

    def write(self, folder: Path) -> Path:
        """Write the checkpoint and its tokenizer into a new folder."""
        config = LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.is_tied,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            rope_parameters=dict(self.rope),
            max_position_embeddings=self.context,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=0,
        )
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = LlamaForCausalLM(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(0.0, 0.3)
                    elif "norm" in name:
                        parameter.uniform_(0.5, 1.5)
                for layer in model.model.layers[1:]:
                    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                        for parameter in projection.parameters():
                            parameter.mul_(self.upper_scale)
        model.to(getattr(torch, self.dtype)).save_pretrained(folder, max_shard_size=self.shard_size)
        write_tokenizer(folder, self.vocab)
        return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json: at most ``vocab_size`` tokens, id 0 ends a text.

    A vocabulary too small for all bytes keeps the printable ASCII ones; other bytes are dropped from a text.
    """
    special = [END, TURN_START, TURN_END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(special) + len(alphabet):
        alphabet = [*(chr(code) for code in range(ord("!"), ord("~") + 1)), "Ġ", "Ċ"]
    merges = [(pair.split()[0], pair.split()[1]) for pair in _MERGES.split("|")][
        : vocab_size - len(special) - len(alphabet)
    ]
    vocab = {token: index for index, token in enumerate([*special, *alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@dataclass(frozen=True)
class TinyBundles:
    """Tiny checkpoints and the bundles made from them, each made once per session."""

    folder: Path
    _made: dict[Any, Path] = field(default_factory=dict)

    def checkpoint(self, tiny: TinyModel) -> Path:
        """The checkpoint folder of one configuration; not to be changed."""
        if tiny not in self._made:
            self._made[tiny] = tiny.write(self.folder / f"checkpoint-{tiny.name}")
        return self._made[tiny]

    def bundle(self, tiny: TinyModel, *exit_layers: int, **options: Any) -> Path:
        """The bundle of one configuration, cut at the exits; not to be changed. Options are those of ExportSpec."""
        key = (tiny, exit_layers, *sorted(options.items()))
        if key not in self._made:
            out = self.folder / f"bundle-{len(self._made):03d}-{tiny.name}"
            export_bundle(ExportSpec(str(self.checkpoint(tiny)), out, exit_layers, **options))
            self._made[key] = out
        return self._made[key]


def _rope(kind: str, theta: float = 10000.0, **fields: float) -> tuple[tuple[str, Any], ...]:
    return tuple({"rope_type": kind, "rope_theta": theta, **fields}.items())


BASE = TinyModel("base")
LLAMA3_ROPE = _rope(
    "llama3",
    500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

SWITCHES: tuple[TinyModel, ...] = (
    BASE,
    TinyModel("attention-bias", attention_bias=True),
    TinyModel("mlp-bias", mlp_bias=True),
    TinyModel("all-biases-tied", attention_bias=True, mlp_bias=True, is_tied=True),
    TinyModel("multi-head", kv_heads=4),
    TinyModel("four-query-heads-per-kv-head", heads=8, kv_heads=2, head_dim=8),
    TinyModel("multi-query", kv_heads=1),
    TinyModel("tied", is_tied=True),
    TinyModel("rope-linear", rope=_rope("linear", factor=4.0)),
    TinyModel("rope-llama3", rope=LLAMA3_ROPE),
    TinyModel("rope-large-base", rope=_rope("default", 500000.0)),
    TinyModel("head-dim-8", head_dim=8),
    TinyModel("head-dim-20-biased", head_dim=20, attention_bias=True),
    TinyModel("head-dim-24", head_dim=24, hidden=48, heads=3, kv_heads=1),
    TinyModel("head-dim-40", head_dim=40, kv_heads=4),
    TinyModel("head-dim-64", head_dim=64, heads=2, kv_heads=1, hidden=96),
    TinyModel("odd-sizes", hidden=60, intermediate=100, vocab=131, heads=6, kv_heads=3, head_dim=10),
    TinyModel("odd-sizes-tied", hidden=60, intermediate=99, vocab=131, heads=5, kv_heads=5, head_dim=12, is_tied=True),
    TinyModel("two-layers", layers=2, hidden=32, intermediate=48),
    TinyModel("six-layers", layers=6),
    TinyModel("stored-bfloat16", dtype="bfloat16"),
    TinyModel("stored-float16", dtype="float16", is_tied=True),
    TinyModel("sharded", shard_size="60KB"),
)

SPECULATOR = replace(BASE, name="speculator", layers=6, upper_scale=0.12)
"""Six layers whose exits 1, 3 and 4 stand for SmolLM2's 4, 8 and 15 of 30."""
