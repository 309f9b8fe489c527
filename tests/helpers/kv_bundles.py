"""Bundles of small random models whose layers share keys and values, each made once per session."""

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
    """Twins and bundles by map and options: those of ModelSpec, and ``calm_above``, the number of layers above which
    each adds a tenth of what it would, so that the head changes its mind on few tokens, and passes soon on nothing.
    """

    folder: Path
    _made: dict[Any, tuple[Twin, Path]] = field(default_factory=dict)
    _bundles: dict[Any, Path] = field(default_factory=dict)

    def twin(self, kv_map: tuple[int, ...], **changes: Any) -> Twin:
        """The model; not to be changed."""
        return self._checkpoint(kv_map, changes)[0]

    def checkpoint(self, kv_map: tuple[int, ...], **changes: Any) -> Path:
        """Its folder; not to be changed."""
        return self._checkpoint(kv_map, changes)[1]

    def bundle(self, kv_map: tuple[int, ...], *exit_layers: int, **changes: Any) -> Path:
        """Its bundle, cut at the exits; not to be changed."""
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
