"""Logging to standard error: plain lines, levels by ``-q`` and ``-v``, from one process of several."""

import logging

from rich.console import Console

from vpr.common.distributed import is_first
from vpr.common.errors import printable

_ROOT = "vpr"


class _LineHandler(logging.Handler):
    """Print the message without terminal control codes; mark warnings and errors."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, if this is the first process."""
        if not is_first():
            return
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self._console.print(prefix + "\n".join(map(printable, record.getMessage().split("\n"))), markup=False)


def get_logger(module: str) -> logging.Logger:
    """Return the logger of a module (its ``__name__``) under the one of :func:`configure_logging`."""
    return logging.getLogger(f"{_ROOT}.{module.removeprefix(f'{_ROOT}.')}")


def configure_logging(verbosity: int = 0) -> None:
    """Send log records to standard error: warnings and errors at -1, also progress at 0, also debug records above."""
    logger = logging.getLogger(_ROOT)
    logger.setLevel(logging.WARNING if verbosity < 0 else logging.DEBUG if verbosity > 0 else logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _LineHandler) for handler in logger.handlers):
        logger.addHandler(_LineHandler())
