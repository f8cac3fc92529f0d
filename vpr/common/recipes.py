"""Recipes as they are read: YAML of bounded size, in which nothing stands for something else."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

_MOST_LETTERS = 1 << 16
_YAML = get_loader("yaml")


def install_safe_yaml_loader() -> None:
    """Have jsonargparse refuse recipes that are short to write and endless to read."""
    set_loader("yaml", _load, (yaml.YAMLError, ValueError))


def _load(text: str) -> Any:
    if len(text) > _MOST_LETTERS:
        raise ValueError(f"more than {_MOST_LETTERS} letters of YAML")
    # A few nested aliases are a billion values to whoever walks through them.
    if "&" in text and any(isinstance(token, yaml.AnchorToken) for token in yaml.scan(text, yaml.SafeLoader)):
        raise ValueError("a recipe with anchors (&): write out what they stand for")
    try:
        value = _YAML(text)
        _check_numbers(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if isinstance(value, dict) and "config" in value:  # an artifact's card has it too
        raise ValueError("a recipe has no key 'config': write the settings themselves")
    return value


def _check_numbers(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError("a number of more than 64 bits")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(inner)
