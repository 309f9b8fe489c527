"""``shortstack parity`` on bundles with kept blocks: it passes as they are, and finds one changed code or scale."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from helpers.gguf_files import Kind, byte_level, of_checkpoint, write
from helpers.quantized import stored_tensors
from helpers.quantized_cases import KEPT, LLAMA, QWEN2, Folders
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle

TINY = replace(
    SPECULATOR, name="wide-kept", layers=3, hidden=256, intermediate=256, head_dim=64, upper_scale=0.12, is_tied=True
)
MIXED = {"blk.1.attn_v.weight": Kind["Q6_K"], "blk.2.ffn_down.weight": Kind["Q8_0"], "token_embd.weight": Kind["Q6_K"]}
MATRICES = 1 + 5 * TINY.layers
UP, QKV = (names.layer_weight(1, part) for part in ("mlp.up_proj.weight", names.QKV_PROJ))
CASES = ("GGUF", "GGUF, nearly", "GPTQ, asymmetric", "GPTQ, act-order", "AWQ", "AWQ, float16")


def whole_vocabulary(writer: gguf.GGUFWriter) -> None:
    """A token for each row of the embedding: transformers, which reads the file too, counts the tokens."""
    byte_level(writer)
    few = writer.kv_data[0]["tokenizer.ggml.tokens"].value
    more = [f"[{index}]" for index in range(len(few), TINY.vocab)]
    writer.add_token_list([*few, *more])
    writer.add_token_types([*writer.kv_data[0]["tokenizer.ggml.token_type"].value, *[1] * len(more)])


Kept = tuple[str, Path, int]
"""A checkpoint, its bundle with kept blocks, and how many matrices keep them."""


@pytest.fixture(scope="module")
def kept(
    tiny_bundles: TinyBundles, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Kept]:
    """Checkpoints and their bundles, each made once."""
    made: dict[str, Kept] = {}

    def of(case: str) -> Kept:
        if case not in made:
            folder = tmp_path_factory.mktemp("kept-parity")
            if case.startswith("GGUF"):
                tensors, kind = of_checkpoint(tiny_bundles.checkpoint(TINY), TINY.layers), Kind["Q4_0"]
                if case.endswith("nearly"):
                    kind = Kind["Q4_K"]
                write(folder / "m.gguf", tensors, edit=whole_vocabulary, quantization=kind, kinds=MIXED, tiny=TINY)
                source, count = folder / "m.gguf", MATRICES
            else:
                name, _, dtype = case.partition(", float")
                source, count = folders(QWEN2 if dtype else LLAMA, KEPT[name], name).path, 5 * LLAMA.layers
            dtype = "float16" if case.endswith("float16") else "float32"
            bundle = export_bundle(ExportSpec(str(source), folder / "out", (1,), 64, dtype=dtype, keep_blocks=True))
            made[case] = str(source), bundle.folder, count
        return made[case]

    return of


@pytest.fixture
def parity(capsys: pytest.CaptureFixture[str], one_torch_thread: Callable[[], None]) -> Callable[[str, Path], str]:
    """Runs the command, and returns its exit code and what it printed."""

    def parity(source: str, bundle: Path) -> str:
        one_torch_thread()
        capsys.readouterr()
        code = run(["parity", source, str(bundle), "--prompts", "1", "--greedy-tokens", "2"])
        done = capsys.readouterr()
        return f"{code}\n{done.out}{done.err}"

    return parity


@pytest.mark.parametrize("case", CASES)
def test_parity_passes_for_a_bundle_with_kept_blocks_and_says_how_many(
    kept: Callable[[str], Kept], parity: Callable[[str, Path], str], case: str
) -> None:
    source, bundle, count = kept(case)
    said = parity(source, bundle)
    assert said.startswith("0\n"), said
    assert f"kept blocks: 0 of {count} matrices differ from the checkpoint's\n" in said
    fates = {origin.fate for origin in open_bundle(bundle).manifest.origins.values()}
    assert fates == ({"exact", "near"} if case.endswith("nearly") else {"exact"})


PARTS: dict[str, tuple[Callable[[str], str], Callable[[np.ndarray], np.ndarray]]] = {
    "code": (names.block_codes, lambda values: values ^ np.uint8(1)),
    "scale": (names.block_scales, lambda values: np.nextafter(values, values.dtype.type(np.inf))),
    "zero point": (names.block_zero_points, lambda values: values ^ np.uint8(1)),
}


@pytest.mark.parametrize("matrix", [UP, QKV])
@pytest.mark.parametrize(
    ("case", "part"),
    [(case, part) for case in CASES for part in ("code", "scale")]
    + [(case, "zero point") for case in ("GGUF, nearly", "GPTQ, asymmetric", "AWQ")],
)
def test_one_change_in_one_kept_matrix_is_found_and_named(
    kept: Callable[[str], Kept],
    parity: Callable[[str, Path], str],
    tmp_path: Path,
    case: str,
    part: str,
    matrix: str,
) -> None:
    source, bundle, count = kept(case)
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    name_of, change = PARTS[part]
    tensor = stored_tensors(broken)[name_of(matrix)]
    values = tensor.read(broken)
    flat = values.reshape(-1)
    flat[:1] = change(flat[:1])  # of the first block of the first row
    tensor.write(broken, values)
    said = parity(source, broken)
    assert said.startswith("1\n"), said
    assert f"kept blocks: 1 of {count} matrices differ from the checkpoint's" in said
    assert f"{matrix} keeps the checkpoint's blocks and differs from them: off by" in said


def test_matrices_that_the_checkpoint_has_as_floats_are_compared_as_rounded_ones(
    kept: Callable[[str], Kept], parity: Callable[[str, Path], str]
) -> None:
    source, bundle, _ = kept("AWQ")
    said = parity(str(Path(source).parent / "floats"), bundle)
    assert said.startswith("0\n"), said
    assert "weights: furthest from the checkpoint" in said
    assert "kept blocks" not in said
