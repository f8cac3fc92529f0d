"""``python -m benchmarks.X``: flags into a configuration, and one line on what the caller can put right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from vpr.cli import silence_libraries
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
        module: of ``benchmarks``.
        description: for ``--help``.
        config: a dataclass, whose fields are the flags.
        work: called with what the flags say; a true value is a fault that was found, and ends with exit code 1.
        arguments: flags; None takes those of the process.
    """
    silence_libraries()
    configure_logging()
    parser = ArgumentParser(prog=f"python -m benchmarks.{module}", description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(config)
    try:
        values = vars(parser.instantiate_classes(parser.parse_args(arguments)))
        faulty = work(config(**{key: value for key, value in values.items() if key != "config"}))
    except (UserError, ArgumentError) as error:
        print(f"benchmarks.{module}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if faulty:
        sys.exit(1)
