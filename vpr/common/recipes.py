"""YAML recipes: a bounded and safe loader, and the packaged recipes of the stages."""

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from vpr.common.errors import UserError

_STAGES = ("teacher", "student")
_MAX_CHARACTERS = 1 << 16
_MAX_BITS = 64
_YAML = get_loader("yaml")


@dataclass(frozen=True)
class ListConfig:
    """No keys."""


@dataclass(frozen=True)
class ShowConfig:
    """Recipe to print.

    Attributes:
        name: Name of a packaged recipe, with its stage if several stages have one, such as `teacher/sample`.
    """

    name: str


@dataclass(frozen=True)
class CopyConfig:
    """Recipe to copy.

    Attributes:
        name: Name of a packaged recipe, with its stage if several stages have one, such as `teacher/sample`.
        folder: Existing folder for the copy.
    """

    name: str
    folder: str = "."


def list_recipes(config: ListConfig) -> list[dict[str, str]]:
    """Print and return the name and the first comment of every packaged recipe."""
    recipes = [{"name": name, "description": _description(path)} for name, path in _packaged().items()]
    for recipe in recipes:
        print(f"{recipe['name']:24} {recipe['description']}")
    return recipes


def show_recipe(config: ShowConfig) -> None:
    """Print a packaged recipe."""
    print(_find_packaged(config.name).read_text(encoding="utf-8"), end="")


def copy_recipe(config: CopyConfig) -> Path:
    """Copy a packaged recipe to a folder and return the path of the copy."""
    source, folder = _find_packaged(config.name), Path(config.folder)
    if not folder.is_dir():
        raise UserError(f"folder: '{folder}' does not exist. Create it, or name another one.")
    if (target := folder / source.name).exists():
        raise UserError(f"{target}: already exists. Remove it, or name another folder.")
    return Path(shutil.copyfile(source, target))


def find_recipe(name: str, stage: str) -> Path:
    """Return a recipe's file, by path or packaged name; raise :class:`UserError` if there is none."""
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file. See `vpr recipes list` for the packaged recipes.")
        return path
    return _find_packaged(name if "/" in name else f"{stage}/{name}")


def _find_packaged(name: str) -> Path:
    packaged = _packaged()
    names = [full_name for full_name in packaged if name in (full_name, full_name.partition("/")[2])]
    if len(names) == 1:
        return packaged[names[0]]
    if names:
        raise UserError(f"{name}: several stages have this recipe. Choose {' or '.join(names)}.")
    stage = name.partition("/")[0]
    choices = [full_name for full_name in packaged if full_name.startswith(f"{stage}/")] or packaged
    raise UserError(f"{name}: unknown recipe. Choose one of {', '.join(choices)}, or name a YAML file.")


def _packaged() -> dict[str, Path]:
    """Return the files of the packaged recipes by name, such as ``teacher/sample``."""
    folders = {stage: spec.submodule_search_locations for stage in _STAGES if (spec := find_spec(stage))}
    return {
        f"{stage}/{path.stem}": path
        for stage, locations in folders.items()
        for location in locations or ()
        for path in sorted(Path(location, "recipes").glob("*.yaml"))
    }


def _description(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().partition(":")[0].rstrip(".")


def install_safe_yaml_loader() -> None:
    """Have jsonargparse reject recipes that are short to write and endless to read."""
    set_loader("yaml", _load, (yaml.YAMLError, ValueError))


def _load(text: str) -> Any:
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"more than {_MAX_CHARACTERS} characters of YAML")
    # A few nested aliases expand to a billion values.
    if "&" in text and any(isinstance(token, yaml.AnchorToken) for token in yaml.scan(text, yaml.SafeLoader)):
        raise ValueError("a recipe with anchors (&). Write out their values")
    try:
        value = _YAML(text)
        _check_numbers(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if isinstance(value, dict) and "config" in value:  # an artifact's card has it too
        raise ValueError("a recipe has no key 'config'. Write the settings themselves")
    return value


def _check_numbers(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError(f"a number of more than {_MAX_BITS} bits")
    for element in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(element)
