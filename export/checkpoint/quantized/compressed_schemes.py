"""What the config of compressed-tensors describes: one scheme for each group of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.export.checkpoint.quantized.codes import group_count, is_group_size
from shortstack.graphs.errors import CheckpointError, UnsupportedError

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_STRATEGIES = ("group", "channel", "tensor", "block")
_WIDTHS = {"int": (4, 8), "float": (8,)}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one group of the config says that weights are quantized.

    Attributes:
        where: The field of the config.
        kind: Integers or 8-bit floats.
        bits: Of a code.
        strategy: What shares a scale.
        group: Columns that share a scale; -1 for all.
        blocks: Rows and columns that share a scale, where they are blocks.
        symmetric: Whether there are no zero points.
        is_reordered: Whether columns may belong to any group.
        rounds_inputs: Whether activations are quantized, too.
    """

    where: str
    kind: Literal["int", "float"]
    bits: int
    strategy: str
    group: int
    blocks: tuple[int, int] | None
    symmetric: bool
    is_reordered: bool
    rounds_inputs: bool

    def has_scales(self, found: tuple[int, ...], shape: tuple[int, int]) -> bool:
        """Whether scales of integers have this shape for a matrix."""
        if self.strategy == "tensor":
            return found in ((), (1,), (1, 1))
        return found == (shape[0], group_count(shape[1], self.group))

    @property
    def weights(self) -> tuple[object, ...]:
        """What it says of weights alone."""
        return self.kind, self.bits, self.strategy, self.group, self.blocks, self.symmetric, self.is_reordered


def read_schemes(section: Config) -> list[Scheme]:
    """Read the config.

    Raises:
        CheckpointError: A field is missing or no valid value.
        UnsupportedError: It describes weights of a kind that is not read.
    """
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.read(str, "format", "dense") != "dense":
        name = sparsity.read(str, "format", "dense")
        raise not_one_of(sparsity.where("format"), name, ("dense",), "take a checkpoint whose weights are not sparse")
    _check_format(section)
    groups = section.section("config_groups")
    if groups is None or not groups.data:
        raise CheckpointError(
            f"{section.where('config_groups')} is missing or empty",
            expected="a description of the weights",
            remedy="take config.json from the model's repository",
        )
    found = []
    for name in groups.data:
        group = groups.section(name)
        weights = None if group is None else group.section("weights")
        if group is not None and weights is not None:  # else activations or caches alone
            _check_format(group)
            found.append(_read_scheme(group, weights))
    if not found:
        raise CheckpointError(
            f"{section.where('config_groups')} describes no weights",
            remedy="take config.json from the model's repository",
        )
    return found


def _check_format(section: Config) -> None:
    name = section.read(str, "format", None)
    if name is not None and name not in _FORMATS:
        raise not_one_of(section.where("format"), name, _FORMATS, "export the model that it was made from")


def _read_scheme(group: Config, weights: Config) -> Scheme:
    kind, bits = weights.read(str, "type", "int"), weights.read(int, "num_bits", 8)
    strategy = weights.read(str, "strategy", "group" if "group_size" in weights else "tensor")
    if strategy not in _STRATEGIES:
        raise not_one_of(weights.where("strategy"), strategy, _STRATEGIES, "export the model that it was made from")
    if bits not in _WIDTHS.get(kind, ()) or (kind == "int" and strategy == "block"):
        raise UnsupportedError(
            weights.where("num_bits"),
            found=f"{kind}{bits}, strategy {strategy}",
            expected="int4 or int8 in groups, channels or tensors, or float8",
            remedy="export the model that it was made from, then shrink the bundle with `shortstack quantize`",
        )
    size = -1
    if strategy == "group":
        size = weights.read(int, "group_size")
        if kind == "int" and not is_group_size(size):
            raise weights.wrong("group_size", "-1 or a multiple of 32")
    blocks = None
    if strategy == "block":
        shape = weights.read_ints("block_structure")
        if len(shape) != 2 or min(shape) < 1:
            raise weights.wrong("block_structure", "two positive sizes")
        blocks = shape[0], shape[1]
    return Scheme(
        weights.where("num_bits").removesuffix(".num_bits"),
        "int" if kind == "int" else "float",
        bits,
        strategy,
        size,
        blocks,
        weights.read(bool, "symmetric", True),
        weights.data.get("actorder") in ("group", "dynamic", True),
        group.section("input_activations") is not None,
    )
