"""Translates the ``args`` of a Megatron checkpoint, its options, into a Hugging Face config and a list of exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shortstack.export.checkpoint.checkpoint import MAX_LAYERS
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.plan import Branch, Norm

_CHECKPOINT_VERSION = 3.0
_REQUIRED: tuple[tuple[str, object, object], ...] = (
    ("normalization", "LayerNorm", "RMSNorm"),
    ("swiglu", False, True),
    ("position_embedding_type", "learned_absolute", "rope"),
    ("rotary_percent", 1.0, 1.0),
    ("rotary_interleaved", False, False),
    ("use_rope_scaling", False, False),
    ("apply_layernorm_1p", False, False),
    ("apply_residual_connection_post_layernorm", False, False),
    ("transformer_impl", "local", "local"),
    ("num_experts", None, None),
    ("retro_add_retriever", False, False),
    ("virtual_pipeline_model_parallel_size", None, None),
    ("standalone_embedding_stage", False, False),
)
"""Each option with Megatron's default and the only value that can be exported."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class MegatronExit:
    """One exit, as EE-LLM's options describe it.

    Attributes:
        number: The layer that it belongs to, counted from 1, as in ``--exit-layer-nums``.
        exit_layer: Layers run before it. With ``--pre-exit`` an exit reads its layer's input, otherwise its output.
        branch: What the exit runs before its norm and head.
        norm: ``own`` or ``none``; EE-LLM's exits never share the final norm.
        has_own_head: The exit has its own head, which is neither the embedding nor another exit's.
    """

    number: int
    exit_layer: int
    branch: Branch
    norm: Norm
    has_own_head: bool


def read_args(values: Mapping[str, object], file: str) -> Config:
    """Return the options as a config; a value that is neither plain nor a list of such becomes its type's name."""
    return Config({name: _plain(value) for name, value in values.items()}, file, "args.")


def _plain(value: object) -> object:
    if type(value) in _PLAIN or (isinstance(value, list) and all(type(entry) in _PLAIN for entry in value)):
        return value
    return f"<{type(value).__name__}>"


def hugging_face_config(args: Config, version: object) -> dict[str, object]:
    """Return a ``config.json`` of ``model_type`` llama, without ``vocab_size``, which ``args`` alone do not tell.

    Args:
        args: The options.
        version: The file's ``checkpoint_version``; before 2.0 q, k and v are packed in a different order.

    Raises:
        CheckpointError: A field is missing or has the wrong type.
        UnsupportedError: The model cannot be exported; the message lists all differences.
    """
    found = {name: args.data.get(name, default) for name, default, _ in _REQUIRED}
    found |= {"checkpoint_version": _plain(version)}
    wanted = {name: value for name, _, value in _REQUIRED} | {"checkpoint_version": _CHECKPOINT_VERSION}
    if wrong := [name for name, value in wanted.items() if found[name] != value]:
        raise UnsupportedError(
            f"{args.file}: args describe a model that is not a Llama",
            found=", ".join(f"{name} = {found[name]!r:.60}" for name in wrong),
            expected=", ".join(f"{name} = {wanted[name]!r}" for name in wrong),
            remedy="export a model trained with --normalization RMSNorm --swiglu --position-embedding-type rope, "
            "without experts or virtual stages",
        )
    heads, hidden_size = args.read(int, "num_attention_heads"), args.read(int, "hidden_size")
    has_bias = args.read(bool, "add_bias_linear", True)
    factor = args.read(float, "rotary_seq_len_interpolation_factor", None)
    context = args.read(int, "max_position_embeddings", None)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": args.read(int, "num_layers"),
        "hidden_size": hidden_size,
        "intermediate_size": args.read(int, "ffn_hidden_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": args.read(int, "num_query_groups")
        if args.read(bool, "group_query_attention", False)
        else heads,
        "head_dim": args.read(int, "kv_channels", hidden_size // max(heads, 1)),
        "hidden_act": "silu",
        "rms_norm_eps": args.read(float, "norm_epsilon", args.read(float, "layernorm_epsilon", 1e-5)),
        "rope_theta": args.read(float, "rotary_base", 10000.0),  # EE-LLM knows no other base
        "rope_scaling": None if factor is None else {"rope_type": "linear", "factor": factor},
        "max_position_embeddings": args.read(int, "seq_length") if context is None else context,
        "tie_word_embeddings": not args.read(bool, "untie_embeddings_and_output_weights", False),
        "attention_bias": has_bias,
        "mlp_bias": has_bias,
    }


def read_exits(args: Config) -> tuple[MegatronExit, ...]:
    """Return the exits in the order of ``args.exit_layer_nums``; a plain Megatron model has none.

    Raises:
        CheckpointError: The numbers are not layers of the model, or it has an absurd number of layers.
        UnsupportedError: EE-LLM has no exits of this kind.
    """
    layers = args.read(int, "num_layers")
    if not 1 <= layers <= MAX_LAYERS:
        raise args.wrong("num_layers", f"1..{MAX_LAYERS}")
    numbers = args.data.get("exit_layer_nums") or []
    if (
        not isinstance(numbers, list)
        or not all(type(number) is int and 1 <= number <= layers for number in numbers)
        or len(set(numbers)) != len(numbers)
    ):
        raise args.wrong("exit_layer_nums", f"different layer numbers in 1..{layers}")
    if not numbers:
        return ()
    is_pre, has_mlp, has_block = (args.read(bool, f, False) for f in ("pre_exit", "use_exit_mlp", "use_exit_block"))
    if has_mlp and (is_pre or has_block):
        other = "pre_exit" if is_pre else "use_exit_block"
        raise UnsupportedError(f"{args.where('use_exit_mlp')} together with {other}, which EE-LLM does not run")
    return tuple(
        MegatronExit(
            number=number,
            exit_layer=number - is_pre,
            branch="mlp" if has_mlp else "block" if has_block else "none",
            norm="own" if args.read(bool, "use_exit_norm", False) else "none",
            has_own_head=args.read(bool, "untie_exit_output_weights", False),
        )
        for number in numbers
    )


def vocabulary_rows(args: Config, padded: int, ids: int) -> int:
    """Return how many rows of the embedding and of the heads to keep.

    Megatron rounds the size of a vocabulary up to a multiple and trains the added rows to be unlikely. These rows are
    cut off if rounding up the tokenizer's size gives the number of stored rows. If it does not, all rows are kept,
    since they may be tokens.

    Args:
        args: The options.
        padded: Number of stored rows.
        ids: Number of the tokenizer's ids, including added tokens; 0 if there is no tokenizer.

    Raises:
        CheckpointError: The number of rows in ``args`` differs from the number stored.
    """
    if args.read(int, "padded_vocab_size", padded) != padded:
        raise CheckpointError(
            args.where("padded_vocab_size"),
            found=args.read(int, "padded_vocab_size"),
            expected=f"{padded}, the rows of the embedding",
        )
    multiple = args.read(int, "make_vocab_size_divisible_by", 128) * args.read(int, "tensor_model_parallel_size", 1)
    return ids if multiple > 0 and ids > 0 and -(-ids // multiple) * multiple == padded else padded
