"""A file of calibration text may have any name that the file system allows."""

from __future__ import annotations

import json
import os
from pathlib import Path

from shortstack.__main__ import run
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle


def test_a_calibration_file_whose_name_is_not_utf8_is_recorded_readably(bundle: Path, tmp_path: Path) -> None:
    text = Path(os.fsdecode(os.fsencode(tmp_path) + b"/text-\xff.txt"))
    text.write_text("a line of text to calibrate on. " * 200)
    options = ["--calibration", str(text), "--calibration-tokens", "256", "--no-report"]
    assert run(["quantize", str(bundle), str(tmp_path / "small"), *options]) == 0
    open_bundle(tmp_path / "small", verify_hashes=True)
    record = json.loads((tmp_path / "small" / names.QUANTIZATION_FILE).read_text(encoding="utf-8"))
    assert record["calibration"].startswith("text-\ufffd.txt: ")
