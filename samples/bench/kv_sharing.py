r"""Time to first token and decoding of models that differ in what their layers share, on random weights of any shape.

::

    python -m shortstack.samples.bench.kv_sharing --layers 16 --hidden 2048 --exit-layer 8 \
        --kv-map none --kv-map pizza-bottom:8 --kv-map cla:2 --kv-map lckv:2

What is timed does not depend on the weights: they are random, rounded to int4 blocks, the caches floats. All models are
loaded at once and take turns; ratios are medians of a round's ratio to the first map. Above a KV-complete exit a prompt
runs with its last position only, so its time falls towards E / L; layers that use K,V from above run nine passes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.folder import save_twin
from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_bytes import kv_bytes_per_token
from shortstack.graphs.kv_map import check_boundaries, is_kv_complete, parse_kv_map
from shortstack.graphs.manifest import FORMAT_VERSION
from shortstack.graphs.names import MANIFEST_FILE
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import ModelSpec
from shortstack.graphs.spec_json import llama_spec, spec_to_json
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.preset import Preset
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import Model, load
from shortstack.samples.bench.figures import Spread, ratios, spread
from shortstack.samples.bench.report import machine, progress
from shortstack.samples.command import run_command
from shortstack.samples.fetch_model import cache_folder, default_model_path

_PASSES = 9  # LCKV's seven and two
_CACHE_VALUE_BYTES = 4  # float32
_INT4 = BlockFormat(4)
_PRESET = Preset("random", "", "rtn", weights=_INT4, head=_INT4, embedding=_INT4)


@dataclass(frozen=True, slots=True)
class Timed:
    """What one model took.

    Attributes:
        name: Its map, as it was given.
        is_complete: Whether nothing above the exit owns a cache.
        kv_bytes: Bytes of the cache per position.
        first_token: Time to the first token over that of the first map, by prompt length.
        first_token_s: The same in seconds.
        decode: Time of a decoded token over that of the first map, by prompt length.
    """

    name: str
    is_complete: bool
    kv_bytes: int
    first_token: dict[int, Spread]
    first_token_s: dict[int, Spread]
    decode: dict[int, Spread]


def random_bundle(spec: ModelSpec, exit_layers: Sequence[int], cache: Path) -> Path:
    """Return a bundle of random weights in int4, made if it is not there yet.

    Args:
        spec: The model.
        exit_layers: Where it is cut.
        cache: Folder of such bundles.
    """
    identity = json.dumps([spec_to_json(spec), list(exit_layers), FORMAT_VERSION], sort_keys=True)
    out = cache / f"random-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if (out / MANIFEST_FILE).is_file():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    files = open_checkpoint(str(default_model_path())).files()
    with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as folder:
        torch.manual_seed(0)
        twin = Twin(spec)
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02)
        save_twin(twin, Path(folder) / "checkpoint", files, dtype=torch.float16)
        del twin
        export_bundle(ExportSpec(f"{folder}/checkpoint", Path(folder) / "float", tuple(exit_layers)))
        shutil.rmtree(f"{folder}/checkpoint")
        quantize_bundle(QuantizeSpec(Path(folder) / "float", out, _PRESET))
    return out


def time_models(models: dict[str, Model], lengths: Sequence[int], rounds: int, decoded: int) -> dict[str, Any]:
    """Return seconds of first tokens and of decoded tokens by model, kind and prompt length; models take turns."""
    names = list(models)
    found: dict[str, dict[tuple[str, int], list[float]]] = {name: {} for name in names}
    for turn in range(rounds + 1):
        progress(f"round {turn} of {rounds}" if turn else "a warm-up")
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            for length in lengths:
                ids = [5 + (7 * position) % 1000 for position in range(length)]
                stats = models[name].generate(ids, max_new_tokens=decoded + 1, ignore_eos=True).stats
                if turn:
                    found[name].setdefault(("first", length), []).append(stats.prefill_s)
                    decode_s = (stats.draft_s + stats.verify_s) / decoded
                    found[name].setdefault(("decode", length), []).append(decode_s)
    return found


@click.command(context_settings={"max_content_width": 120, "show_default": True})
@click.option("--layers", type=click.IntRange(2), default=16)
@click.option("--hidden", type=click.IntRange(64), default=2048, help="A multiple of 64.")
@click.option("--intermediate", type=click.IntRange(64), help="Width of the MLP.  [default: 4 * hidden]")
@click.option("--kv-heads", type=click.IntRange(1), default=8)
@click.option("--exit-layer", type=click.IntRange(1), default=8, help="Where bundles are cut, if their map allows it.")
@click.option("--kv-map", "maps", multiple=True, default=("none", "pizza-bottom:8", "cla:2", "lckv:2"))
@click.option("--prompt", "lengths", type=click.IntRange(1), multiple=True, default=(16, 512, 2048))
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--decode", "decoded", type=click.IntRange(1), default=16, help="Tokens decoded after each prompt.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where bundles are kept.  [default: in our cache]")
@click.option("--json", "as_json", is_flag=True)
def bench(
    layers: int, hidden: int, intermediate: int | None, kv_heads: int, exit_layer: int, maps: tuple[str, ...],
    lengths: tuple[int, ...], rounds: int, decoded: int, cache: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare maps of K,V sharing on random models."""
    if hidden % 64 or (hidden // 64) % kv_heads:
        raise RequestError("--hidden, --kv-heads", found=f"{hidden}, {kv_heads}", expected="heads of 64, in groups")
    models: dict[str, Model] = {}
    facts: dict[str, tuple[bool, int]] = {}
    for name in maps:
        kv_map = parse_kv_map(name, layers)
        spec = llama_spec(
            model_type="llama",
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=intermediate or 4 * hidden,
            num_attention_heads=hidden // 64,
            num_key_value_heads=kv_heads,
            head_dim=64,
            vocab_size=49_152,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            max_position_embeddings=max(lengths) + decoded + 1,
            tie_word_embeddings=True,
            kv_map=kv_map,
        )
        exits: tuple[int, ...] = (exit_layer,)
        try:
            check_boundaries(kv_map, exits)
        except RequestError:
            exits = ()  # this depth is inside an iterated group
        progress(f"{name}: {'cut after ' + str(exit_layer) if exits else 'uncut'}")
        models[name] = load(random_bundle(spec, exits, cache or cache_folder() / "bench"), prefill_passes=_PASSES)
        facts[name] = bool(exits) and is_kv_complete(kv_map, exit_layer), kv_bytes_per_token(spec, _CACHE_VALUE_BYTES)
    found = time_models(models, lengths, rounds, decoded)
    base = found[maps[0]]
    timed = [
        Timed(
            name,
            *facts[name],
            {n: ratios(found[name]["first", n], base["first", n]) for n in lengths},
            {n: spread(found[name]["first", n]) for n in lengths},
            {n: ratios(found[name]["decode", n], base["decode", n]) for n in lengths},
        )
        for name in maps
    ]
    shape = {"layers": layers, "hidden": hidden, "exit_layer": exit_layer, "weights": "int4, random", "rounds": rounds}
    if as_json:
        click.echo(json.dumps({**machine(), **shape, "maps": [asdict(one) for one in timed]}, indent=2))
        return
    console = Console(width=140, highlight=False)
    console.print(", ".join(f"{key}: {value}" for key, value in {**machine(), **shape}.items()), style="dim")
    table = Table(box=None, pad_edge=False)
    for column in ("map", "KV bytes", *(f"first token, {n}" for n in lengths), *(f"decode, {n}" for n in lengths)):
        table.add_column(column, justify="left" if column == "map" else "right")
    for one in timed:
        firsts = [f"{one.first_token[n].show()} ({one.first_token_s[n].median:.2f} s)" for n in lengths]
        name = f"{one.name}{' (complete)' if one.is_complete else ''}"
        table.add_row(name, str(one.kv_bytes), *firsts, *(one.decode[n].show() for n in lengths))
    console.print(table)


def main() -> None:
    """Run the benchmark; a known error is one line and its exit code."""
    run_command(bench)


if __name__ == "__main__":
    main()
