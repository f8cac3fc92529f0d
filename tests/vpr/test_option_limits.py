"""Every integer option of every command, at 0, 1, -1 and the largest integer."""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

import pytest

from teacher.config import StageConfig
from vpr.cli.commands import COMMANDS
from vpr.common.errors import UserError

LARGEST = sys.maxsize


def _example(kind: Any) -> Any:
    """Return a value for a required field."""
    text = str(kind)
    if "tuple[str" in text:
        return ("a", "b")
    return 1 if kind is int else "a.safetensors"


def _build(config: type[Any]) -> Any:
    """Build a configuration with examples in its required fields."""
    hints = typing.get_type_hints(config)
    required = {
        field.name: _example(hints[field.name])
        for field in fields(config)
        if field.default is MISSING and field.default_factory is MISSING
    }
    for changes in (
        {},
        {"output": "b.safetensors"},
        {"checkpoint": "b.pth"},
        {"csv": ("a",)},
        {"models": ("a",)},
        {"vectors": "a.npy"},
        {"catalog": "a"},
    ):
        try:
            return config(**{**required, **{k: v for k, v in changes.items() if k in hints}})
        except UserError:
            continue
    raise AssertionError(f"{config.__name__}: no example is accepted")


def _integers(config: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the integer fields of a configuration and of its sections."""
    hints = typing.get_type_hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), str(hints[field.name])
        if is_dataclass(value):
            yield from _integers(value, (*prefix, field.name))
        elif hint in ("<class 'int'>", "int | None", "tuple[int, ...]", "tuple[int, ...] | None"):
            yield (*prefix, field.name)


def _replace(config: Any, path: tuple[str, ...], value: int) -> Any:
    name, *rest = path
    if rest:
        return replace(config, **{name: _replace(getattr(config, name), tuple(rest), value)})
    hint = str(typing.get_type_hints(type(config))[name])
    return replace(config, **{name: (value,) if "tuple" in hint else value})


CONFIGS = {name: command.load_config() for name, command in COMMANDS.items()}
OPTIONS = [(name, path) for name, config in CONFIGS.items() for path in _integers(_build(config))]


def test_the_sweep_finds_the_options() -> None:
    paths = {(name, ".".join(path)) for name, path in OPTIONS}
    assert len(paths) > 100
    assert {("teacher train", "loader.batch_size"), ("export onnx", "images"), ("search", "rerank.k1")} <= paths


@pytest.mark.parametrize(
    ("command", "path"), OPTIONS, ids=lambda value: value if isinstance(value, str) else ".".join(value)
)
def test_limits_are_accepted_or_rejected_in_one_line(command: str, path: tuple[str, ...]) -> None:
    """A negative number is always rejected: it is no count, size or seed. The message names the option."""
    config = _build(CONFIGS[command])
    for value in (0, 1, LARGEST, 1 << 200):
        with suppress(UserError):
            _replace(config, path, value)
    with pytest.raises(UserError) as caught:
        _replace(config, path, -1)
    assert path[-1] in str(caught.value)


@pytest.mark.parametrize("path", list(_integers(StageConfig("all", 5))), ids=".".join)
def test_limits_of_a_stage(path: tuple[str, ...]) -> None:
    for value in (0, 1, LARGEST, 1 << 200):
        with suppress(UserError):
            _replace(StageConfig("all", 5), path, value)
    with pytest.raises(UserError, match=rf"stages\.{path[-1]}"):
        _replace(StageConfig("all", 5), path, -1)
