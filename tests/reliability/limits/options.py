"""Number options of every command, with the values at their limits."""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from teacher.config import StageConfig
from tests.reliability.commands import COMMANDS, Command
from vpr.cli.commands import COMMANDS as VERBS

_INTEGERS = ("<class 'int'>", "int | None", "tuple[int, ...]", "tuple[int, ...] | None")
_NUMBERS = ("<class 'float'>", "float | None", "tuple[float, ...]", "tuple[float, float]")
_VALUES = {"int": ("0", "1", "-1", str(sys.maxsize)), "float": ("0", "1", "-1", "1e308", ".nan")}
_PAIRS = "tuple[float, float]"
_WITHOUT_END = ("search serve", "demo")  # a server, and minutes of work


@dataclass(frozen=True)
class LimitCase:
    """A command with one option at a limit.

    Attributes:
        command: Command on the small inputs.
        flag: Words that set the option.
    """

    command: Command
    flag: tuple[str, ...]

    @property
    def name(self) -> str:
        """Command and option, for reports."""
        return f"{self.command.verb} {' '.join(self.flag)}"


@cache
def cases() -> tuple[LimitCase, ...]:
    """Return every number option of every command at each of its limits."""
    first = {command.verb: command for command in reversed(COMMANDS) if command.verb not in _WITHOUT_END}
    found = [
        LimitCase(command, flag)
        for command in COMMANDS
        if first.get(command.verb) is command
        for flag in _flags(VERBS[command.verb].load_config())
    ]
    stages = [
        LimitCase(first["teacher train"], ("--stages", f"{{train: all, epochs: 1, {name}: {value}}}"))
        for name, kind in _options(StageConfig)
        for value in _values(kind)
    ]
    return (*found, *stages)


def _flags(config: type[Any]) -> Iterator[tuple[str, ...]]:
    for name, kind in _options(config):
        flag = f"--{name.replace('_', '-')}"
        for value in _values(kind):
            yield (f"{flag}={value}",)


def _values(kind: str) -> tuple[str, ...]:
    values = _VALUES["int" if kind in _INTEGERS else "float"]
    if kind == _PAIRS:
        return tuple(f"[{value}, {value}]" for value in values)
    return tuple(f"[{value}]" for value in values) if kind.startswith("tuple") else values


def _options(config: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and type of the number fields of a configuration and of its sections."""
    hints = typing.get_type_hints(config)
    for field in fields(config):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _options(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif str(hint) in (*_INTEGERS, *_NUMBERS):
            yield f"{prefix}{field.name}", str(hint)
