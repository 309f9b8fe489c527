"""What the command line shows of the library's log: one line per event, on stderr.

The library logs to the loggers of its modules and never configures them; programs that import it do as they like.

    debug    also every graph that is opened
    info     loads, growth of the cache, drafting switched on and off
    warning  what may be wrong (the default)
"""

from __future__ import annotations

import logging
import sys

LEVELS = ("debug", "info", "warning")


class _StderrHandler(logging.Handler):
    """Writes to stderr as it is at the time: progress bars put a stream of their own there while they are drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr is not None:
                sys.stderr.write(f"{self.format(record)}\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Lines(logging.Formatter):
    """Writes a warning as a sentence for the user, and what was asked for with the time and the module."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno == logging.WARNING and record.exc_info is None:
            return f"warning: {record.getMessage()}"
        return super().format(record)


def show_log(level: str) -> None:
    """Show the library's log from this level on; called again, it changes the level."""
    logger = logging.getLogger("shortstack")
    for handler in logger.handlers:
        if isinstance(handler, _StderrHandler):
            logger.removeHandler(handler)
    handler = _StderrHandler()
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
