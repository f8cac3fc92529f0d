"""Names of files in artifacts, and the check of output files. Imports no heavy library."""

from pathlib import Path

from vpr.common.errors import UserError

CARD_NAME = "card.json"


def check_file(key: str, name: str) -> None:
    """Check that a file can be written under a name, before long work starts; an empty name is accepted.

    Raises:
        UserError: The name is a directory, its folder is missing, or its folder is an artifact; it starts with ``key``.
    """
    path = Path(name)
    if not name:
        return
    if (path.exists() and not path.is_file()) or not path.name or not path.parent.is_dir():
        raise UserError(f"{key}: {path}: expected a file in an existing folder.")
    if (path.parent / CARD_NAME).is_file():
        raise UserError(f"{key}: {path}: the folder is an artifact, whose files are fixed. Choose another folder.")
