"""LCKV: Llama with keys and values shared between layers, as the repository whyNLP/LCKV trains and releases it.

The fields and their defaults are those of the repository's configs. ``LCKVLlamaConfig`` (``lckv-llama``) is that of its
main branch and of the checkpoints on the hub. ``OptLlamaConfig`` and ``ClaLlamaConfig`` (``opt-llama``, ``cla-llama``)
are those of the branch dev-lckv-publish, the code of https://arxiv.org/abs/2405.10637. No layer of an opt-llama sees
its own position. Tensors have Llama's names. A layer that uses another one's keys and values has no ``k_proj`` and
``v_proj``.

::

    lckv-llama   layer_types "0_1s_1_3"    the layer whose K,V each layer uses; s: it sees sliding_window positions
                 force_nodiag              no layer sees its own position
    opt-llama    layer_types "0_1_1_2_0"   0: its own K,V, 1: those of the target, 2: it is the target
                 target_layer              the target's number, counted from the top if negative
                 num_warmup_layers         an older form: this many layers of type 0, then type 1, the last one 2
    cla-llama    layer_types "2_1_2_1_0"   0 or 2: its own K,V, 1: those of the nearest layer below that has its own

The family of the resulting spec is ``llama``, since ``kv_map``, ``windows`` and ``masks_diagonal`` describe all of it.
LCKV's code runs a prompt in a number of passes (``forward_passes`` + ``backward_passes``, or ``num_encoders`` + 1).
Here that number counts only in training, see :mod:`shortstack.export.twin.folder`. The exported graphs compute the
exact result, that of decoding one token after another.

LCKV's code was run next to ours. That of opt-llama and cla-llama computes the same as ours, and so do the passes of
lckv-llama (commit dd21716, with flash attention's semantics). lckv-llama differs from its own passes where it decodes
one token after another, and where its eager attention masks position 0. Its flash attention is asked for one position
more than ``sliding_window``, which its eager attention keeps to. Here the eager attention's window holds.
"""

from __future__ import annotations

from dataclasses import replace

from shortstack.export.arch import llama
from shortstack.export.arch.kv_sharing import Sharing, read_window
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.kv_map import identity_kv_map, parse_layer_types
from shortstack.graphs.spec import ModelSpec

_DEFAULT_WINDOW = 4096
_OWN, _TARGETS, _TARGET = "0", "1", "2"


def read_spec(config: Config) -> ModelSpec:
    """Read a ``config.json`` of ``model_type`` lckv-llama; errors as in :func:`llama.read_spec`."""
    spec = llama.read_stack(config)
    layers = spec.num_hidden_layers
    text = config.read(str, "layer_types", None)
    kv_map, is_sliding = identity_kv_map(layers), (False,) * layers
    if text is not None:
        if (found := len(text.split("_"))) != layers:
            raise _wrong_length(config, found, layers)
        try:
            kv_map, is_sliding = parse_layer_types(text, layers)
        except ValueError as error:
            raise CheckpointError(
                f"{config.where('layer_types')}: {error}", expected="whose K,V each layer uses, such as 0_1s_1_3"
            ) from None
    window = read_window(config, _DEFAULT_WINDOW) if any(is_sliding) else 0
    windows = tuple(window if slides else 0 for slides in is_sliding)
    return Sharing(kv_map, windows, config.read(bool, "force_nodiag", False)).of(spec)


def read_opt_spec(config: Config) -> ModelSpec:
    """Read a ``config.json`` of ``model_type`` opt-llama; errors as in :func:`llama.read_spec`."""
    spec = llama.read_stack(config)
    layers = spec.num_hidden_layers
    types = _opt_layer_types(config, layers)
    target = config.read(int, "target_layer", -1)
    if not -layers <= target < layers:
        raise config.wrong("target_layer", f"{-layers}..{layers - 1}, a layer")
    target %= layers
    others = [layer for layer, kind in enumerate(types) if kind == _TARGET and layer != target]
    if others or (_TARGETS in types and types[target] != _TARGET):
        raise CheckpointError(
            config.where("layer_types"), found="_".join(types), expected=f"2 for layer {target}, target_layer, alone"
        )
    kv_map = tuple(target if kind == _TARGETS else layer for layer, kind in enumerate(types))
    return Sharing(kv_map, (), masks_diagonal=True).of(spec)


def read_cla_spec(config: Config) -> ModelSpec:
    """Read a ``config.json`` of ``model_type`` cla-llama; errors as in :func:`llama.read_spec`."""
    spec = llama.read_stack(config)
    types = _kinds(config, spec.num_hidden_layers)
    if types[0] == _TARGETS:
        raise config.wrong("layer_types", "0 or 2 for the first layer, which has none below it")
    kv_map: list[int] = []
    for layer, kind in enumerate(types):
        kv_map.append(kv_map[-1] if kind == _TARGETS else layer)
    return Sharing(tuple(kv_map), ()).of(spec)


def _opt_layer_types(config: Config, layers: int) -> list[str]:
    if "num_warmup_layers" in config:
        warmup = config.read(int, "num_warmup_layers")
        if not 0 <= warmup < layers:
            raise config.wrong("num_warmup_layers", f"0..{layers - 1}")
        return [_OWN] * warmup + [_TARGETS] * (layers - warmup - 1) + [_TARGET]
    return _kinds(config, layers)


def _kinds(config: Config, layers: int) -> list[str]:
    types = config.read(str, "layer_types", "_".join([_OWN] * layers)).split("_")
    if len(types) != layers:
        raise _wrong_length(config, len(types), layers)
    if not set(types) <= {_OWN, _TARGETS, _TARGET}:
        raise config.wrong("layer_types", "0, 1 or 2 for each layer, such as 0_1_1_2_0")
    return types


def _wrong_length(config: Config, found: int, layers: int) -> CheckpointError:
    return CheckpointError(
        config.where("layer_types"), found=f"{found} entries", expected=f"num_hidden_layers = {layers}"
    )


ARCH = replace(llama.ARCH, model_type="lckv-llama", read_spec=read_spec)
OPT_ARCH = replace(llama.ARCH, model_type="opt-llama", read_spec=read_opt_spec)
CLA_ARCH = replace(llama.ARCH, model_type="cla-llama", read_spec=read_cla_spec)
