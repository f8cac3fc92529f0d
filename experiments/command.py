"""Command lines of modules: flags into a configuration, one-line errors, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

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
    parser = ArgumentParser(prog=f"python -m {module}", description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(config)
    try:
        values = vars(parser.instantiate_classes(parser.parse_args(arguments)))
        has_fault = work(config(**{key: value for key, value in values.items() if key != "config"}))
    except (UserError, ArgumentError) as error:
        print(f"{module}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if has_fault:
        sys.exit(1)


def check_minimums(config: Any, minimums: Mapping[str, int]) -> None:
    """Raise ``UserError`` if a number of a configuration is below its minimum."""
    for name, minimum in minimums.items():
        if getattr(config, name) < minimum:
            raise UserError(f"{name}: expected {minimum} or more, got {getattr(config, name)}.")
