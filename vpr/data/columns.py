"""Columns of tables: matched by name, mapped by the user, with suggestions for a missing one."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence

from vpr.common.errors import UserError

_BOX = ("box", "box_x", "box_y", "box_w", "box_h", "xmin", "ymin", "xmax", "ymax")
COLUMNS = ("image", "product", "category", "role", "split", *_BOX)
# Names that other tools give to a column, in lower case, most specific first.
_COMMON_NAMES = {
    "image": ("image_path", "img_path", "image_file", "filepath", "file_path", "filename", "file_name", "file", "path")
    + ("image_name", "img", "image_id", "name"),
    "product": ("product_id", "sku", "item_id", "product_code", "article_id", "label_id", "label", "class_id", "class")
    + ("target", "item", "id"),
    "decision": ("action",),
}
_MAX_SHOWN = 200  # characters of the header in an error message


def read_mapping(words: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=COLUMN`` words, such as ``product=product_id``.

    Raises:
        UserError: A word has another form, a name is unknown, or a name is given twice.
    """
    mapping: dict[str, str] = {}
    for word in words:
        name, equals, column = word.partition("=")
        if not equals or not column.strip():
            raise UserError(f"columns: expected NAME=COLUMN, such as product=product_id, got '{word}'.")
        if name not in COLUMNS:
            close = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Use {', '.join(COLUMNS)}."
            raise UserError(f"columns: '{name}' in '{word}' is not known. {hint}")
        if mapping.setdefault(name, column) != column:
            raise UserError(f"columns: '{name}' is given twice. Map it to one column.")
    return mapping


def rename_columns(
    found: Sequence[str], known: Sequence[str], required: Sequence[str], mapping: Mapping[str, str], where: str
) -> list[str]:
    """Return the name to use for each column of a table.

    A column gets a ``known`` name if the mapping says so, or if it has that name regardless of case and white space
    around it. Other columns keep their name. ``where`` names the table, and its form in parentheses, in errors.

    Raises:
        UserError: A required or mapped column is missing, or two columns have the same name.
    """
    plain = [" ".join(name.split()) for name in found]
    _reject_doubled(plain, where)
    names = list(plain)
    taken: dict[int, str] = {}
    for name, column in mapping.items():
        if (other := taken.setdefault(_find_mapped(plain, column, name, where), name)) != name:
            raise UserError(f"columns: '{column}' is mapped to {other} and {name}. Map it to one of them.")
    for index, name in enumerate(plain):
        lower = name.casefold()
        if index in taken:
            names[index] = taken[index]
        elif name in mapping or lower in mapping:
            names[index] = f"{name} (not mapped)"
        elif lower in known and lower not in plain:
            names[index] = lower
    if doubled := [name for name, count in Counter(names).items() if count > 1 and name in known]:
        raise UserError(f"{where}: several columns are named '{doubled[0]}'. Rename all but one.")
    if missing := [name for name in required if name not in names]:
        raise UserError(f"{where}: {_explain_missing(plain, missing, required)}")
    return names


def common_names(name: str) -> tuple[str, ...]:
    """Return the names that other tools give to a column, in lower case, most specific first."""
    return _COMMON_NAMES.get(name, ())


def list_columns(columns: Sequence[str]) -> str:
    """Return the columns of a table for an error message, shortened."""
    text = ", ".join(columns) or "an empty first line"
    return f"{text[:_MAX_SHOWN]} ..." if len(text) > _MAX_SHOWN else text


def _find_mapped(found: Sequence[str], column: str, name: str, where: str) -> int:
    """Return the index of a mapped column."""
    wanted = " ".join(column.split())
    matches = [index for index, other in enumerate(found) if other == wanted]
    matches = matches or [index for index, other in enumerate(found) if other.casefold() == wanted.casefold()]
    if not matches:
        close = difflib.get_close_matches(wanted, found, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else "Check --columns."
        raise UserError(f"{where}: no column '{column}' for {name}. Found: {list_columns(found)}. {hint}")
    if len(matches) > 1:
        raise UserError(f"{where}: several columns are named '{column}'. Rename all but one.")
    return matches[0]


def _reject_doubled(found: Sequence[str], where: str) -> None:
    if doubled := [name for name, count in Counter(found).items() if count > 1 and name]:
        raise UserError(f"{where}: {found.count(doubled[0])} columns are named '{doubled[0]}'. Rename all but one.")


def _explain_missing(found: Sequence[str], missing: Sequence[str], required: Sequence[str]) -> str:
    """Return what is missing, what was found, and the option that maps the columns that other tools use."""
    lower = [name.casefold() for name in found]
    words, taken = [], set()
    for name in missing:
        candidates = [other for other in common_names(name) if other in lower and other not in taken]
        taken |= set(candidates[:1])
        words.append(f"{name}={found[lower.index(candidates[0])] if candidates else 'NAME'}")
    problem = f"column '{missing[0]}' is missing. Found: {list_columns(found)}. Needed: {', '.join(required)}."
    if any(name not in COLUMNS for name in missing):
        return problem
    return f"{problem} Rename the columns, or give --columns {' '.join(words)}."
