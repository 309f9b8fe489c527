"""Imports point one way. Lint sees each import; these see what the imports import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What a device does not install, and what must not be reached from runtime and graphs.
FOREIGN = (
    "torch",
    "transformers",
    "optimum",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "shortstack.graphs.ir",
    "shortstack.export",
    "shortstack.quant",
)
# What graphs, being standard library only, does without besides.
THIRD_PARTY = ("numpy", "onnxruntime", "tokenizers", "jinja2", "click", "rich", "ml_dtypes", "shortstack.runtime")

HEAVY = ("numpy", "onnxruntime", "tokenizers", "jinja2", *FOREIGN[:8])


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    # -P: the working directory is not searched, so nothing is found by standing in the right place.
    return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)


def modules_in(package: str, folder: Path) -> list[str]:
    stems = [path.stem for path in sorted(folder.glob("*.py"))]
    return [package if stem == "__init__" else f"{package}.{stem}" for stem in stems]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("shortstack.runtime", FOREIGN), ("shortstack.graphs", FOREIGN + THIRD_PARTY)],
)
def test_every_module_imports_without_what_its_layer_must_not_use(
    package: str, forbidden: tuple[str, ...], package_folders: dict[str, Path]
) -> None:
    # None in sys.modules makes any later import of that name fail, wherever it stands.
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in forbidden)]
    for name, folder in package_folders.items():
        if (name == package or name.startswith(f"{package}.")) and name not in forbidden:
            lines += [f"import {module}" for module in modules_in(name, folder)]
    done = run_python("\n".join(lines))
    assert done.returncode == 0, done.stderr


def test_help_lists_the_commands_and_imports_none_of_them() -> None:
    done = run_python(
        "import sys\n"
        "from shortstack.__main__ import COMMANDS, run\n"
        "assert run(['--help']) == 0\n"
        "modules = [target.partition(':')[0] for target, _ in COMMANDS.values()]\n"
        f"imported = [name for name in [*{HEAVY!r}, *modules] if name in sys.modules]\n"
        "sys.exit(f'--help imported {imported}' if imported else 0)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout
