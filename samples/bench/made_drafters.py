"""Models with trained drafters as they are published, in their real sizes, for checkpoints of random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from shortstack.graphs.errors import RequestError
from shortstack.samples.bench.made_gemma4 import E2B, Assistant, assistant_of_e2b
from shortstack.samples.bench.made_model import SHAPES, Made, Shape, Tensor

_FEWEST_FOR_EAGLE3 = 4  # layers: there are three depths from 2 on


@dataclass(frozen=True, slots=True)
class Eagle3:
    """An EAGLE-3 head: one layer of the model's sizes that reads three depths and has a head of some tokens.

    Attributes:
        model: The model.
        draft_vocab: Tokens of its head, spread over the model's.
    """

    model: Shape
    draft_vocab: int

    @property
    def depths(self) -> list[int]:
        """The depths whose residual stream it reads: EAGLE's own, or the first three in a model of few layers."""
        layers = self.model.layers
        usual = [2, layers // 2, layers - 3]
        return usual if usual == sorted(set(usual)) else [2, 3, 4]

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return {
            **self.model.config(),
            "architectures": ["LlamaForCausalLMEagle3"],
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
            "draft_vocab_size": self.draft_vocab,
            "eagle_aux_hidden_state_layer_ids": self.depths,
        }

    def shards(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield the tensors of the one shard."""
        hidden, rows = self.model.hidden, np.arange(self.draft_vocab)
        found: dict[str, Tensor] = {
            "fc.weight": (hidden, len(self.depths) * hidden),
            "norm.weight": (hidden,),
            "lm_head.weight": (self.draft_vocab, hidden),
            "d2t": rows * (self.model.vocab // self.draft_vocab) - rows,
            "midlayer.hidden_norm.weight": (hidden,),
        }
        yield found | {f"midlayer.{name}.weight": shape for name, shape in self.model.layer(2 * hidden).items()}


@dataclass(frozen=True, slots=True)
class Mimo:
    """A MiMo: a Llama with biases of q, k and v, and a layer for multi-token prediction.

    Attributes:
        shape: The sizes of its layers.
    """

    shape: Shape

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        own = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1}
        return {**self.shape.config(), **own}

    def shards(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield the tensors of each shard: the model's, and last those of the further layer."""
        biases = {
            f"{module}.bias": (shape[0],)
            for module, shape in self.shape.layer().items()
            if module.startswith("self_attn.") and not module.endswith("o_proj")
        }
        ends, *layers = self.shape.shards()
        yield ends
        for number, shard in enumerate(layers):
            yield {**shard, **{f"model.layers.{number}.{name}": shape for name, shape in biases.items()}}
        hidden = self.shape.hidden
        own: dict[str, Tensor] = {f"{module}.weight": shape for module, shape in self.shape.layer().items()}
        own |= biases
        own |= {f"{name}_layernorm.weight": (hidden,) for name in ("token", "hidden", "final")}
        own["input_proj.weight"] = (hidden, 2 * hidden)
        yield {f"model.mtp_layers.0.{name}": tensor for name, tensor in own.items()}


@dataclass(frozen=True, slots=True)
class Pair:
    """A model and its drafter.

    Attributes:
        model: The model.
        drafter: Its drafter's checkpoint; None where the layers are in the model's own.
        layers: Of the model.
        labels: In what they differ from the published ones, besides their weights.
    """

    model: Made
    drafter: Made | None
    layers: int
    labels: tuple[str, ...] = ()


class Pairs(Protocol):
    """Models of one shape with their drafters."""

    def pair(self, layers: int | None) -> Pair:
        """Return the pair with a depth; None takes the usual one.

        Raises:
            RequestError: There are too few layers for the drafter.
        """
        ...


@dataclass(frozen=True, slots=True)
class WithEagle3:
    """Llamas with EAGLE-3 heads; see :class:`Pairs`.

    Attributes:
        shape: The model.
        draft_vocab: Tokens of the head.
    """

    shape: Shape
    draft_vocab: int

    def pair(self, layers: int | None) -> Pair:
        """See :meth:`Pairs.pair`."""
        shape = self.shape.with_layers(layers)
        _check_layers(shape.layers, _FEWEST_FOR_EAGLE3)
        return Pair(shape, Eagle3(shape, self.draft_vocab), shape.layers, _fewer(shape.layers, self.shape.layers))


@dataclass(frozen=True, slots=True)
class WithAssistant:
    """Models with the assistant of Gemma 4; see :class:`Pairs`.

    Attributes:
        assistant: The assistant, with its model.
    """

    assistant: Assistant

    def pair(self, layers: int | None) -> Pair:
        """See :meth:`Pairs.pair`."""
        whole = self.assistant.model
        model = whole if layers is None else whole.with_layers(layers)
        _check_layers(model.layers, 2)  # a sliding and a full one
        table = f"the table of tokens per layer has {model.table_rows} of {model.vocab} rows; a step reads one"
        labels = (*_fewer(model.layers, whole.layers), table)
        return Pair(model, replace(self.assistant, model=model), model.layers, labels)


@dataclass(frozen=True, slots=True)
class WithMtp:
    """MiMos with their layer for multi-token prediction; see :class:`Pairs`.

    Attributes:
        shape: The published model.
        usual: How many of its layers are made where nothing else is asked for.
    """

    shape: Shape
    usual: int

    def pair(self, layers: int | None) -> Pair:
        """See :meth:`Pairs.pair`."""
        shape = self.shape.with_layers(self.usual if layers is None else layers)
        trained = "its one layer was trained for one draft; further drafts run it again"
        return Pair(Mimo(shape), None, shape.layers, (*_fewer(shape.layers, self.shape.layers), trained))


def _check_layers(layers: int, fewest: int) -> None:
    if layers < fewest:
        raise RequestError("--layers", found=layers, expected=f"{fewest} or more, for this drafter")


def _fewer(layers: int, published: int) -> tuple[str, ...]:
    if layers == published:
        return ()
    return (f"{layers} of {published} layers, so a plain step is cheaper and a draft dearer in plain steps",)


PAIRS: Mapping[str, Pairs] = MappingProxyType(
    {
        "llama-1b-eagle3": WithEagle3(SHAPES["1b"], 32_000),
        "gemma4-e2b-assistant": WithAssistant(assistant_of_e2b(E2B)),
        "mimo-mtp": WithMtp(Shape(36, 4096, 11_008, 32, 8, 128, 151_680, is_tied=False), 4),
    }
)
"""Llama 3.2 1B with an EAGLE-3 head, Gemma 4 E2B with its assistant, MiMo-7B with its layer."""
