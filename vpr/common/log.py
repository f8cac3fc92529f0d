"""What a verb says to the person in front of it."""

from __future__ import annotations

from rich.console import Console

from vpr.common.distributed import is_first
from vpr.common.errors import printable

_CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line to standard error; of several processes the first speaks for all."""
    if is_first():
        _CONSOLE.print("\n".join(map(printable, text.split("\n"))), markup=False)
