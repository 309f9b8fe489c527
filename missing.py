"""A package that is not installed, reported in one line with a command that installs it.

For every command, ``shortstack`` and ``python -m shortstack.samples...`` alike. Standard library only. The package is
on no index yet, so what installs its extras depends on where this file is::

    a checkout (pyproject.toml is next to it)    pip install -e '.[export]', with the checkout's folder where it is not
                                                 the current one
    an installed wheel                           pip install 'torch>=2.6' ..., the requirements that the wheel records
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import TracebackType

from shortstack.graphs.errors import DependencyError

# top-level module -> the extras that bring it, of which any one is enough. Of no extra: what every installation has.
EXTRAS: dict[str, tuple[str, ...]] = {
    "gguf": ("export",),
    "huggingface_hub": ("export",),
    "matplotlib": ("train",),
    "ml_dtypes": ("export",),
    "onnx": ("export",),
    "onnx_ir": ("export",),
    "onnxruntime": ("cpu", "gpu"),
    "optimum": ("export",),
    "pandas": ("ray",),
    "peft": ("train",),
    "pyarrow": ("ray",),
    "ray": ("ray",),
    "safetensors": ("export",),
    "torch": ("export",),
    "transformers": ("export",),
    **dict.fromkeys(("click", "jinja2", "numpy", "rich", "tokenizers"), ("",)),
}

_TRAINING = ("shortstack.samples.recipes.", "shortstack.samples.showcase.")  # these need both of the extras below
_TRAINING_EXTRAS = ("export", "train")

ONLY_IN_THE_REPOSITORY = ("bench", "recipes", "showcase", "texts")
"""The folders of samples that the wheel leaves out."""

_ROOT = Path(__file__).resolve().parent


def missing_dependency(command: str, error: ModuleNotFoundError, also: tuple[str, ...] = ()) -> DependencyError | None:
    """Name the command that installs the module which was not found.

    Args:
        command: What was run, as the user wrote it.
        error: What Python raised.
        also: Extras that the command needs besides, so that they are installed with the first.

    Returns:
        The error to report; None if the module is of no extra, and so its absence is a bug.
    """
    module = (error.name or "").partition(".")[0]
    extras = EXTRAS.get(module)
    if extras is None:
        return None
    # No full stop at the end: it would be copied into the shell with the command.
    installs = " or ".join(install_command((extra, *(other for other in also if other != extra))) for extra in extras)
    return DependencyError(f"`{command}` needs '{module}', which is not installed. Run: {installs}")


def report_missing_packages() -> None:
    """Let this process, a ``python -m``, end with one line and exit code 2 where a package is not installed.

    So it does where the command itself is not: the wheel leaves some out.
    """
    sys.excepthook = _report
    module = next((word for word in sys.orig_argv if word.startswith("shortstack.samples.")), "")
    room = module.removeprefix("shortstack.samples.").partition(".")[0]
    if room in ONLY_IN_THE_REPOSITORY and not (_ROOT / "samples" / room).is_dir():
        after = "Run the command in a clone, after: pip install -e '.[cpu,export,train]'"
        print(f"error: {module} is in the repository and not in the wheel. {after}", file=sys.stderr)
        sys.exit(DependencyError.exit_code)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Take the place of the traceback (:func:`sys.excepthook`)."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec is not None else "shortstack.samples"
    also = _TRAINING_EXTRAS if module.startswith(_TRAINING) else ()
    explained = None
    if (
        isinstance(error, DependencyError) and error.__cause__ is not None
    ):  # of a public name, see shortstack.__getattr__
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError):
        explained = missing_dependency(f"python -m {module}", error, also)
    if explained is None:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {explained}", file=sys.stderr)
    sys.exit(explained.exit_code)


def install_command(extras: tuple[str, ...]) -> str:
    """Return a command line that installs what the extras bring, for the interpreter that runs."""
    names = [extra for extra in extras if extra]
    bracket = f"[{','.join(names)}]" if names else ""
    if (_ROOT / "pyproject.toml").is_file():
        folder = "." if Path.cwd() == _ROOT else str(_ROOT)
        return f"{_pip()} install -e {_quoted(folder + bracket)}"
    packages = _requirements(names)
    if not packages:  # copied without what pip records about it
        return f"{_pip()} install {_quoted(f'shortstack-VERSION-py3-none-any.whl{bracket}')}"
    return f"{_pip()} install {' '.join(map(_quoted, packages))}"


def _requirements(extras: list[str]) -> list[str]:
    """Return what the installed package records as its requirements, or as those of the extras if there are any."""
    try:
        recorded = requires("shortstack") or []
    except PackageNotFoundError:
        return []
    found = []
    for line in recorded:
        package, _, marker = line.partition(";")
        extra = re.search(r"""extra\s*==\s*["']([^"']+)""", marker)
        if (extra.group(1) in extras) if extra else not extras:
            found.append(package.strip())
    return found


def _pip() -> str:
    """Return how to call the pip of the interpreter that runs: by its name where the shell finds that one first."""
    found = shutil.which("pip")
    is_ours = found is not None and Path(found).parent == Path(sys.executable).parent
    return "pip" if is_ours else f"{shlex.quote(sys.executable)} -m pip"


def _quoted(text: str) -> str:
    """Return the text in single quotes: brackets and comparisons mean something to a shell."""
    return shlex.quote(text) if "'" in text else f"'{text}'"
