"""``optimum-cli export shortstack``: the same command as ``shortstack export``, found through optimum's own CLI.

optimum imports every module in the namespace folder ``optimum/commands/register/`` and reads its
``REGISTER_COMMANDS``; ours is ``export/optimum_register/register_shortstack.py``, which the wheel installs there. It
runs at every start of ``optimum-cli``, so nothing heavy is imported before the command is used.

optimum (2.3) reads no entry points. Besides this folder it asks only two packages whose names it holds, optimum-quanto
and optimum-nvidia, so there is no other way in. The price: where optimum is not installed, ``import optimum`` finds an
empty namespace (PEP 420) instead of nothing. ``import optimum.exporters``, or any other of its modules, still fails.
"""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class ExportShortstackCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no type hints
    """Hands its arguments, untouched, to ``shortstack export``."""

    COMMAND = CommandInfo(name="shortstack", help="Cut a causal language model at its exits into ONNX graphs.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Let everything through, options and ``--help`` included: click parses it."""
        # argparse takes only what starts with one of these for an option. REMAINDER alone does not do it: it fails
        # where the first argument is an option (https://github.com/python/cpython/issues/61252).
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Run the export, with the messages and exit codes of ``shortstack export``."""
        from shortstack.__main__ import run

        if code := run(["export", *self.args.arguments]):
            raise SystemExit(code)
