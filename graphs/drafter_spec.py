"""What a trained drafter is, as data: a few layers beside the model that read what the model computes.

A drafter proposes the token after x[p+1] from the *pair* (u[p], x[p+1]): the token that is newer by one, and a state of
the position before. With e the embedding of x[p+1]::

    u  of a true row     the model's normalised final state, or W [f1 ; f2 ; ...] of its residual stream at some depths
       of a drafted row  what the drafter itself gave for the row before
    x  projected         x = P [token_norm(e) ; state_norm(u)] (+ b), which all layers then read as a stream
       stacked           x = u, and the first layer's attention reads [token_norm(e) ; state_norm(u)]
    y  = layers(x)       each with keys and values of its own, row p at position p
    head(final_norm(y)) gives the draft; y itself, or final_norm(y), is the state for the next row

Several layers for multi-token prediction (MTP) form *stages*, each with a projection, norms and one layer of its own.
Stage i gives draft i + 1, and reads of row p what stage i - 1 gave for it, and a token that is newer by i + 1::

    u[0][p] = the model's normalised final state;   u[i + 1][p] = stage i of the pair (u[i][p], x[p + 1 + i])

With T tokens, rows up to T - 2 - i of stage i are true; the i rows after them pair with drafts.

An *assistant*, as Gemma 4's, has no keys and values of its own: each layer reads those that a layer of the model has
written, and the drafter needs neither prompt nor refill. All rows of a round stand at the position of the newest token,
whose own keys and values do not exist yet. Its states are as wide as the model's, its layers may be narrower::

    x = P [e ; u];   y = final_norm(layers(x));   head(y) gives the draft;   Q y is the state for the next row

EAGLE-3 (https://arxiv.org/abs/2503.01840) is stacked and reads three depths. EAGLE-1 and 2
(https://arxiv.org/abs/2401.15077) and MTP layers (https://arxiv.org/abs/2412.19437) are projected and read the final
state. So are assistants (Gemma4AssistantForCausalLM in transformers). Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shortstack.graphs.layer_spec import Layer, Norm, Rope
from shortstack.graphs.spec import ModelSpec

DrafterKind = Literal["eagle3", "eagle", "mtp", "assistant"]
FeatureNorm = Literal["none", "all", "each"]
Feedback = Literal["stream", "normed", "projected"]


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """One drafter.

    Attributes:
        kind: What it is called where it was published. No graph depends on it.
        hidden_size: Width of its states.
        layers: Its layers, bottom to top. Their rope is a number in the model's ropes followed by ``ropes``.
        ropes: Rotary embeddings that the model does not have.
        features: Depths of the model's residual stream that it reads, ascending, each the number of layers run before;
            none where it reads the model's normalised final state.
        feature_norm: Before features are projected: ``none``, one norm over ``all`` of them, or one over ``each``.
        norm: The kind of all its norms outside the layers.
        is_stacked: The first layer's attention reads token and state side by side; else a projection does.
        state_first: Of the two, the state comes first.
        has_token_norm: Embeddings are normalised.
        has_state_norm: States are normalised, as read by the projection, or by the attention of a stacked one.
        normed_stream: Of a stacked one: the stream that the first layer adds to is the normalised state.
        input_bias: The projection has a bias.
        has_final_norm: The head reads normalised states; else the layers' own.
        feedback: What the next row gets: the layers' ``stream``, or what the head reads, ``normed``, or that
            ``projected`` to the width of states.
        embed_scale: What embeddings are multiplied by.
        has_own_embedding: It has an embedding of its own; else it reads the model's.
        has_own_head: It has a head of its own; else it uses the model's.
        draft_vocab: Rows of its own head, where these are not all token ids.
        shared: The layer of the model whose keys and values each layer reads; none where layers have their own. A
            window then counts the newest position, as in the model, though nothing is there to see.
        state_size: Width of states and embeddings, where feedback is projected to it; else 0, and they are as wide as
            the layers.
        centroids: Groups of rows that its own head has, of one size; 0 for a head that computes all rows. Of each
            group there is a centroid, and only the rows of the likeliest groups are computed.
        top_centroids: How many groups these are.
        most_drafts: How many tokens of a round it was trained for; 0 where that is not known.
        layer_per_draft: Each layer drafts one token of a round, see above.
    """

    kind: DrafterKind
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: Norm
    ropes: tuple[Rope, ...] = ()
    features: tuple[int, ...] = ()
    feature_norm: FeatureNorm = "none"
    is_stacked: bool = False
    state_first: bool = False
    has_token_norm: bool = True
    has_state_norm: bool = True
    normed_stream: bool = False
    input_bias: bool = False
    has_final_norm: bool = True
    feedback: Feedback = "stream"
    embed_scale: float = 1.0
    has_own_embedding: bool = False
    has_own_head: bool = False
    draft_vocab: int | None = None
    shared: tuple[int, ...] = ()
    state_size: int = 0
    centroids: int = 0
    top_centroids: int = 0
    most_drafts: int = 0
    layer_per_draft: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size is {self.hidden_size}, not 1 or more")
        if not self.layers:
            raise ValueError("a drafter has no layer")
        if list(self.features) != sorted(set(self.features)) or (self.features and self.features[0] < 1):
            raise ValueError(f"features are {list(self.features)}, not ascending depths of 1 or more")
        if self.feature_norm != "none" and not self.features:
            raise ValueError("feature_norm needs features")
        if self.layer_per_draft and (self.features or self.is_stacked or self.draft_vocab is not None):
            raise ValueError("layers that draft one token each need projections of the final state, and all token ids")
        if self.is_stacked and (self.input_bias or self.layers[0].before_attention is not None):
            raise ValueError("a stacked drafter has no projection, and its first layer no norm before attention")
        if self.normed_stream and not (self.is_stacked and self.has_state_norm):
            raise ValueError("normed_stream needs a stacked drafter with a norm of states")
        if self.draft_vocab is not None and (self.draft_vocab < 2 or not self.has_own_head):
            raise ValueError(f"draft_vocab is {self.draft_vocab}: a head of its own has 2 rows or more")
        if self.shared and len(self.shared) != len(self.layers):
            raise ValueError(f"shared has {len(self.shared)} entries for {len(self.layers)} layers")
        if self.shared and (self.features or self.is_stacked):
            raise ValueError("layers that read the model's keys and values need a projection of the final state")
        if bool(self.state_size) != (self.feedback == "projected") or (self.state_size and not self.shared):
            raise ValueError(
                f"state_size is {self.state_size}, feedback {self.feedback} and shared {list(self.shared)}: "
                "projected states belong to layers that read the model's keys and values"
            )
        if self.centroids and (not self.has_own_head or self.draft_vocab is not None or not self.shared):
            raise ValueError("centroids need an assistant with a head of its own, of all token ids")
        if self.top_centroids > self.centroids or (self.centroids and not self.top_centroids):
            raise ValueError(f"top_centroids is {self.top_centroids}, not 1..{self.centroids}")

    @property
    def state_width(self) -> int:
        """Width of its states, and of the embeddings beside them."""
        return self.state_size or self.hidden_size

    @property
    def stages(self) -> int:
        """How many graphs draft: one for all layers, or one for each."""
        return len(self.layers) if self.layer_per_draft else 1

    @property
    def input_width(self) -> int:
        """Width of token and state side by side."""
        return 2 * self.state_width

    @property
    def has_head_ids(self) -> bool:
        """Whether rows of its own head are not token ids, and a tensor says which they are."""
        return self.draft_vocab is not None or self.centroids > 0


def check_drafter(drafter: DrafterSpec, model: ModelSpec) -> None:
    """Check that a drafter fits a model.

    Raises:
        ValueError: Listing all that does not.
    """
    problems = []
    count = len(model.ropes) + len(drafter.ropes)
    for number, layer in enumerate(drafter.layers):
        rope = layer.attention.rope
        if rope is not None and rope >= count:
            problems.append(f"layer {number} has rope {rope}, and there are {count}")
    if beyond := [depth for depth in drafter.features if depth > model.num_hidden_layers]:
        problems.append(f"features {beyond} are beyond the model's {model.num_hidden_layers} layers")
    problems += _sharing_problems(drafter, model)
    name = "state_size" if drafter.state_size else "hidden_size"
    narrower = drafter.state_width != model.hidden_size
    if narrower and not drafter.features:
        problems.append(f"{name} is {drafter.state_width}, and the state that it reads has {model.hidden_size}")
    if narrower and not (drafter.has_own_embedding and drafter.has_own_head):
        problems.append(f"{name} is {drafter.state_width}, and the model's embedding and head have {model.hidden_size}")
    if drafter.draft_vocab is not None and drafter.draft_vocab > model.vocab_size:
        problems.append(f"draft_vocab is {drafter.draft_vocab}, and the model has {model.vocab_size} token ids")
    if drafter.centroids and model.vocab_size % drafter.centroids:
        problems.append(f"centroids are {drafter.centroids}, which does not divide {model.vocab_size} token ids")
    if problems:
        raise ValueError("; ".join(problems))


def _sharing_problems(drafter: DrafterSpec, model: ModelSpec) -> list[str]:
    """Say which layers cannot read the keys and values that they name."""
    problems = []
    for number, (owner, layer) in enumerate(zip(drafter.shared, drafter.layers, strict=False)):
        if owner >= model.num_hidden_layers or not model.owns_kv(owner):
            problems.append(f"layer {number} reads keys and values of layer {owner}, which has none of its own")
            continue
        own, theirs = layer.attention, model.layers[owner].attention
        for name in ("head_dim", "kv_heads", "rope"):
            found, expected = getattr(own, name), getattr(theirs, name)
            if found != expected:
                problems.append(f"layer {number} has {name} {found}, and layer {owner} of the model {expected}")
        if own.window == 1:
            problems.append(f"layer {number} sees nothing: its window is the newest position alone")
    return problems
