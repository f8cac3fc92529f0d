"""Command-line flags that make a configuration."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any


def to_flags(config_class: type[Any], values: Mapping[str, Any]) -> list[str]:
    """Return the flags for the values that differ from the defaults; a section is a dataclass or a mapping."""
    words: list[str] = []
    for field in fields(config_class):
        value = values.get(field.name, field.default)
        if value != field.default:
            words += _to_words(field.name, value, field.default)
    return words


def _to_words(name: str, value: Any, default: Any) -> list[str]:
    flag = name.replace("_", "-")
    if is_dataclass(default) and not isinstance(default, type):
        inner, defaults = value if isinstance(value, Mapping) else asdict(value), asdict(default)
        changed = (key for key in inner if inner[key] != defaults[key])
        return [word for key in changed for word in _to_words(f"{name}.{key}", inner[key], defaults[key])]
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
