"""Describes an architecture of llama.cpp as data: what its tensors are called, and which field of a config says what.

:mod:`shortstack.export.checkpoint.gguf_config` turns a file's metadata into a config by this table.
:mod:`shortstack.export.checkpoint.gguf_families` has one for each architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shortstack.export.checkpoint.gguf_model import GgufModel
from shortstack.export.checkpoint.gguf_names import LLAMA_NAMES
from shortstack.export.checkpoint.gguf_transforms import Transform

RMS_EPS, LAYER_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
GROWTH = "attention.temperature_scale"
"""How fast queries grow with their position."""
YARN_LOG = "rope.scaling.yarn_log_multiplier"
ROTATED: Mapping[str, Transform] = {"attn_q": "queries", "attn_k": "keys"}
"""Of architectures whose converter permutes the rows of q and k."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number of the metadata that the config has under another name.

    Attributes:
        key: The field, without the architecture.
        default: What llama.cpp takes where the field is absent; None if it must be there.
    """

    key: str
    default: float | None = None


@dataclass(frozen=True, slots=True)
class Windows:
    """How an architecture says which layers slide.

    Attributes:
        period: Each so many-th layer sees everything, unless the file lists the layers; 0 if all slide.
        default: The window that llama.cpp takes where the file has none; 0 for none.
        of_depth: The same for models of so many layers.
        is_required: The file must have one.
    """

    period: int
    default: int = 0
    of_depth: Mapping[int, int] = field(default_factory=dict)
    is_required: bool = False


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """One architecture; the defaults are those of Llama without biases.

    Attributes:
        model_type: The family in transformers.
        transformers_class: Its class.
        names: The Hugging Face name of each tensor.
        transforms: How tensors are read, by what they are; the others are read as they are.
        norm_eps: The config's field of the norms' epsilon, and the metadata's.
        biases: The config's fields that say whether a projection has a bias, and the projection.
        numbers: Further fields of the config.
        fixed: Fields of the config that have one value.
        renames: The config's fields of sizes where they are not named as Llama's.
        has_head_dim: The width of a head need not be hidden / heads.
        has_rope: It has a rotary embedding, and the fields that most architectures have describe it.
        rope_share: The config's field of the share of a head that is rotated; None if all of it is.
        windows: Which layers slide; None if none does.
        with_windows: What the file's model is where layers slide, if that is another family.
        with_growth: What the file's model is where queries grow with their position, if that is another family.
        local_theta: The base of sliding layers' own rotary embedding where the file does not say it: a number, or
            ``same`` as the others'. None if all layers share one rotary embedding.
        ignores: Fields of the metadata that llama.cpp does not read here, or that ``extend`` reads.
        in_config: Tensors that ``extend`` turns into fields of the config.
        has_layer_kinds: Layers that slide have other heads than the rest, and MLPs differ in width: ``extend`` reads
            these sizes. The width of a head that is read for all is that of a layer that slides.
        is_drafter: It drafts for a model, whose embedding it may use.
        extend: Returns further fields of the config, which follow from others and from the tensors.
    """

    model_type: str
    transformers_class: str
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    norm_eps: tuple[str, str] = ("rms_norm_eps", RMS_EPS)
    biases: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, Number] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    has_head_dim: bool = True
    has_rope: bool = True
    rope_share: str | None = None
    windows: Windows | None = None
    with_windows: GgufFamily | None = None
    with_growth: GgufFamily | None = None
    local_theta: float | Literal["same"] | None = None
    ignores: tuple[str, ...] = ()
    in_config: tuple[str, ...] = ()
    has_layer_kinds: bool = False
    is_drafter: bool = False
    extend: Callable[[GgufModel, Mapping[str, Any]], Mapping[str, object]] = lambda model, config: {}
