"""Installed as ``optimum/commands/register/register_shortstack.py``, where ``optimum-cli`` looks when it starts."""

from __future__ import annotations

from optimum.commands.export.base import ExportCommand

from shortstack.export.optimum_command import ExportShortstackCommand

REGISTER_COMMANDS = [(ExportShortstackCommand, ExportCommand)]
