"""What is checked of quantized folders: tiny models, every scheme that is read, and the bundles made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from helpers.family_rows import FamilyRow
from helpers.quantized_float_folders import bitsandbytes, fp8
from helpers.quantized_folders import (
    INT8_INPUTS,
    QuantizedFolder,
    Scheme,
    awq,
    compressed,
    gptq,
    write_quantized,
)
from helpers.tiny_models import TinyModel, write_tokenizer
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec

LLAMA = TinyModel("wide", layers=3, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32, upper_scale=0.15)
TIED = TinyModel(
    "wide-tied", layers=3, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32, is_tied=True,
    upper_scale=0.15,
)  # fmt: skip
PADDED = TinyModel("wide-padded", layers=3, hidden=96, intermediate=128, heads=4, kv_heads=4, head_dim=24)
_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 256}
QWEN2 = FamilyRow("qwen2", "Qwen2", _SIZES)
PHI3 = FamilyRow("phi3", "Phi-3", _SIZES)
COHERE2 = FamilyRow("cohere2", "Command R7B", {**_SIZES, "logit_scale": 1.5})
"""Its checkpoints pair neighbouring columns of a head for rotation, so that rows of q and k move."""

EXITS = (1, 2)
KEPT: dict[str, Scheme] = {
    "GPTQ": gptq(),
    "GPTQ, asymmetric": gptq(4, 32, symmetric=False),
    "GPTQ v2, asymmetric": gptq(4, 128, symmetric=False, version=2),
    "GPTQ, one scale a row": gptq(4, -1, symmetric=False),
    "GPTQ, 8 bits": gptq(8, 128),
    "GPTQ, 3 bits": gptq(3, 64, symmetric=False),
    "GPTQ, 3 bits, symmetric": gptq(3, 64),
    "GPTQ, 2 bits": gptq(2, 32, version=2),
    "GPTQ, act-order": gptq(4, 32, act_order=True),
    "GPTQ, act-order, asymmetric": gptq(4, 64, symmetric=False, act_order=True),
    "GPTQ, mixed": gptq(4, 64, own_bits={"down_proj": 8}),
    "AWQ": awq(64),
    "AWQ, groups of 128": awq(128),
    "compressed-tensors": compressed(),
    "compressed-tensors, asymmetric": compressed(4, 128, symmetric=False),
    "compressed-tensors, act-order": compressed(4, 32, act_order=True),
    "compressed-tensors, 8 bits, channel": compressed(8, -1),
    "compressed-tensors, 8 bits, asymmetric": compressed(8, 64, symmetric=False),
    "compressed-tensors, W8A8": compressed(8, -1, layout="int-quantized", inputs=INT8_INPUTS),
}
FLOATS: dict[str, Scheme] = {
    "fp8": fp8(),
    "fp8, one scale": fp8("matrix"),
    "fp8, rows": fp8("rows"),
    "compressed-tensors, fp8": fp8("compressed-tensors"),
    "nf4": bitsandbytes(),
    "nf4, plain magnitudes": bitsandbytes(nested=False),
    "fp4": bitsandbytes("fp4"),
    "int8": bitsandbytes("int8"),
}
SCHEMES = KEPT | FLOATS
SPECULATED = (
    "GPTQ, asymmetric", "GPTQ, 8 bits", "GPTQ, act-order", "GPTQ, act-order, asymmetric", "GPTQ, mixed", "AWQ",
    "compressed-tensors, asymmetric", "compressed-tensors, W8A8",
)  # fmt: skip


@dataclass(frozen=True)
class Folders:
    """Quantized folders and their bundles, each made once."""

    folder: Path
    _made: dict[str, QuantizedFolder] = field(default_factory=dict)
    _bundles: dict[str, Path] = field(default_factory=dict)

    def __call__(self, model: TinyModel | FamilyRow, scheme: Scheme, name: str) -> QuantizedFolder:
        key = f"{model.name} {name}"
        if key not in self._made:
            place = self.folder / str(len(self._made))
            source = place / "floats"
            if isinstance(model, TinyModel):
                model.write(source)
            else:
                model.model().save_pretrained(source)
                write_tokenizer(source, 300)
            self._made[key] = write_quantized(source, place / "model", scheme)
        return self._made[key]

    def bundle(self, folder: QuantizedFolder, *, keep: bool, draft_vocab: int | None = None) -> Path:
        key = f"{folder.path} {keep} {draft_vocab}"
        if key not in self._bundles:
            out = self.folder / f"bundle-{len(self._bundles)}"
            export_bundle(ExportSpec(str(folder.path), out, EXITS, draft_vocab, keep_blocks=keep))
            self._bundles[key] = out
        return self._bundles[key]
