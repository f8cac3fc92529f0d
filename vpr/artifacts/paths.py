"""Names of files in artifacts, and the check of output files. Imports no heavy library."""

from __future__ import annotations

from pathlib import Path

from vpr.common.errors import UserError

CARD_NAME = "card.json"


def check_file(key: str, name: str) -> None:
    """Refuse a name that no file can be written to, by its key; long work asks before it starts. Empty names none."""
    path = Path(name)
    if not name:
        return
    if (path.exists() and not path.is_file()) or not path.name or not path.parent.is_dir():
        raise UserError(f"{key}: {path}: is no file in a folder that exists: name one")
    if (path.parent / CARD_NAME).is_file():
        raise UserError(f"{key}: {path}: lies in an artifact, whose files are fixed: choose another folder")
