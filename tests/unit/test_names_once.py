"""The contract's names are spelled in one file."""

from __future__ import annotations

from pathlib import Path


def test_the_name_of_a_past_tensor_stands_in_one_file_only(repository: Path, package_sources: list[Path]) -> None:
    name = "past_key_values."
    spelled = [path for path in package_sources if name in path.read_text(encoding="utf-8")]
    elsewhere = {str(path.relative_to(repository)) for path in spelled} - {"graphs/names.py"}
    assert not elsewhere, f"take {name!r} from shortstack.graphs.names"
