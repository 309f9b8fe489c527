"""MiMo-7B: Qwen2, and layers that predict further tokens, which are left out.

transformers has no class for it. https://arxiv.org/abs/2505.07608
"""

from __future__ import annotations

import logging
from dataclasses import replace

from shortstack.export.arch import qwen2
from shortstack.export.arch.make_family import architecture
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.spec import ModelSpec

log = logging.getLogger(__name__)


def _name_what_is_left_out(config: Config, spec: ModelSpec) -> ModelSpec:
    key = "num_nextn_predict_layers"
    count = config.read(int, key, 0)
    if count < 0:
        raise config.wrong(key, "0 or more")
    if count:
        log.info("%s is %d: model.mtp_layers, which predict further tokens, are left out", config.where(key), count)
    return spec


FAMILY = replace(
    qwen2.FAMILY,
    model_type="mimo",
    transformers_class="MiMoForCausalLM",
    extend=_name_what_is_left_out,
    is_in_transformers=lambda spec: False,
)

ARCH = replace(architecture(FAMILY), unread=r"model\.mtp_layers\.")
