"""Every name that crosses a border: graph inputs and outputs, weights, files. A published name is never renamed.

Layer numbers are those of the full model in every graph, so a cache shared between graphs needs no table. A change here
bumps :data:`FORMAT_VERSION` of :mod:`shortstack.graphs.manifest`.
"""

from __future__ import annotations

from typing import TypeAlias

# Graph inputs
INPUT_IDS = "input_ids"
HIDDEN_STATES = "hidden_states"
SEQLENS_K = "seqlens_k"
TOTAL_SEQUENCE_LENGTH = "total_sequence_length"
NUM_ROWS = "num_rows"
EXIT_STATE = "exit_state"
ATTENTION_MASK = "attention_mask"  # of the uncut graph

# Graph inputs of the packed form only (graphs/packing.py)
QUERY_SEQLENS = "query_seqlens"
TO_SLOTS = "to_slots"
TO_ROWS = "to_rows"
ROW_POSITIONS = "row_positions"

# Graph outputs
HIDDEN_STATES_OUT = "hidden_states_out"
TOKEN = "token"
TOP_PROB = "top_prob"
MARGIN = "margin"
ENTROPY = "entropy"
LOGITS = "logits"
GATE = "gate"
EXIT_STATE_OUT = "exit_state_out"
FINAL_STATE = "final_state"
DRAFT_STATE = "draft_state"  # an input of a drafter, too
DRAFT_STATE_OUT = "draft_state_out"
LOGIT_IDS = "logit_ids"  # of a drafter whose head computes other tokens in each row

# Files of a bundle
MANIFEST_FILE = "bundle.json"
WEIGHTS_FILE = "weights.data"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG_FILE = "generation_config.json"
TEXT_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE, GENERATION_CONFIG_FILE)  # of the checkpoint
SPECIAL_TOKENS_FIELD = "special_tokens_map"  # of tokenizer_config.json: special tokens by name, as templates see them
QUANTIZATION_FILE = "quantization.json"  # how a quantized bundle was made from its source
UNFINISHED_FILE = "unfinished.json"  # how far a quantization is, in the hidden folder where it is being written
QUALITY_FILE = "quality.json"  # how a quantized bundle compares with its source
GENAI_GRAPH_FILE = "model.onnx"  # the uncut model, for onnxruntime-genai
GENAI_CONFIG_FILE = "genai_config.json"
GENAI_FILES = (GENAI_GRAPH_FILE, GENAI_CONFIG_FILE)

DRAFTER_FILE = "drafter.onnx"
FUSE_FILE = "drafter-fuse.onnx"

KV_PARTS = ("key", "value")
CacheOwner: TypeAlias = int | str
"""A producer layer; or the block of an exit, :func:`exit_block`; or a layer of the drafter, :func:`drafter_layer`."""


def exit_block(exit_layer: int) -> str:
    """Return the owner of the cache that the block of an exit has."""
    return f"exits.{exit_layer}"


def exit_depth(owner: str) -> int:
    """Return the exit whose block has this cache, the inverse of :func:`exit_block`."""
    return int(owner.removeprefix("exits."))


def drafter_layer(layer: int) -> str:
    """Return the owner of the cache that a layer of the drafter has."""
    return f"drafter.{layer}"


def feature(depth: int) -> str:
    """Return the output, and the input of a drafter, that carries the residual stream after ``depth`` layers."""
    return f"feature.{depth}"


def past(owner: CacheOwner, part: str) -> str:
    """Return the input that carries an owner's cache before the run; ``part`` is ``key`` or ``value``."""
    return f"past_key_values.{owner}.{part}"


def present(owner: CacheOwner, part: str) -> str:
    """Return the output that carries an owner's cache after the run: the same buffer as :func:`past`."""
    return f"present.{owner}.{part}"


def shared(layer: int, part: str) -> str:
    """Return the read-only input that carries the cache of a producer below the cut."""
    return f"shared.{layer}.{part}"


def new_rows(layer: int, part: str) -> str:
    """Return what carries the keys or values of a producer's new rows across a cut, in the packed form."""
    return f"new_rows.{layer}.{part}"


def segment_file(start: int, end: int) -> str:
    """Return the file of the segment that holds layers ``[start, end)``."""
    return f"layers-{start:02d}-{end:02d}.onnx"


def packed_file(start: int, end: int) -> str:
    """Return the file of that segment in its packed form, which runs rows of several sequences."""
    return f"packed-{start:02d}-{end:02d}.onnx"


def draft_vocab_file(exit_layer: int) -> str:
    """Return the file that maps the rows of a trimmed exit head to token ids: int64 [draft_vocab], ascending."""
    return f"draft-vocab-{exit_layer:02d}.npy"


# Weights, as they are called in the graphs and in the manifest
EMBED_TOKENS = "model.embed_tokens.weight"
EMBED_POSITIONS = "model.embed_positions.weight"  # of a model with learned positions
_EMBED_PER_LAYER = "per_layer.embed.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
UNIT_NORM = "unit_norm.weight"  # ones: where something is divided by its root mean square and nothing else
FINAL_NORM_BIAS = "model.norm.bias"  # of a final norm that has one


def is_looked_up(weight: str) -> bool:
    """Whether rows of a matrix are looked up by token ids, so that it must not be reordered."""
    return weight == EMBED_TOKENS or weight.endswith(f".{_EMBED_PER_LAYER}")


def rope_table(rope: int, part: str) -> str:
    """Return the table of a rotary embedding, by its number in the model; ``part`` is ``cos`` or ``sin``."""
    return f"rope.{rope}.{part}" if rope else f"rope.{part}"


ROPE_PARTS = ("cos", "sin")


def rope_tables(ropes: int) -> list[str]:
    """Return the names of all tables of a model with so many rotary embeddings."""
    return [rope_table(rope, part) for rope in range(ropes) for part in ROPE_PARTS]


# The parts of a matrix that is stored in blocks of small integers (graphs/precision.py)
BLOCK_PARTS = ("codes", "scales", "zero_points")


def block_part(weight: str, part: str) -> str:
    """Return the tensor that holds one part of a matrix; ``part`` is one of BLOCK_PARTS."""
    return f"{weight}.{part}"


def block_codes(weight: str) -> str:
    """Return the tensor that holds a matrix's packed codes."""
    return block_part(weight, "codes")


def block_scales(weight: str) -> str:
    """Return the tensor that holds a matrix's scales, one per block."""
    return block_part(weight, "scales")


def block_zero_points(weight: str) -> str:
    """Return the tensor that holds a matrix's packed zero points; absent where blocks are symmetric."""
    return block_part(weight, "zero_points")


def first_rows(weight: str) -> str:
    """Return the matrix that holds the first rows of a vocabulary matrix stored in two formats; ``weight`` the others.

    Byte-pair merges are numbered by falling frequency, so these are the rows of the tokens that matter most.
    """
    return f"{weight}.first_rows"


def kv_scale(layer: int, part: str) -> str:
    """Return the scales of a producer's int8 cache, float32 [kv_heads * head_dim]; ``part`` is ``key`` or ``value``."""
    return f"model.layers.{layer}.attn.{part}_scale"


# Parts of a layer that other modules name, for :func:`layer_weight`; the whole list is graphs/layer_weights.py
QKV_PROJ = "attn.qkv_proj.weight"
PER_LAYER_EMBED = "per_layer.embed.weight"  # a table whose rows are looked up
_INPUTS = {
    QKV_PROJ: "attn.qkv_proj",
    "attn.o_proj.weight": "attn.o_proj",
    "mlp.gate_proj.weight": "mlp.gate_up_proj",
    "mlp.up_proj.weight": "mlp.gate_up_proj",
    "mlp.down_proj.weight": "mlp.down_proj",
    **{f"per_layer.{name}.weight": f"per_layer.{name}" for name in ("context", "gate", "out")},
}


def side_factor(weight: str) -> str:
    """Return the right factor of the side product of a layer's matrix: one for all matrices with the same input."""
    return f"{_of_input(weight)}.side.weight"


def input_order(weight: str) -> str:
    """Return the order in which a matrix reads its input, int64 [in]: one for all matrices with the same input."""
    return f"{_of_input(weight)}.order"


def _of_input(weight: str) -> str:
    """Return a name for the input of a matrix; matrices outside the layers have one each."""
    found = next(((weight[: -len(part)], name) for part, name in _INPUTS.items() if weight.endswith(f".{part}")), None)
    return weight.removesuffix(".weight") if found is None else "".join(found)


def layer_weights(layer: int) -> str:
    """Return what the names of one layer's weights begin with."""
    return f"model.layers.{layer}"


def layer_weight(layer: int, part: str) -> str:
    """Return a weight of one layer; ``part`` is such as ``attn.qkv_proj.weight``."""
    return f"{layer_weights(layer)}.{part}"


def exit_weight(exit_layer: int, part: str) -> str:
    """Return a weight of one exit node; ``part`` is such as ``head.weight``."""
    return f"exits.{exit_layer}.{part}"


def drafter_weight(part: str) -> str:
    """Return a weight of the drafter; ``part`` is such as ``head.weight`` or ``layers.0.attn.o_proj.weight``."""
    return f"drafter.{part}"


def drafter_file(stage: int) -> str:
    """Return the graph of a drafter's layers and head, or of one stage of it."""
    return DRAFTER_FILE if stage == 0 else f"drafter-{stage}.onnx"


def drafter_vocab_file() -> str:
    """Return the file that maps the rows of a drafter's trimmed head to token ids: int64 [draft_vocab], ascending."""
    return "draft-vocab-drafter.npy"
