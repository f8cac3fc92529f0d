"""Command lines of modules: flags into a configuration, one-line errors, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vpr.cli import read_config, silence_libraries
from vpr.cli.commands import Command
from vpr.cli.help import config_help
from vpr.common.errors import UserError
from vpr.common.log import configure_logging

_Config = TypeVar("_Config")


def run_command(
    module: str,
    description: str | None,
    config: type[_Config],
    work: Callable[[_Config], object],
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a module's work with a configuration from flags.

    A ``UserError`` or a wrong flag ends the process with exit code 2 and a one-line message.

    Args:
        module: Name of the module, as ``python -m`` takes it.
        description: Text of ``--help``.
        config: Dataclass of the flags.
        work: Function of the configuration; a true result means that it found a fault, and gives exit code 1.
        arguments: Flags; None takes those of the process.
    """
    silence_libraries()
    configure_logging()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help", "--help-all"} & set(words):
        print(config_help(f"python -m {module}", config, Command("", "", description or ""), is_complete=True))
        return
    try:
        has_fault = work(read_config(config, f"python -m {module}", words))
    except UserError as error:
        print(f"{module}: {error}", file=sys.stderr)
        sys.exit(2)
    if has_fault:
        sys.exit(1)


def check_minimums(config: Any, minimums: Mapping[str, int]) -> None:
    """Raise ``UserError`` if a number of a configuration is below its minimum."""
    for name, minimum in minimums.items():
        if getattr(config, name) < minimum:
            raise UserError(f"{name}: expected {minimum} or more, got {getattr(config, name)}.")
