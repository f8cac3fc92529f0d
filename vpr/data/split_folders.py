"""Folders named ``train``, ``val`` and ``test``, which hold the products of a split."""

from pathlib import Path

from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

FOLDERS = {"train": "train", "test": "test"} | dict.fromkeys(("val", "valid", "validation"), "validation")


def find_split_folders(root: Path, names: list[str]) -> dict[str, str]:
    """Return the split of each folder that is one, by its name in any case; empty if the folders are products.

    The folders are splits if every folder of the root with images is named as one. A single folder with such a name
    among others is a product.

    Args:
        root: Folder of the data set.
        names: Paths of the images, relative to the root.

    Raises:
        UserError: There are folders for training and for scored images, and others next to them.
    """
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    splits = {folder: FOLDERS[folder.casefold()] for folder in folders if folder.casefold() in FOLDERS}
    others = [folder for folder in folders if folder not in splits]
    if others and "train" in splits.values() and len(set(splits.values())) > 1:
        first = f"'{others[0]}'" + (f" and {len(others) - 1} more folders are" if others[1:] else " is")
        problem = f"the folders {', '.join(splits)} are named as splits, but {first} not"
        raise UserError(f"{root}: {problem}. Move products into a split's folder, or rename the folders.")
    if others or not splits:
        return {}
    log.info(f"{root}: its folders are splits: {', '.join(f'{name} is {split}' for name, split in splits.items())}")
    return splits
