"""The options of `shortstack quantize` by what they are for, each group gathered into one value."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import click

from shortstack.command_options import Decorator, gather, given_flags, refuse_given
from shortstack.graphs import names
from shortstack.graphs.errors import RequestError
from shortstack.graphs.precision import BLOCK_SIZES, EXACT_BLOCK_SIZE, KV_TYPES, KVType
from shortstack.graphs.texts import CALIBRATION_TEXT, HELDOUT_TEXT
from shortstack.quant.method import METHODS
from shortstack.quant.preset import FORMAT_NAMES, Format, Preset, parse_format
from shortstack.quant.presets import PRESETS, find_preset
from shortstack.quant.reach import Reach
from shortstack.quant.side_product import TUNINGS, Tuning
from shortstack.quant.spec import CALIBRATION_TOKENS, HELDOUT_TOKENS, Quantization, ReportSpec

_FORMAT = click.Choice(FORMAT_NAMES)
_FILE = click.Path(path_type=Path)
_PRESETS = "; ".join(f"{preset.name}: {preset.summary}" for preset in PRESETS.values())


@dataclass(frozen=True, slots=True)
class Mixing:
    """A preset, and what is changed in it."""

    preset_name: str | None
    method: str | None
    weights: str | None
    head: str | None
    draft_head: str | None
    kv_producers: str | None
    kv_cache: KVType | None
    block_size: str | None
    is_symmetric: bool | None
    tuning: Tuning

    def preset(self) -> Preset:
        """Return the preset as it was changed; there must be one.

        Raises:
            RequestError: There is no preset of that name.
        """
        assert self.preset_name is not None
        preset = find_preset(self.preset_name)
        preset = preset.reshaped(None if self.block_size is None else int(self.block_size), self.is_symmetric)
        if self.weights is not None:
            preset = replace(preset, weights=self._format(self.weights), parts={}, layers={})
        if self.head is not None:
            head = self._format(self.head)
            preset = replace(preset, head=head, embedding=head, first_rows_format=None)
        if self.draft_head is not None:
            preset = replace(preset, draft_head=self._format(self.draft_head))
        if self.kv_producers is not None:
            preset = replace(preset, parts={**preset.parts, names.QKV_PROJ: self._format(self.kv_producers)})
        if self.method is not None:
            preset = replace(preset, method=self.method)
        if self.kv_cache is not None:
            preset = replace(preset, kv_cache=self.kv_cache)
        return preset

    def _format(self, name: str) -> Format:
        return parse_format(name, int(self.block_size or EXACT_BLOCK_SIZE), bool(self.is_symmetric))


@dataclass(frozen=True, slots=True)
class Calibrating:
    """What the weights are rounded for."""

    calibration: Path
    calibration_tokens: int
    max_kl: float | None

    def quantization(self, mixing: Mixing) -> Quantization:
        """Return what is asked for together with a mix of formats; errors as in :meth:`Mixing.preset`."""
        return Quantization(mixing.preset(), self.calibration, self.calibration_tokens, self.max_kl, mixing.tuning)


@dataclass(frozen=True, slots=True)
class Reporting:
    """How the result is compared with its source."""

    no_report: bool
    report_only: bool
    heldout: Path
    heldout_tokens: int

    def spec(self, bundle: Path, out: Path) -> ReportSpec | None:
        """Return the report that is wanted; None if none is.

        Raises:
            RequestError: It is wanted and not wanted, or a number is out of range.
        """
        if self.no_report and self.report_only:
            raise RequestError("--no-report and --report-only exclude each other", remedy="drop one of them")
        spec = ReportSpec(bundle, out, self.heldout, self.heldout_tokens)
        return None if self.no_report else spec

    def later(self, bundle: Path, out: Path) -> str:
        """Return the command that makes this report on the finished bundle."""
        words = ["shortstack", "quantize", str(bundle), str(out), "--report-only"]
        if self.heldout != HELDOUT_TEXT:
            words += ["--heldout", str(self.heldout)]
        if self.heldout_tokens != HELDOUT_TOKENS:
            words += ["--heldout-tokens", str(self.heldout_tokens)]
        return shlex.join(words)


def tell_reach(reach: Reach) -> None:
    """Say on stderr what a preset does not reach, and refuse options that would do nothing.

    Raises:
        RequestError: All matrices that an option is about keep the checkpoint's blocks.
    """
    refuse_given(
        reach.without_effect,
        "the matrices that it is about keep the checkpoint's blocks",
        "leave it out, or leave out --keep-blocks to round all matrices",
    )
    if (line := reach.line()) is not None:
        partly = {name: (n, whole) for name, (n, whole) in reach.options.items() if n < whole}
        flags = given_flags(partly)
        click.echo("; ".join((line, *(_reaches(flags[name], *partly[name]) for name in flags))), err=True)


def _reaches(flag: str, reached: int, whole: int) -> str:
    return f"{flag} reaches {reached} of {whole}"


def mixing_options(default: str | None, help_text: str) -> Decorator:
    """Return the options of a :class:`Mixing`, with or without a default preset."""
    preset = click.option(
        "--preset", "--recipe", "-r", "preset_name", default=default, show_default=default is not None, help=help_text
    )
    return gather(Mixing, "mixing", preset, *_MIXING, title="Formats")


PRESET_HELP = f"A named mix of formats; --recipe is an older spelling. {_PRESETS}."
_MIXING = (
    click.option(
        "--method", type=click.Choice(list(METHODS)), help="How weights are rounded.  [default: the preset's]"
    ),
    click.option("--weights", type=_FORMAT, help="Format of all matrices of the layers."),
    click.option("--head", type=_FORMAT, help="Format of the LM head, and of the embedding where it is tied."),
    click.option("--draft-head", type=_FORMAT, help="Format of the exits' heads: changes speed, never output."),
    click.option("--kv-producers", type=_FORMAT, help="Format of the q, k, v projections of layers that own a cache."),
    click.option("--kv-cache", type=click.Choice(KV_TYPES), help="Element type of the KV cache."),
    click.option(
        "--block-size",
        type=click.Choice([str(b) for b in BLOCK_SIZES]),
        help="Weights that share a scale; only 32 verifies drafts bit for bit.  [default: the preset's]",
    ),
    click.option(
        "--symmetric/--asymmetric",
        "is_symmetric",
        default=None,
        help="Blocks without or with a zero point.  [default: the preset's]",
    ),
    click.option(
        "--tuning",
        type=click.Choice(TUNINGS),
        default="keep",
        show_default=True,
        help="What to do about a fine-tuning that rounding would erase, because the weights before it came from a "
        "quantized file. keep: beside the blocks, as a product of low rank, or off the file's grid where it has none. "
        "off-grid: off the grid in any case. ignore: nothing.",
    ),
)
calibrating_options = gather(
    Calibrating,
    "calibrating",
    click.option(
        "--calibration",
        type=_FILE,
        metavar="FILE",
        default=CALIBRATION_TEXT,
        help="Text or jsonl that calibrated methods look at, instead of the shipped one.",
    ),
    click.option(
        "--calibration-tokens", type=int, default=CALIBRATION_TOKENS, show_default=True, help="How much of it."
    ),
    click.option(
        "--max-kl",
        type=float,
        metavar="X",
        help="Search the cheapest mix of int4, int8 and floats that stays under X nats of KL divergence per token.",
    ),
    title="Calibration",
)
reporting_options = gather(
    Reporting,
    "reporting",
    click.option("--no-report", is_flag=True, help="Do not compare the result with its source."),
    click.option(
        "--report-only",
        is_flag=True,
        help="OUT is finished: only compare it with BUNDLE, from which it was made, and put the report into it.",
    ),
    click.option(
        "--heldout",
        type=_FILE,
        metavar="FILE",
        default=HELDOUT_TEXT,
        help="Text or jsonl that the result is judged on, instead of the shipped one.",
    ),
    click.option(
        "--heldout-tokens",
        type=int,
        default=HELDOUT_TOKENS,
        show_default=True,
        help="Its length; more tokens take longer and measure more closely.",
    ),
    title="Report",
)
