"""``python -m experiments.X``: flags into a configuration, and one line on what the caller can put right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

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
    """Do a module's work; exit code 2 and one line on anything the caller can put right.

    Args:
        module: Module that is run.
        description: for ``--help``.
        config: a dataclass, whose fields are the flags.
        work: called with what the flags say; a true value is a fault that was found, and ends with exit code 1.
        arguments: flags; None takes those of the process.
    """
    silence_libraries()
    configure_logging()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help", "--help-all"} & set(words):
        print(config_help(f"python -m {module}", config, Command("", "", description or ""), is_complete=True))
        return
    try:
        faulty = work(read_config(config, f"python -m {module}", words))
    except UserError as error:
        print(f"{module}: {error}", file=sys.stderr)
        sys.exit(2)
    if faulty:
        sys.exit(1)
