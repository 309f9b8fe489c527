"""Which matrices a quantization rounds, and which option is about which of them, where some keep a checkpoint's blocks.

Of a matrix that keeps its blocks, no option changes anything. So an option may be about such matrices alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shortstack.graphs import names
from shortstack.graphs.exit_parts import ROWS
from shortstack.graphs.plan import SplitPlan
from shortstack.graphs.spec import ModelSpec
from shortstack.quant.preset import Preset, assign


@dataclass(frozen=True, slots=True)
class Reach:
    """What a quantization rounds.

    Attributes:
        preset: The preset.
        rounded: Number of matrices that are rounded.
        kept: Number of matrices that keep their blocks.
        options: How many matrices an option reaches, and how many it would reach if none kept its blocks; by the name
            of the option's value in ``quant/options.py``.
    """

    preset: Preset
    rounded: int
    kept: int
    options: Mapping[str, tuple[int, int]]

    @property
    def is_nothing(self) -> bool:
        """Whether the quantization would change nothing."""
        return self.rounded == 0 and self.preset.kv_cache == "float"

    @property
    def without_effect(self) -> tuple[str, ...]:
        """The options of which every matrix keeps its blocks."""
        return tuple(name for name, (reached, whole) in self.options.items() if whole and not reached)

    def line(self) -> str | None:
        """Return one sentence about what the preset does not reach; None where it reaches everything."""
        if not self.kept:
            return None
        if not self.rounded:
            return (
                f"warning: every matrix keeps the checkpoint's blocks: of --preset {self.preset.name} only the "
                f"{self.preset.kv_cache} cache has an effect"
            )
        others = "1 other" if self.rounded == 1 else f"{self.rounded} others"
        return f"note: {self.kept} matrices keep the checkpoint's blocks; --preset {self.preset.name} rounds {others}"


def reach_of(preset: Preset, spec: ModelSpec, plan: SplitPlan, kept: Collection[str]) -> Reach:
    """Return what a quantization rounds.

    Args:
        preset: What is wanted of each part.
        spec: The model.
        plan: Its exits.
        kept: The matrices that keep their blocks, by name.

    Raises:
        RequestError: The preset names a layer that the model does not have.
    """
    wanted = assign(preset, spec, plan)
    ends = {names.EMBED_TOKENS, names.LM_HEAD}
    heads = {names.exit_weight(depth, "head.weight"): f for depth, f in wanted.draft_heads.items()}
    formats = {**wanted.matrices, **wanted.tables, **wanted.exit_matrices, **heads}
    layers = wanted.matrices.keys() - ends
    producers = {name for name in layers if name.endswith(names.QKV_PROJ)}
    rounded = {name for name, block_format in formats.items() if block_format is not None}
    parts: dict[str, Collection[str]] = {
        "weights": layers - producers if names.QKV_PROJ in preset.parts else layers,
        "head": (wanted.matrices.keys() & ends) | wanted.tables.keys(),
        "draft_head": heads.keys() | {name for name in wanted.exit_matrices if name.endswith(ROWS)},
        "kv_producers": producers,
        "tuning": layers & rounded,
        "max_kl": wanted.matrices.keys(),
        **dict.fromkeys(("method", "block_size", "is_symmetric"), rounded),
    }
    options = {option: (len(set(about) - set(kept)), len(about)) for option, about in parts.items()}
    return Reach(preset, len(rounded - set(kept)), len(formats.keys() & set(kept)), options)
