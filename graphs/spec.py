"""What a decoder-only model is, as plain data: enough to build its graphs and to allocate its cache.

Every reader (a Hugging Face config, GGUF metadata, a bundle.json) ends in one :class:`ModelSpec`; nothing after it
looks at a foreign config again. Standard library only.

Dimensions are spelled the same everywhere, here, in comments and in ONNX symbolic dims::

    batch     sequences decoded together        hidden    width of the residual stream
    seq       positions fed by this run         heads     query heads
    past      positions already in the cache    kv_heads  key/value heads
    total     past + seq                        head_dim  width of one head
    capacity  positions a cache buffer holds    rows      trailing positions the head is evaluated on
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from shortstack.graphs import names
from shortstack.graphs.kv_map import identity_kv_map, looks_up, validate_kv_map
from shortstack.graphs.layer_spec import Attention, Ends, Layer, Rope
from shortstack.graphs.layer_weights import Weight, layer_weights

DType = Literal["float32", "float16"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only model.

    Attributes:
        model_type: The family, as in ``config.json``; names the file in ``export/arch/``.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the embedding and of the LM head.
        max_position_embeddings: The longest context the model was made for, in tokens.
        tie_word_embeddings: The LM head is the embedding.
        layers: The decoder layers, bottom to top.
        ends: What stands before and after them.
        ropes: The rotary embeddings, which layers name by number.
        kv_map: Which layer's K,V each layer uses; producers map to themselves.
        masks_diagonal: No layer sees its own position, as in LCKV's released checkpoints; otherwise only those that use
            the K,V of a layer above them do not.

    Raises:
        ValueError: The parts do not fit each other.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    layers: tuple[Layer, ...]
    ends: Ends
    ropes: tuple[Rope, ...] = ()
    kv_map: tuple[int, ...] = ()
    masks_diagonal: bool = False

    def __post_init__(self) -> None:
        depth = len(self.layers)
        if not self.kv_map:
            object.__setattr__(self, "kv_map", identity_kv_map(depth))
        validate_kv_map(self.kv_map, depth)
        for number, layer in enumerate(self.layers):
            attention, producer = layer.attention, self.layers[self.kv_map[number]].attention
            if attention.rope is not None and attention.rope >= len(self.ropes):
                raise ValueError(f"layer {number} has rope {attention.rope}, and ropes has {len(self.ropes)} entries")
            if attention.rope is not None and self.ropes[attention.rope].head_dim != attention.head_dim:
                width = self.ropes[attention.rope].head_dim
                raise ValueError(
                    f"layer {number} has head_dim {attention.head_dim}, and entry {attention.rope} of ropes has {width}"
                )
            if _of_cache(attention) != _of_cache(producer):
                raise ValueError(
                    f"kv_map[{number}] = {self.kv_map[number]}, but the heads or ropes of these two layers differ"
                )

    @property
    def num_hidden_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.layers)

    @property
    def norm_eps(self) -> float:
        """Epsilon of the final norm, and of what exits normalise."""
        return self.ends.final_norm.eps

    @property
    def windows(self) -> tuple[int, ...]:
        """How many positions each layer sees, its own included (0 is all); empty where no layer has a window."""
        windows = tuple(layer.attention.window for layer in self.layers)
        return windows if any(windows) else ()

    def window(self, layer: int) -> int:
        """Return how many positions a layer sees, its own included; 0 is all."""
        return self.layers[layer].attention.window

    def sees_itself(self, layer: int) -> bool:
        """Return whether a layer sees its own position."""
        return not (self.masks_diagonal or looks_up(self.kv_map, layer))

    def owns_kv(self, layer: int) -> bool:
        """Return whether a layer makes keys and values, and keeps them in a cache of its own."""
        return self.kv_map[layer] == layer

    def reads_tokens(self, layers: Iterable[int]) -> bool:
        """Return whether one of these layers has a branch on the tokens themselves."""
        return any(self.layers[layer].per_layer_input is not None for layer in layers)

    def weights(self, layer: int) -> tuple[Weight, ...]:
        """Return the weights of a layer, in the order in which a bundle stores them."""
        return layer_weights(self.layers[layer], self.hidden_size, owns_kv=self.owns_kv(layer))

    def cache_attention(self, owner: names.CacheOwner) -> Attention:
        """Return the attention that a cache belongs to: that of a producer, or of the block of an exit."""
        if isinstance(owner, int):
            return self.layers[owner].attention
        return self.exit_block_layer(names.exit_depth(owner)).attention

    def exit_block_weights(self, depth: int) -> tuple[Weight, ...]:
        """Return the weights of the block that an exit after ``depth`` layers has."""
        return layer_weights(self.exit_block_layer(depth), self.hidden_size)

    def exit_block_layer(self, depth: int) -> Layer:
        """Return the layer that an exit with a block has: like the one below it, but that it sees all."""
        below = self.layers[depth - 1]
        attention = replace(below.attention, window=0)
        return replace(below, attention=attention, per_layer_input=None, has_scalar=False)

    def with_windows(self, windows: tuple[int, ...]) -> ModelSpec:
        """Return the model with other windows, one for each layer; none for ().

        Raises:
            ValueError: There are more or fewer than layers, or one is negative.
        """
        if windows and len(windows) != len(self.layers):
            raise ValueError(f"windows has {len(windows)} entries for {len(self.layers)} layers")
        pairs = zip(self.layers, windows or (0,) * len(self.layers), strict=True)
        layers = tuple(replace(layer, attention=replace(layer.attention, window=w)) for layer, w in pairs)
        return replace(self, layers=layers)


def _of_cache(attention: Attention) -> tuple[int, int, int | None]:
    """Return what a layer must have in common with the one whose cache it reads."""
    return attention.kv_heads, attention.head_dim, attention.rope
