"""HunYuan, dense: Llama whose queries and keys are normalised after their rotation.

A rotary embedding of type ``dynamic`` with an ``alpha`` has a larger base and is not dynamic.
https://arxiv.org/abs/2411.02265
"""

from __future__ import annotations

import math
from dataclasses import replace

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture
from shortstack.export.arch.rope_config import positive_float, rope_section
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.spec import ModelSpec


def _stretched(config: Config, spec: ModelSpec) -> ModelSpec:
    """Return the model, its rotary base grown as ``alpha`` says: theta * alpha ** (head_dim / (head_dim - 2))."""
    section = rope_section(config)
    if section is None or not section.data.get("alpha"):
        return spec
    if "dynamic" not in (section.data.get("rope_type"), section.data.get("type")):
        return spec
    alpha, (rope,) = positive_float(section, "alpha"), spec.ropes
    if rope.head_dim <= 2:
        raise section.wrong("alpha", "null, for heads of 2 columns")
    try:
        theta = rope.theta * alpha ** (rope.head_dim / (rope.head_dim - 2))
    except OverflowError:
        theta = math.inf
    if not 1 < theta < math.inf:
        raise section.wrong("alpha", "a number that gives a finite rotary base above 1")
    return replace(spec, ropes=(replace(rope, theta=theta),))


FAMILY = Family(
    model_type="hunyuan_v1_dense",
    transformers_class="HunYuanDenseV1ForCausalLM",
    sources=llama_sources({"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"}),
    norm_eps=Key("rms_norm_eps", 1e-5),
    qk_norm="head",
    qk_norm_after_rope=True,
    neutral={"use_cla": False},
    extend=_stretched,
)

ARCH = architecture(FAMILY)
