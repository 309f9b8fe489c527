"""Imports point one way. Lint sees most of them; these see all: lazy ones, file paths, and what imports import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
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
    "ray",
    "shortstack.graphs.ir",
    "shortstack.export",
    "shortstack.quant",
    "shortstack.samples",
)
# What graphs, being standard library only, does without besides.
THIRD_PARTY = ("numpy", "onnxruntime", "tokenizers", "jinja2", "click", "rich", "ml_dtypes", "shortstack.runtime")

HEAVY = ("numpy", "onnxruntime", "tokenizers", "jinja2", *FOREIGN[:9])

# Room -> the rooms that it may import, lazily or not. The modules at the root (errors of the command line, progress,
# threads) may be imported by all.
ROOMS = {
    "graphs": set(),
    # runtime in export/parity and text_files.py alone, quant in quantized.py and cli.py alone, as export/ruff.toml says
    "export": {"graphs", "quant", "runtime"},
    "quant": {"graphs", "runtime"},  # runtime in few files alone, as quant/ruff.toml says
    "runtime": {"graphs"},
    "samples": {"graphs", "export", "quant", "runtime"},
}
PRODUCT_ROOMS = tuple(room for room in ROOMS if room != "samples")

# The wings of runtime, from the ground up: each may import those above it in this list, and itself. The modules of
# runtime itself (request.py, loops.py, model.py and others) stand between wings.
WINGS = (
    {"engine", "text"},
    {"decode"},
    {"early_exit"},
    {"request"},
    {"encode", "result"},
    {"loops"},
    {"batch"},
    {"one_slot"},
    {"model"},
    {"calibration", "inspection", "workers"},
    {"commands"},
)


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    # -P: the working directory is not searched, so nothing is found by standing in the right place.
    return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)


def modules_in(package: str, folder: Path) -> list[str]:
    stems = [path.stem for path in sorted(folder.glob("*.py"))]
    return [package if stem == "__init__" else f"{package}.{stem}" for stem in stems]


def imports_of(source: str) -> Iterator[str]:
    """Every module that a file imports, wherever the import stands; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def names_in(source: str) -> Iterator[str]:
    """The parts of every path and module that a string outside of docstrings spells, parts of f-strings included."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docstrings:
            continue
        if not re.search(r"\s", node.value):  # a message says what it likes
            yield from re.split(r"[/.\\:]", node.value)


def files_of(room: str, package_folders: dict[str, Path]) -> list[Path]:
    name = f"shortstack.{room}"
    folders = [folder for package, folder in package_folders.items() if f"{package}.".startswith(f"{name}.")]
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    assert files
    return files


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


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_of_a_room_imports_another_room_that_it_must_not_know(
    room: str, package_folders: dict[str, Path]
) -> None:
    allowed = ROOMS[room] | {room}
    wrong = [
        f"{path}: {module}"
        for path in files_of(room, package_folders)
        for module in imports_of(path.read_text(encoding="utf-8"))
        if module.startswith("shortstack.") and (other := module.split(".")[1]) in ROOMS and other not in allowed
    ]
    assert not wrong


def test_export_opens_quant_in_one_composing_module_and_in_the_command(package_folders: dict[str, Path]) -> None:
    openers = {
        path.name
        for path in files_of("export", package_folders)
        for module in imports_of(path.read_text(encoding="utf-8"))
        if module.startswith("shortstack.quant")
    }
    assert openers == {"quantized.py", "cli.py"}


@pytest.mark.parametrize("room", PRODUCT_ROOMS)
def test_no_product_room_reaches_into_samples_by_a_path_or_a_name_in_a_string(
    room: str, package_folders: dict[str, Path]
) -> None:
    wrong = [str(path) for path in files_of(room, package_folders) if "samples" in names_in(path.read_text("utf-8"))]
    assert not wrong, "what a product room needs stands in a product room: texts are in graphs/texts"


def test_no_module_at_the_root_is_a_way_into_samples(package_folders: dict[str, Path]) -> None:
    """Every room imports these modules, so what they import reaches every room."""
    wrong = []
    for path in sorted(package_folders["shortstack"].glob("*.py")):
        source = path.read_text("utf-8")
        imported = [module for module in imports_of(source) if module.startswith("shortstack.samples")]
        # missing.py says which commands a wheel lacks.
        names_it = path.stem != "missing" and "samples" in names_in(source)
        if imported or names_it:
            wrong.append(str(path))
    assert not wrong


def test_arrows_between_the_wings_of_runtime_point_down(package_folders: dict[str, Path]) -> None:
    floors = {wing: floor for floor, wings in enumerate(WINGS) for wing in wings}
    runtime = package_folders["shortstack.runtime"]
    wrong = []
    for path in files_of("runtime", package_folders):
        inside = path.relative_to(runtime)
        wing = inside.parts[0].removesuffix(".py")
        if wing == "__init__":
            continue  # it only says where each public name lives, and imports it when it is asked for
        assert wing in floors, f"{inside} belongs to no wing: add it to WINGS"
        for module in imports_of(path.read_text(encoding="utf-8")):
            parts = module.split(".")
            if parts[:2] == ["shortstack", "runtime"] and len(parts) > 2 and parts[2] in floors and parts[2] != wing:
                other = parts[2]
                if floors[other] >= floors[wing]:
                    wrong.append(f"{inside} -> {other}")
    assert not wrong


def test_the_walls_see_lazy_imports_and_paths() -> None:
    source = '''"""samples/ is named here only."""
from pathlib import Path
def late():
    """samples/too"""
    from shortstack.samples.prompts import prompts
    print("see samples/ for more")
    return Path(__file__).parent.parent / "samples" / "heldout.jsonl", "../samples/x", prompts
class Late:
    module = importlib.import_module("shortstack.samples.prompts")
    path = f"{__file__}/../samples/x"
    other = "./samples/x", "shortstack/samples/x"
'''
    assert "shortstack.samples.prompts" in set(imports_of(source))
    assert list(names_in(source)).count("samples") == 6


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
