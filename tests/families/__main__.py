"""Run every check of every family and write the table of docs/families.md: ``python -m tests.families``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.families import CHECKS, MadeFamily  # noqa: E402
from helpers.family_rows import ROWS  # noqa: E402
from helpers.family_table import write_table  # noqa: E402


def main() -> None:
    """Check and write; what fails is said on stderr."""
    table = {}
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            made, passes = MadeFamily(row, Path(folder)), {}
            for heading, check in CHECKS.items():
                try:
                    check(made)
                    passes[heading] = True
                except Exception as error:  # whatever fails is no pass
                    passes[heading] = False
                    print(f"{row.model_type}, {heading}: {type(error).__name__}: {error}", file=sys.stderr)
        table[row.name, row.model_type] = passes
        print(row.model_type, sum(passes.values()), "of", len(passes), file=sys.stderr)
    write_table(ROOT, table)


main()
