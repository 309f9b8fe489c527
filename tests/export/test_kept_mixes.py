"""Files as llama.cpp mixes them, and blocks of other tools: what a bundle keeps, computes and decodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from helpers.bad_input import Refused, left_behind
from helpers.block_kinds import Kind
from helpers.gguf_files import byte_level, of_checkpoint, write
from helpers.speculation import check_drafts
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.export.arch import resolve
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import Checkpoint, open_checkpoint
from shortstack.export.checkpoint.checkpoint import StoredBlocks
from shortstack.export.checkpoint.gguf_blocks import BLOCK_TYPES
from shortstack.export.checkpoint.hf import HuggingFaceCheckpoint
from shortstack.export.kept_blocks import KeptBlocks
from shortstack.export.spec import ExportSpec
from shortstack.export.tensors import ModelTensors
from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.ir.block_tensor import nearest
from shortstack.graphs.ir.read_matrix import StoredMatrices
from shortstack.graphs.precision import BlockFormat
from shortstack.runtime import load
from shortstack.runtime.commands.row_check import check_rows

TINY = replace(
    SPECULATOR, name="k-quants", layers=3, hidden=256, intermediate=256, head_dim=64, upper_scale=0.12, is_tied=True
)
"""As wide as a block of a K-quant."""
UNTIED = replace(TINY, name="k-quants-untied", is_tied=False)
EXITS = (1, 2)
TOKENS = 24
LAYERS = range(TINY.layers)

# What llama.cpp's presets do in short: v and down in more bits in some layers, embedding and head in Q6_K.
Q4_K_M = {"token_embd.weight": "Q6_K", "blk.0.attn_v.weight": "Q6_K", "blk.0.ffn_down.weight": "Q6_K"}
Q3_K_M = {"token_embd.weight": "Q6_K", "blk.0.attn_v.weight": "Q5_K", "blk.1.ffn_down.weight": "Q4_K"}
IQ4_XS = {"token_embd.weight": "Q6_K", "blk.0.attn_v.weight": "Q5_K", "blk.1.attn_v.weight": "IQ4_NL"}
Q5_K_M = {"token_embd.weight": "Q4_K", "output.weight": "Q4_K", "blk.2.attn_v.weight": "Q6_K"}
MIXES = {
    "Q2_K": ("Q2_K", {}),
    "Q3_K": ("Q3_K", {}),
    "Q4_K": ("Q4_K", {}),
    "Q6_K": ("Q6_K", {}),
    "Q4_1": ("Q4_1", {"token_embd.weight": "Q8_0"}),
    "Q4_K_M": ("Q4_K", Q4_K_M),
    "Q3_K_M": ("Q3_K", Q3_K_M),
    "IQ4_XS": ("IQ4_XS", IQ4_XS),
    "Q5_K_M, untied": ("Q5_K", Q5_K_M),
}

ROUNDED_ACTIVATIONS = 0.05
"""As in test_gguf_blocks.py: mean difference of a logit by the logits' standard deviation. Measured: 0.023 (Q3_K, Q6_K)
to 0.042 (Q4_K), the errors of nearly kept weights included."""


def file_of(tiny_bundles: TinyBundles, folder: Path, mix: str) -> Path:
    kind, others = MIXES[mix]
    tiny = UNTIED if mix.endswith("untied") else TINY
    tensors = of_checkpoint(tiny_bundles.checkpoint(tiny), tiny.layers)
    kinds = {name: Kind[other] for name, other in others.items()}
    return write(folder / "m.gguf", tensors, edit=byte_level, quantization=Kind[kind], kinds=kinds, tiny=tiny)


def floats_of(checkpoint: Checkpoint) -> ModelTensors:
    return ModelTensors(checkpoint, *resolve(checkpoint), KeptBlocks())


def kept_matrices(bundle: Bundle, floats: ModelTensors) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The matrices in blocks of a bundle and what they are in the checkpoint, [out, in]."""
    stored, found = StoredMatrices(bundle), {}
    for name in bundle.manifest.origins:
        expected = floats.matrix(name)
        assert isinstance(expected, np.ndarray)
        found[name] = stored.matrix(name, expected.shape), expected
    return found


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_kept_computes_what_its_floats_do_and_verifies_exactly(
    tiny_bundles: TinyBundles, tmp_path: Path, mix: str
) -> None:
    file = file_of(tiny_bundles, tmp_path, mix)
    bundle = export_bundle(ExportSpec(str(file), tmp_path / "kept", EXITS, 64, keep_blocks=True))
    matrices = kept_matrices(bundle, floats_of(open_checkpoint(str(file))))
    assert (
        matrices.keys() | {names.exit_weight(e, "head.weight") for e in EXITS}
        == bundle.manifest.precision.weights.keys()
    )
    for name, (found, expected) in matrices.items():
        origin = bundle.manifest.origins[name]
        assert origin.is_kept
        is_exact = all(BLOCK_TYPES[kind].is_exact for kind in origin.kind.split("+"))
        assert (origin.fate == "exact") == is_exact
        if is_exact:
            np.testing.assert_array_equal(found, expected)
        else:
            measured = np.square(found - expected).sum() / np.square(expected).sum()
            assert origin.error == pytest.approx(measured**0.5, rel=1e-3)
            assert origin.error < 0.01
    model = load(bundle.folder)
    floats = load(export_bundle(ExportSpec(str(file), tmp_path / "floats", EXITS, 64)).folder)
    text = np.random.randint(3, TINY.vocab, 48).tolist()
    ours, theirs = (loaded.activations(text).heads for loaded in (model, floats))
    for depth, logits in theirs.items():
        error = np.abs(ours[depth] - logits).mean() / logits.std()
        print(f"{mix}, {depth} layers: {error:.4f}")
        assert 0 < error < ROUNDED_ACTIVATIONS
    assert all(check.is_exact for check in check_rows(model, text))
    check_drafts(model, EXITS, TINY.vocab, TOKENS, 6)


def test_a_stack_of_several_types_takes_the_narrowest_format_that_holds_all(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    def formats(mix: str) -> dict[str, str]:
        bundle = export_bundle(
            ExportSpec(str(file_of(tiny_bundles, tmp_path, mix)), tmp_path / mix, (1,), keep_blocks=True)
        )
        return {name: str(block_format) for name, block_format in bundle.manifest.precision.weights.items()}

    qkv = [names.layer_weight(layer, "attn.qkv_proj.weight") for layer in LAYERS]
    found = formats("Q4_K_M")
    assert found[qkv[0]] == "int8, blocks of 16"  # Q6_K has the small blocks, Q4_K the zero points
    assert found[qkv[1]] == "int4 with offsets, blocks of 32"
    assert found[names.EMBED_TOKENS] == "int8 symmetric, blocks of 16"
    found = formats("IQ4_XS")
    assert found[qkv[0]] == "int8, blocks of 32"
    assert found[qkv[1]] == found[qkv[2]] == "int8 symmetric, blocks of 32"
    found = formats("Q5_K_M, untied")
    assert found[names.EMBED_TOKENS] == found[names.LM_HEAD] == "int8, blocks of 32"  # no offsets are looked up


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K"])
def test_in_half_precision_the_error_of_rounded_scales_is_told(
    tiny_bundles: TinyBundles, tmp_path: Path, kind: str
) -> None:
    file = file_of(tiny_bundles, tmp_path, kind)
    bundle = export_bundle(ExportSpec(str(file), tmp_path / "out", (1,), dtype="float16", keep_blocks=True))
    matrices = kept_matrices(bundle, floats_of(open_checkpoint(str(file))))
    for name, (found, expected) in matrices.items():
        origin = bundle.manifest.origins[name]
        assert origin.fate == "near"
        measured = np.square(found - expected).sum() / np.square(expected).sum()
        assert origin.error == pytest.approx(measured**0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("mix", "tensor", "place"),
    [
        ("Q6_K", "blk.1.ffn_down.weight", 208),
        ("Q4_K", "blk.0.attn_k.weight", 2),  # dmin, of one type in a stack
        ("Q4_K_M", "blk.0.attn_q.weight", 0),
        ("IQ4_XS", "token_embd.weight", 208),
    ],
)
@pytest.mark.parametrize("half", [0x7C00, 0x7E00], ids=["inf", "nan"])
def test_a_scale_that_is_not_a_number_is_refused_and_nothing_is_written(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused, mix: str, tensor: str, place: int, half: int
) -> None:
    file = file_of(tiny_bundles, tmp_path, mix)
    start = next(entry.data_offset for entry in gguf.GGUFReader(file).tensors if entry.name == tensor)
    content = bytearray(file.read_bytes())
    content[start + place : start + place + 2] = half.to_bytes(2, "little")
    file.write_bytes(content)
    refused(["export", file, tmp_path / "out", "--keep-blocks"], f"{file}: ", "tensor model.", "NaN or infinity")
    assert left_behind(tmp_path) == ["m.gguf"]


class WithBlocks(HuggingFaceCheckpoint):
    """A folder whose matrices were rounded by a tool that has integer zero points, as GPTQ and AWQ have them."""

    def blocks(self, name: str) -> StoredBlocks | None:
        if len(self.shape(name)) == 1:
            return None
        bits = 8 if "down_proj" in name or "v_proj" in name else 4
        block_format = BlockFormat(bits, 64 if bits == 4 else 32)
        return StoredBlocks(
            f"made int{bits}", lambda: nearest(super(WithBlocks, self).tensor(name), block_format), block_format
        )

    def tensor(self, name: str) -> np.ndarray:
        stored = self.blocks(name)
        return super().tensor(name) if stored is None else stored.read().dequantize()


@pytest.mark.parametrize("head_dim", [16, 24])
def test_blocks_with_zero_points_are_kept_through_stacks_and_padded_heads(
    tiny_bundles: TinyBundles, tmp_path: Path, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(SPECULATOR, name=f"zero-points-{head_dim}", head_dim=head_dim, is_tied=True)
    folder = tiny_bundles.checkpoint(tiny)
    checkpoint = WithBlocks(folder, str(folder))
    monkeypatch.setattr("shortstack.export.assemble.open_checkpoint", lambda source, **options: checkpoint)
    bundle = export_bundle(ExportSpec(str(folder), tmp_path / "out", EXITS, 64, keep_blocks=True))
    origins, formats = bundle.manifest.origins, bundle.manifest.precision.weights
    floats = ModelTensors(checkpoint, *resolve(checkpoint), KeptBlocks())
    for name, (found, expected) in kept_matrices(bundle, floats).items():
        if origins[name].is_kept:
            np.testing.assert_array_equal(found, expected)
            assert origins[name].error == 0.0
    qkv, down = (names.layer_weight(0, part) for part in ("attn.qkv_proj.weight", "mlp.down_proj.weight"))
    assert formats[qkv] == BlockFormat(8, 32)
    assert formats[down] == BlockFormat(8, 32)
    assert formats[names.EMBED_TOKENS] == BlockFormat(4, 64)
    rounded = {name for name, origin in origins.items() if not origin.is_kept}
    o_proj = {names.layer_weight(layer, "attn.o_proj.weight") for layer in range(tiny.layers)}
    assert rounded == (o_proj if head_dim == 24 else set())
    model = load(bundle.folder)
    prompt = list(range(5, 15))
    plain = model.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens
    assert len(plain) == TOKENS
