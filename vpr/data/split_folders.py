"""Folders that hold the products of a split or role: ``train``, ``val``, ``test``, ``query``, ``gallery``."""

from __future__ import annotations

from pathlib import Path

from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

# Names of splits in folders and tables, in lower case.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ROLES = {"query": "query", "queries": "query", "gallery": "gallery"}
Places = dict[str, tuple[str, str]]


def find_split_folders(root: Path, names: list[str]) -> Places:
    """Return split and role of each folder that is one, by its name in any case; empty if the folders are products.

    The folders are splits and roles if every folder of the root with images is named as one. Roles need a folder for
    queries and one for the gallery, next to the splits or in one of them; alone they are of the split ``test``. A
    single folder with such a name among others is a product.

    Args:
        root: Folder of the data set.
        names: Paths of the images, relative to the root.

    Returns:
        Split and role (``train`` for none) by the path of the folder, relative to the root.

    Raises:
        UserError: There are folders for training and for scored images, and others next to them. Or the root has a
            single folder, and the splits are in it.
    """
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    splits = {folder: SPLIT_NAMES[folder.casefold()] for folder in folders if folder.casefold() in SPLIT_NAMES}
    roles = _find_roles(folders)
    others = [folder for folder in folders if folder not in splits and folder not in roles]
    if others and (roles or ("train" in splits.values() and len(set(splits.values())) > 1)):
        raise _mixed(root, [*splits, *roles], others)
    if len(folders) == len(others) == 1:
        _reject_nested(root, folders[0], names)
    if others or not (splits or roles):
        if splits:
            log.warning(f"{root}: all its folders are read as products, also {', '.join(splits)}, named as a split")
        else:
            _warn_of_inner_splits(root, folders, names)
        return {}
    places: Places = {folder: ("test", role) for folder, role in roles.items()}
    for folder, split in splits.items():
        inner = _list_inner(folder, names)
        inner_roles = _find_roles(inner)
        if inner_roles and (mixed := [name for name in inner if name not in inner_roles]):
            raise _mixed(root / folder, list(inner_roles), mixed)
        places |= {f"{folder}/{name}": (split, role) for name, role in inner_roles.items()}
        places |= {} if inner_roles else {folder: (split, "train")}
    meanings = [f"{name} is {split}{'' if role == 'train' else f', {role}'}" for name, (split, role) in places.items()]
    log.info(f"{root}: its folders are splits: {'; '.join(meanings)}")
    return places


def place_of(name: str, places: Places) -> tuple[str, tuple[str, str], str]:
    """Return the folder of an image that is a split or role, its meaning, and the rest of the path."""
    parts = name.split("/")
    for depth in (2, 1):
        folder = "/".join(parts[:depth])
        if folder in places and len(parts) > depth:
            return folder, places[folder], "/".join(parts[depth:])
    return "", ("", "train"), name


def _find_roles(folders: list[str]) -> dict[str, str]:
    """Return the role of each folder that is named as one; empty unless both roles are there."""
    roles = {folder: _ROLES[folder.casefold()] for folder in folders if folder.casefold() in _ROLES}
    return roles if set(roles.values()) == {"query", "gallery"} else {}


def _list_inner(folder: str, names: list[str]) -> list[str]:
    """Return the names of the folders in a folder of the root."""
    return sorted({name.split("/")[1] for name in names if name.startswith(f"{folder}/") and name.count("/") > 1})


def _reject_nested(root: Path, folder: str, names: list[str]) -> None:
    """Raise :class:`UserError` if the only folder of the root, which would be the only product, holds splits."""
    inner = _list_inner(folder, names)
    named = [name for name in inner if name.casefold() in SPLIT_NAMES or name.casefold() in _ROLES]
    if named and (len(named) > 1 or len(inner) == 1):
        problem = f"its only folder '{folder}' would be one product, but it has the splits {', '.join(named)}"
        raise UserError(f"{root}: {problem}. Give {root / folder} as the root, or rename these folders.")


def _warn_of_inner_splits(root: Path, products: list[str], names: list[str]) -> None:
    """Warn of a product whose folders are all named as splits or roles; they mean nothing, as no product is divided."""
    for product in products:
        inner = _list_inner(product, names)
        named = [name for name in inner if name.casefold() in SPLIT_NAMES or name.casefold() in _ROLES]
        if len(named) > 1 and named == inner:
            folders = f"{', '.join(named)} in {product}"
            log.warning(f"{root}: folders of products are not splits ({folders}): a product is in one split only")
            return


def _mixed(root: Path, named: list[str], others: list[str]) -> UserError:
    first = f"'{others[0]}'" + (f" and {len(others) - 1} more folders are" if others[1:] else " is")
    problem = f"the folders {', '.join(named)} are named as splits, but {first} not"
    return UserError(f"{root}: {problem}. Move products into a split's folder, or rename the folders.")
