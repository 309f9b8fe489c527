"""Reads ``adapter_config.json`` as peft saves it: the rank and the scale of a LoRA's factors, module by module.

Written against peft 0.21. A field that would make the result anything but W + s B A is refused. So is a field that is
unknown here and set to any value, because a later peft may give it a meaning. Serves :mod:`shortstack.export.adapter`
and knows nothing about tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shortstack.export.checkpoint import Config
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.read_file import parse_json_object, read_file

MERGE_REMEDY = (
    "merge it with peft, `PeftModel.from_pretrained(MODEL, FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)`, "
    "and export that folder"
)
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")
# The tensors' names say where the factors apply, and how training was started or run does not change the result.
_WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # init_lora_weights says if they are used
    "fan_in_fan_out",  # peft takes true for GPT-2's matrices [in, out] and false for all others, whatever it says
    *("ensure_weight_tying", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
)
_REMEDIES: Mapping[str, str] = {
    "alora_invocation_tokens": "train a plain LoRA: this one applies to some tokens only, and a merged model cannot",
    "arrow_config": "train a plain LoRA: this one is chosen token by token, and a merged model is not",
}
_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Named initializations that leave the model's own weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move
a part of the weights into the adapter, so that the adapter fits only the changed model."""

_SAVE_AGAIN = "save the adapter again"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_PATTERNS = 4096
_MAX_PATTERN_CHARS = 256
_MAX_PATTERN_CHOICES = 5


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The ranks of a LoRA's factors, and what their products are multiplied by.

    Attributes:
        rank: Inner width of the factors where no pattern says otherwise.
        alpha: Numerator of the scale where no pattern says otherwise.
        is_rank_stabilized: Divide by the square root of the rank (rsLoRA, https://arxiv.org/abs/2312.03732).
        ranks: Rank by pattern. The first pattern that matches a module's name, or the end of it after a dot, holds.
        alphas: The same for alpha.
    """

    rank: int
    alpha: float
    is_rank_stabilized: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Return the inner width of a module's factors."""
        key = matching_pattern(self.ranks, module)
        return self.rank if key is None else self.ranks[key]

    def scale_of(self, module: str) -> float:
        """Return s, the number by which the product of a module's factors is multiplied."""
        key = matching_pattern(self.alphas, module)
        alpha = self.alpha if key is None else self.alphas[key]
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def matching_pattern(patterns: Mapping[str, object], module: str) -> str | None:
    """Return the first pattern that matches a module's name, or its end after a dot (peft's ``get_pattern_key``)."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


def read_settings(file: Path) -> LoraSettings:
    """Read an ``adapter_config.json``.

    Raises:
        CheckpointError: The file is damaged, or a field is missing or of another type.
        UnsupportedError: It is another kind of adapter, or a LoRA that is not a sum of the model and scaled products.
    """
    content = read_file(file, CheckpointError, _SAVE_AGAIN, limit=_MAX_CONFIG_BYTES)
    config = Config(parse_json_object(content, file, CheckpointError, _SAVE_AGAIN), str(file))
    kind = config.read(str, "peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            config.where("peft_type"), found=repr(kind), expected="'LORA'", remedy=MERGE_REMEDY + ", if peft can"
        )
    _refuse_other_kinds(config)
    rank = config.read(int, "r")
    if rank < 1:
        raise config.wrong("r", "a positive integer")
    return LoraSettings(
        rank=rank,
        alpha=config.read(float, "lora_alpha"),
        is_rank_stabilized=config.read(bool, "use_rslora", False),
        ranks=_read_ranks(config),
        alphas={key: section.read(float, key) for section, key in _patterns(config, "alpha_pattern")},
    )


def _refuse_other_kinds(config: Config) -> None:
    """Refuse, in one message, all fields that make the adapter anything but a plain LoRA."""
    problems, remedies = [], []
    for key, value in sorted(config.data.items()):
        expected = "'none'" if key == "bias" else "nothing, or false"
        is_off = value == "none" if key == "bias" else not value
        if not is_off and key not in _WITHOUT_EFFECT and key not in _READ:
            problems.append(f"{key}: found {_shown(value)}, expected {expected}")
            remedies.append(_REMEDIES.get(key, MERGE_REMEDY))
    init = config.data.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _INITS)):
        problems.append(f"init_lora_weights: found {_shown(init)}, expected true, false or one of {', '.join(_INITS)}")
        remedies.append(
            "save it as a plain LoRA, with peft's "
            "`save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL)`"
        )
    if problems:
        raise UnsupportedError(
            f"{config.file}: this kind of LoRA cannot be merged here: {'; '.join(problems)}", remedy=remedies[0]
        )


def _read_ranks(config: Config) -> dict[str, int]:
    ranks = {}
    for section, key in _patterns(config, "rank_pattern"):
        ranks[key] = section.read(int, key)
        if ranks[key] < 1:
            raise section.wrong(key, "a positive integer")
    return ranks


def _patterns(config: Config, field: str) -> list[tuple[Config, str]]:
    """Return the object under a field, paired with each of its keys: regular expressions that are safe to try."""
    section = config.section(field)
    if section is None:
        return []
    if len(section.data) > _MAX_PATTERNS:
        raise UnsupportedError(
            config.where(field), found=f"{len(section.data)} patterns", expected=f"at most {_MAX_PATTERNS}"
        )
    for key in section.data:
        _check_pattern(config.where(field), key)
    return [(section, key) for key in section.data]


def _check_pattern(where: str, pattern: str) -> None:
    """Refuse text that is not a regular expression, and expressions that an untrusted file could make run for ever.

    Backtracking takes time that is exponential in groups that repeat, and polynomial in the number of choices.
    """
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern).replace("(?:", "(")
    choices = len(re.findall(r"[(*+?{]", bare))
    if len(pattern) > _MAX_PATTERN_CHARS or choices > _MAX_PATTERN_CHOICES or re.search(r"\)[*+{]", bare):
        raise UnsupportedError(
            where,
            found=f"the pattern {_shown(pattern)}",
            expected=f"at most {_MAX_PATTERN_CHARS} characters, at most {_MAX_PATTERN_CHOICES} groups and repetitions, "
            "and no group that repeats",
            remedy="write the modules' names instead",
        )
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: the pattern {_shown(pattern)} is not a regular expression ({error})") from None


def _shown(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
