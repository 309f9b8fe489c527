"""Bundles of small random models whose layers share keys and values, each created once per session."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helpers.kv_twins import kv_spec, random_twin
from helpers.tiny_models import write_tokenizer
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.folder import save_twin
from shortstack.export.twin.layer import Layer
from shortstack.export.twin.model import Twin


@dataclass(frozen=True)
class KVBundles:
    """Twins and bundles, by map and options.

    The options are the fields of ModelSpec, and ``calm_above``: above this number of layers, each layer adds a tenth of
    what it otherwise would. So the head changes few of an exit's tokens, and passes soon change nothing.
    """

    folder: Path
    _made: dict[Any, tuple[Twin, Path]] = field(default_factory=dict)
    _bundles: dict[Any, Path] = field(default_factory=dict)

    def twin(self, kv_map: tuple[int, ...], **changes: Any) -> Twin:
        """Return the model; do not change it."""
        return self._checkpoint(kv_map, changes)[0]

    def checkpoint(self, kv_map: tuple[int, ...], **changes: Any) -> Path:
        """Return the model's checkpoint folder; do not change it."""
        return self._checkpoint(kv_map, changes)[1]

    def bundle(self, kv_map: tuple[int, ...], *exit_layers: int, **changes: Any) -> Path:
        """Return the model's bundle, cut at the exits; do not change it."""
        key = (kv_map, exit_layers, *sorted(changes.items()))
        if key not in self._bundles:
            out = self.folder / f"bundle-{len(self._bundles)}"
            export_bundle(ExportSpec(str(self.checkpoint(kv_map, **changes)), out, exit_layers))
            self._bundles[key] = out
        return self._bundles[key]

    def _checkpoint(self, kv_map: tuple[int, ...], changes: dict[str, Any]) -> tuple[Twin, Path]:
        key = (kv_map, *sorted(changes.items()))
        if key not in self._made:
            number = len(self._made)
            fields = {"vocab_size": 131, "max_position_embeddings": 512, **changes}
            calm_above = fields.pop("calm_above", len(kv_map))
            with torch.random.fork_rng():
                torch.manual_seed(zlib.crc32(repr(key).encode()))  # the same model whichever tests run
                twin = random_twin(kv_spec(kv_map, **fields))
            _calm(twin, calm_above)
            tokenizer = self.folder / f"tokenizer-{number}"
            tokenizer.mkdir()
            write_tokenizer(tokenizer, twin.spec.vocab_size)
            files = {file.name: file.read_bytes() for file in tokenizer.iterdir()}
            save_twin(twin, self.folder / f"checkpoint-{number}", files)
            self._made[key] = twin, self.folder / f"checkpoint-{number}"
        return self._made[key]


@torch.no_grad()
def _calm(twin: Twin, depth: int) -> None:
    for layer in twin.model.layers[depth:]:
        assert isinstance(layer, Layer)
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.mul_(0.1)
