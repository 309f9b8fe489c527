"""Shrink a bundle to int8 and compare: ``python samples/examples/quantize_and_compare.py BUNDLE``."""

import subprocess
import sys
import tempfile
from pathlib import Path

from shortstack import load


def megabytes(folder: Path) -> float:
    """Return the size of a bundle."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


with tempfile.TemporaryDirectory() as folder:
    large, small = Path(sys.argv[1]), Path(folder) / "int8"
    options = ["--preset", "int8", "--no-report"]
    subprocess.run([sys.executable, "-m", "shortstack", "quantize", str(large), str(small), *options], check=True)
    for bundle in (large, small):
        with load(bundle) as model:
            result = model.generate("The capital of France is", max_new_tokens=24)
        print(f"{bundle.name}: {megabytes(bundle):.1f} MB, {result.stats.tokens_per_s:.1f} tokens/s\n{result.text}\n")
