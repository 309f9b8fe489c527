"""What `import shortstack` offers, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import shortstack
from shortstack import runtime


def test_every_public_name_is_listed_and_can_be_had() -> None:
    assert set(shortstack.__all__) < set(dir(shortstack))
    for name in shortstack.__all__:
        assert getattr(shortstack, name).__name__ == name
        assert getattr(runtime, name) is getattr(shortstack, name)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    for module in (shortstack, runtime):
        with pytest.raises(AttributeError, match="no attribute 'lod'"):
            module.lod  # noqa: B018 - the access is the test


def test_importing_shortstack_imports_nothing_heavy() -> None:
    script = (
        "import sys, shortstack\n"
        "dir(shortstack)\n"
        "heavy = [m for m in ('numpy', 'onnxruntime', 'click', 'tokenizers', 'torch') if m in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_public_name_whose_package_is_not_installed_says_how_to_install_it() -> None:
    script = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import shortstack\n"
        "try:\n"
        "    shortstack.load\n"
        "except shortstack.ShortstackError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needs 'onnxruntime', which is not installed" in done.stdout
    assert "pip install" in done.stdout
