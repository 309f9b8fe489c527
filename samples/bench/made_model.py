"""Writes checkpoints of random weights in the shapes of real models, shard by shard: what memory and time depend on.

The tokenizer has one token a byte, so texts of any kind can be calibrated on. What such a model says means nothing.
``python -m shortstack.samples.bench.made_model FOLDER --shape 1b`` makes one for other measurements.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import click
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shortstack.graphs.kv_map import parse_kv_map
from shortstack.samples.command import run_command

_ROWS = 4096  # written at a time
_STD = 0.02

Tensor = tuple[int, ...] | npt.NDArray[np.int64]
"""The shape of a tensor of random values, or the whole numbers that it holds."""


class Made(Protocol):
    """A checkpoint that can be made."""

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        ...

    def shards(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield the tensors of each shard, by name."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes.

    Attributes:
        layers: Layers.
        hidden: Width of the residual stream.
        inner: Width of the MLP.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        vocab: Tokens.
        is_tied: Whether the LM head is the embedding.
        kv_map: The layer whose keys and values each layer reads; empty where each has its own.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool
    kv_map: tuple[int, ...] = ()

    def with_layers(self, layers: int | None) -> Shape:
        """Return the shape with another depth; None keeps it."""
        return self if layers is None else replace(self, layers=layers)

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        shared = {"kv_map": list(self.kv_map)} if self.kv_map else {}
        return {
            **shared,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.is_tied,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Yield the tensors of each shard: the ends first, then layer by layer."""
        ends = {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        yield ends if self.is_tied else {**ends, "lm_head.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            own = self.layer()
            if self.kv_map and self.kv_map[layer] != layer:
                del own["self_attn.k_proj"], own["self_attn.v_proj"]
            yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}

    def layer(self, read: int | None = None) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's weights by module; attention reads ``read`` columns, or the hidden ones."""
        queries, keys, read = self.heads * self.head_dim, self.kv_heads * self.head_dim, read or self.hidden
        return {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (queries, read),
            "self_attn.k_proj": (keys, read),
            "self_attn.v_proj": (keys, read),
            "self_attn.o_proj": (self.hidden, queries),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "1b": Shape(16, 2048, 8192, 32, 8, 64, 128_256, is_tied=True),
        "8b": Shape(32, 4096, 14_336, 32, 8, 128, 128_256, is_tied=False),
    }
)
"""The shapes of Llama 3.2 1B and Llama 3.1 8B."""


def write_model(folder: Path, shape: Made) -> None:
    """Write a checkpoint in bfloat16 with a tokenizer; a few rows are in memory at a time."""
    write_weights(folder, shape)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{letter: number + 1 for number, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_weights(folder: Path, shape: Made) -> None:
    """Write a checkpoint as :func:`write_model` does, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    rng = np.random.default_rng(0)
    for number, tensors in enumerate(shape.shards()):
        name = f"model-{number:05d}.safetensors"
        _write_shard(folder / name, tensors, rng)
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")


def _write_shard(path: Path, tensors: Mapping[str, Tensor], rng: np.random.Generator) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        shape, kind, size = (tensor, "BF16", 2) if isinstance(tensor, tuple) else (tensor.shape, "I64", 8)
        start, end = end, end + size * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            if isinstance(tensor, tuple):
                _write_random(file, name, tensor, rng)
            else:
                file.write(tensor.astype("<i8").data)


def _write_random(file: BinaryIO, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """Write values in bfloat16: ones for a vector, which is a norm, unless it is a bias."""
    is_norm = len(shape) == 1 and not name.endswith(".bias")
    for start in range(0, shape[0], _ROWS):
        some = (min(_ROWS, shape[0] - start), *shape[1:])
        values = np.ones(some, np.float32) if is_norm else rng.standard_normal(some, np.float32) * _STD
        file.write((values.view(np.uint32) >> 16).astype("<u2").data)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1b", help="Of which model.")
@click.option("--layers", type=click.IntRange(1), help="Another number of layers.  [default: the model's]")
@click.option("--kv-map", help="Which layers share keys and values, such as pizza-bottom:4.  [default: none do]")
def main(folder: Path, shape: str, layers: int | None, kv_map: str | None) -> None:
    """Write a checkpoint of random weights to FOLDER."""
    made = SHAPES[shape].with_layers(layers)
    write_model(folder, made if kv_map is None else replace(made, kv_map=parse_kv_map(kv_map, made.layers)))


if __name__ == "__main__":
    run_command(main)
