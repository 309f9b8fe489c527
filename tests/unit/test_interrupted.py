"""Ctrl-C is one line and exit code 130, also while a compiled module is being loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import builtins, os, signal, sys
from shortstack import __main__ as command
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, where it is ignored
def interrupted(name):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        if {is_compiled}:
            raise ImportError("initialization failed") from None  # as pybind11 does
        raise
command.importlib.import_module = interrupted
sys.argv = ["shortstack", "doctor"]
command.main()
"""


@pytest.mark.parametrize("is_compiled", [True, False])
def test_ctrl_c_while_a_command_is_imported_is_one_line(is_compiled: bool) -> None:
    script = SCRIPT.format(is_compiled=is_compiled)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "interrupted")  # click ends the line of ^C
