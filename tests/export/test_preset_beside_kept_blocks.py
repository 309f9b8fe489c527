"""A preset with --keep-blocks: what it does not reach is said, what would do nothing is refused before long work."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.bad_input import Refused, left_behind
from helpers.gguf_files import Kind, byte_level, of_checkpoint, write
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.__main__ import run
from shortstack.export.checkpoint.gguf import GgufCheckpoint
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.precision import BlockFormat

LAYERS = SPECULATOR.layers
IN_LAYERS = 5 * LAYERS
FLOAT_CACHE = ("--preset", "int8", "--kv-cache", "float")


@pytest.fixture(scope="module")
def files(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GGUF files with all matrices in blocks, with floats outside the layers, and with a layer of floats."""
    tensors = of_checkpoint(tiny_bundles.checkpoint(SPECULATOR), LAYERS)
    floats = {
        "all": [],
        "layers": ["token_embd.weight", "output.weight"],
        "most": [name for name in tensors if name.startswith("blk.1.")],
    }
    folder = tmp_path_factory.mktemp("kept")
    return {
        name: write(
            folder / f"{name}.gguf",
            tensors,
            edit=byte_level,
            quantization=Kind["Q8_0"],
            kinds=dict.fromkeys(left, Kind["F32"]),
            tiny=SPECULATOR,
        )
        for name, left in floats.items()
    }


@pytest.fixture(autouse=True)
def no_long_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "refused" in request.fixturenames:

        def never(self: object) -> str:
            raise AssertionError("the checkpoint was hashed")

        monkeypatch.setattr(GgufCheckpoint, "digest", never)


@pytest.mark.parametrize(
    ("file", "options", "says"),
    [
        ("all", FLOAT_CACHE, "--preset int8 would have no effect: every matrix keeps the checkpoint's blocks"),
        ("all", ("--preset", "int4", "--weights", "int8"), "--weights would have no effect: the matrices"),
        ("all", ("--preset", "int4", "--method", "rtn"), "--method would have no effect"),
        ("all", ("--preset", "int4", "--head", "int8"), "--head would have no effect"),
        ("all", ("--preset", "int4", "--max-kl", "0.1"), "--max-kl would have no effect"),
        (
            "layers",
            (*FLOAT_CACHE, "--weights", "int4", "--kv-producers", "int8", "--tuning", "ignore"),
            "--weights, --kv-producers, --tuning would have no effect: the matrices",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_option_that_reaches_no_matrix_is_refused_before_the_checkpoint_is_read(
    files: dict[str, Path], tmp_path: Path, refused: Refused, file: str, options: tuple[str, ...], says: str
) -> None:
    said = refused(["export", files[file], tmp_path / "out", "--keep-blocks", *options], says)
    assert "--keep-blocks" in said
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "options", "line"),
    [
        (
            "all",
            ("--preset", "int4", "--calibration-tokens", "128"),
            "warning: every matrix keeps the checkpoint's blocks: of --preset int4 only the int8 cache has an effect",
        ),
        (
            "layers",
            FLOAT_CACHE,
            f"note: {IN_LAYERS} matrices keep the checkpoint's blocks; --preset int8 rounds 2 others",
        ),
        (
            "most",
            (*FLOAT_CACHE, "--weights", "int4", "--method", "rtn"),
            f"note: {IN_LAYERS - 3} matrices keep the checkpoint's blocks; --preset int8 rounds 5 others; "
            f"--weights reaches 5 of {IN_LAYERS}; --method reaches 5 of {IN_LAYERS + 2}",
        ),
    ],
    ids=["cache only", "ends", "one layer"],
)
def test_what_a_preset_does_not_reach_is_said_once(
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    options: tuple[str, ...],
    line: str,
) -> None:
    assert run(["export", str(files[file]), str(tmp_path / "out"), "--keep-blocks", *options]) == 0
    said = [each for each in capsys.readouterr().err.splitlines() if "checkpoint's blocks" in each]
    assert said[:1] == [line]
    assert len([each for each in said if "--preset" in each]) == 1
    formats = open_bundle(tmp_path / "out").manifest.precision.weights
    if file == "most":
        assert formats[names.layer_weight(1, "mlp.up_proj.weight")] == BlockFormat(4)


def test_without_kept_blocks_nothing_is_said(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(tiny_bundles.checkpoint(SPECULATOR))
    assert run(["export", checkpoint, str(tmp_path / "out"), *FLOAT_CACHE, "--weights", "int4"]) == 0
    assert "keep the checkpoint's blocks" not in capsys.readouterr().err
