"""Product ids and images that say who is who: normalised where one reading is honest, else listed and set aside."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from vpr.common.errors import UserError
from vpr.data.catalog import Rejected
from vpr.data.duplicates import NEAR_BITS
from vpr.data.readers import UNLABELLED, Row

Key = tuple[str, tuple[float, ...] | None]  # checksum of an image's bytes, and its box
_PREFIXED = ("products10k", "aicrowd")  # sources that put their name and a slash before a product's id
_MISSING = frozenset({"", "nan", "none", "null", "nil", "na", "n/a", "#n/a", "<na>", "-nan"})
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
_INTEGER, _FLOAT = re.compile(r"-?\d+"), re.compile(r"(-?\d+)\.0+")
_SCIENTIFIC = re.compile(r"\d\.\d+e\+?\d+", re.IGNORECASE)
TWIN = "query equals gallery image "  # start of the reason of a twin
_EXAMPLES = 3


def normalise_id(text: str) -> str:
    """Return an id in Unicode form NFC, with single spaces and none around it.

    All kinds of white space become spaces, and invisible characters around the id are removed.
    """
    return " ".join(unicodedata.normalize("NFC", text).split()).strip(_INVISIBLE + " ")


def is_missing(product: str) -> bool:
    """Return whether a normalised id is empty, or the text of a missing value such as ``nan``."""
    return product.casefold() in _MISSING


def clean_ids(rows: list[Row], where: str) -> tuple[list[Row], list[str]]:
    """Normalise the product ids of rows from a reader; return rows and lines for the summary.

    A row without an id gets the reason as ``invalid``. If all ids are integers, ``4.0`` becomes ``4``.

    Raises:
        UserError: Some ids are no numbers, and ``4`` and ``4.0`` are both in the table.
    """
    written: dict[str, str] = {}  # each id as written, after its prefix, and normalised
    for row in rows:
        if _is_labelled(row):
            prefix = _prefix(row)
            text = row["product"][len(prefix) :]
            written.setdefault(text, normalise_id(text))
    integers = _merge_floats({name for name in written.values() if not is_missing(name)}, where)
    final = {text: integers.get(name, name) for text, name in written.items()}
    cleaned, changed = [], 0
    for row in rows:
        if _is_labelled(row):
            prefix = _prefix(row)
            text = row["product"][len(prefix) :]
            changed += final[text] != text
            row = {**row, "product": prefix + final[text], "category": normalise_id(row["category"])}
            if is_missing(final[text]):
                row["invalid"] = f"no product id: '{text}'"
        cleaned.append(row)
    return cleaned, _describe_ids(final, changed)


def reject_invalid(rows: list[Row], skip: bool, where: str) -> tuple[list[Row], list[Rejected]]:
    """Return the usable rows, and (image, reason) of those with ``invalid``.

    Raises:
        UserError: There are rows with ``invalid``, and ``skip`` is off; the message has their count and examples.
    """
    invalid = [row for row in rows if "invalid" in row]
    if invalid and not skip:
        examples = "; ".join(f"{row_name(row)}: {row['invalid']}" for row in invalid[:_EXAMPLES])
        count = f"{len(invalid)} of {len(rows)} rows cannot be used"
        fix = "Correct them, or set them aside with --skip-invalid-rows"
        raise UserError(f"{where}: {count} ({examples}). {fix}.")
    usable = [row for row in rows if "invalid" not in row]
    return usable, [(row["image"], row["invalid"]) for row in invalid]


def row_name(row: Row) -> str:
    """Return the name of a row for messages: its line if it has one, and its image."""
    return f"line {row['line']} ({row['image']})" if row.get("line") else row["image"]


def drop_repeats(rows: list[Row]) -> tuple[list[Row], list[Rejected], list[str]]:
    """Return rows that do not repeat an earlier row, (image, reason) of the others, and lines for the summary.

    Unlabelled rows stay: a hidden test set must be submitted as it is.
    """
    kept, rejected, seen = [], [], set()
    for row in rows:
        key = (row["image"], row["product"], row["role"], row["split"], _box_key(row["box"]))
        if key in seen and row["source"] != UNLABELLED:
            rejected.append((row["image"], "repeats an earlier row"))
        else:
            seen.add(key)
            kept.append(row)
    return kept, rejected, [f"rows that repeat an earlier row: {len(rejected)} set aside"] if rejected else []


def shared_images(table: pa.Table) -> dict[Key, list[str]]:
    """Return the products of each image that is under several, by its bytes and box, in the order of the table.

    One image may show several products in different boxes. Images without labels are left out.
    """
    products: dict[Key, dict[str, None]] = defaultdict(dict)  # a dictionary keeps the order of the table
    sources, names = table["source"].to_pylist(), table["product"].to_pylist()
    for key, source, product in zip(_image_keys(table), sources, names, strict=True):
        if source != UNLABELLED:
            products[key][product] = None
    return {key: list(names) for key, names in products.items() if len(names) > 1}


def find_conflicts(table: pa.Table) -> tuple[dict[int, str], list[str]]:
    """Find rows with an image that is under several products; return their reasons, and lines for the summary."""
    shared = shared_images(table)
    keys, images, products = _image_keys(table), table["image"].to_pylist(), table["product"].to_pylist()
    reasons = {
        row: f"under {len(shared[key])} products: {_list(shared[key])}" for row, key in enumerate(keys) if key in shared
    }
    if not reasons:
        return {}, []
    first = next(iter(reasons))
    example = f"{images[first]} under {_list(shared[keys[first]])}"
    count = len({keys[row] for row in reasons})
    notes = [f"images under several products: {count}, {len(reasons)} rows set aside ({example})"]
    kept = {product for row, product in enumerate(products) if row not in reasons}
    if lost := sorted({products[row] for row in reasons} - kept):
        notes.append(f"products without another image: {len(lost)}, left out ({_list(lost)})")
    return reasons, notes


def find_twins(table: pa.Table) -> tuple[list[bool], list[Rejected], list[str]]:
    """Find queries that equal a gallery image of their split, byte for byte and in the same box.

    If queries and gallery of a split are the same images, and some product has two of them, they stay: each can search
    the others.

    Returns for each row of a catalogue's table whether it is to be set aside, (image, reason) of these rows, and lines
    for the summary.

    Raises:
        UserError: No query of a split is left.
    """
    columns = [table[name].to_pylist() for name in ("split", "role", "sha256", "image")]
    boxes = [_box_key(box) for box in table["box"].to_pylist()]
    rows = list(zip(*columns, boxes, strict=True))
    gallery = {(split, sha256, box): image for split, role, sha256, image, box in rows if role == "gallery"}
    is_labelled = [source != UNLABELLED for source in table["source"].to_pylist()]  # others are not scored
    is_twin = [
        labelled and role == "query" and (split, sha256, box) in gallery
        for (split, role, sha256, _, box), labelled in zip(rows, is_labelled, strict=True)
    ]
    keys = [(sha256, box) for _, _, sha256, _, box in rows]
    rejected: list[Rejected] = []
    notes = []
    for split in dict.fromkeys(columns[0]):
        count = sum(row[:2] == (split, "query") for row in rows)
        equal = [number for number, twin in enumerate(is_twin) if twin and rows[number][0] == split]
        if not equal:
            continue
        pairs = [(rows[number][3], gallery[split, rows[number][2], rows[number][4]]) for number in equal]
        example = f"{pairs[0][0]} equals {pairs[0][1]}"
        if _searches_itself(table, split, keys):
            notes.append(
                f"{split} queries that are the gallery images too: all {count} ({example}), kept to leave one out"
            )
            is_twin = [twin and row[0] != split for twin, row in zip(is_twin, rows, strict=True)]
            continue
        if len(equal) == count:
            problem = f"all {count} queries equal a gallery image, byte for byte ({example})"
            raise UserError(f"{split}: {problem}. A score would be 1 for any model. Give other images as queries.")
        notes.append(f"{split} queries that equal a gallery image: {len(equal)} of {count}, set aside ({example})")
        rejected += [(image, f"{TWIN}{other}") for image, other in pairs]
    return is_twin, rejected, notes


def _searches_itself(table: pa.Table, split: str, keys: list[tuple[Any, ...]]) -> bool:
    """Return whether queries and gallery of a split are the same images, and some product has two of them."""
    parts: dict[str, set[Any]] = {"query": set(), "gallery": set()}
    products: dict[str, set[Any]] = defaultdict(set)
    columns = (table[name].to_pylist() for name in ("split", "role", "product"))
    for other, role, product, key in zip(*columns, keys, strict=True):
        if other == split and role in parts:
            parts[role].add(key)
            products[product].add(key)
    return parts["query"] == parts["gallery"] and any(len(images) > 1 for images in products.values())


def describe_near_twins(table: pa.Table, hashes: dict[tuple[str, str], int]) -> list[str]:
    """Return lines that count the queries with a near-duplicate of their product in the gallery of their split.

    ``hashes`` has the :func:`vpr.data.duplicates.image_hash` of each row by image and box, as :func:`hash_keys` gives.
    """
    columns = [table[name].to_pylist() for name in ("split", "role", "product")]
    keys = hash_keys(table)
    gallery: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for split, role, product, key in zip(*columns, keys, strict=True):
        if role == "gallery":
            gallery[split, product].append(key)
    queries: dict[str, int] = defaultdict(int)
    near: dict[str, list[str]] = defaultdict(list)
    for split, role, product, key in zip(*columns, keys, strict=True):
        if role != "query":
            continue
        queries[split] += 1
        others = (other for other in gallery[split, product] if other != key)
        match = next((other for other in others if (hashes[other] ^ hashes[key]).bit_count() <= NEAR_BITS), None)
        if match:
            near[split].append(f"{key[0]} and {match[0]}")
    return [
        f"{split} queries with a near-duplicate of their product in the gallery: {len(pairs)} of {queries[split]} "
        f"({pairs[0]})"
        for split, pairs in near.items()
    ] + _describe_same_photos(table)


def _describe_same_photos(table: pa.Table) -> list[str]:
    """Return lines that count the queries cut from a photograph of the gallery, with their product and another box."""
    columns = [table[name].to_pylist() for name in ("split", "role", "product", "sha256", "image")]
    rows = list(zip(*columns, map(_box_key, table["box"].to_pylist()), strict=True))
    gallery: dict[tuple[str, str, str], set[Any]] = defaultdict(set)
    for split, role, product, sha256, _, box in rows:
        if role == "gallery":
            gallery[split, product, sha256].add(box)
    cut: dict[str, list[str]] = defaultdict(list)
    for split, role, product, sha256, image, box in rows:
        if role == "query" and gallery.get((split, product, sha256), {box}) - {box}:
            cut[split].append(image)
    return [
        f"{split} queries cut from a photograph that is in the gallery with another box: {len(images)} ({images[0]})"
        for split, images in cut.items()
    ]


def hash_keys(table: pa.Table) -> list[tuple[str, str]]:
    """Return image and box of each row of a catalogue's table, to look up its hash."""
    return list(zip(table["image"].to_pylist(), map(str, table["box"].to_pylist()), strict=True))


def _merge_floats(names: set[str], where: str) -> dict[str, str]:
    """Return the integer of each id such as ``4.0``, if all ids are integers."""
    floats = {name: match[1] for name in sorted(names) if (match := _FLOAT.fullmatch(name))}
    if not floats or all(_INTEGER.fullmatch(name) or name in floats for name in names):
        return floats
    if both := [name for name, number in floats.items() if number in names]:
        examples = ", ".join(f"'{floats[name]}' and '{name}'" for name in both[:_EXAMPLES])
        problem = f"{len(both)} product ids are also written as a decimal ({examples}), and other ids are no numbers"
        raise UserError(f"{where}: {problem}. Write each id in one way, as text.")
    return {}


def _describe_ids(final: dict[str, str], changed: int) -> list[str]:
    notes = []
    products = {name for name in final.values() if not is_missing(name)}
    if changed:
        joined = len([name for name in final.values() if not is_missing(name)]) - len(products)
        examples = _list([f"{text!r} is {name!r}" for text, name in final.items() if text != name])
        text = (
            f"product ids normalised (white space, Unicode form or decimals): {changed} rows, {joined} spellings joined"
        )
        notes.append(f"{text} ({examples})")
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(products):
        groups[_loose_key(name)].append(name)
    if alike := [group for group in groups.values() if len(group) > 1]:
        examples = _list([" and ".join(f"'{name}'" for name in group[:2]) for group in alike])
        notes.append(f"product ids that differ only in case, width or leading zeros: {len(alike)} groups ({examples})")
    if scientific := [name for name in sorted(products) if _SCIENTIFIC.fullmatch(name)]:
        notes.append(f"product ids that a spreadsheet may have shortened: {len(scientific)} ({_list(scientific)})")
    return notes


def _loose_key(name: str) -> str:
    """Return what two spellings of an id probably share."""
    key = re.sub(r"\s+", "", unicodedata.normalize("NFKC", name).casefold())
    return (key.lstrip("0") or "0") if key.isdecimal() else key or name


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
    return ", ".join(names[:_EXAMPLES]) + more


def _is_labelled(row: Row) -> bool:
    return row.get("source") != UNLABELLED and "rejected" not in row


def _prefix(row: Row) -> str:
    prefix = f"{row['source']}/"
    return prefix if row["source"] in _PREFIXED and row["product"].startswith(prefix) else ""


def _image_keys(table: pa.Table) -> list[Key]:
    """Return bytes and box of each row."""
    return list(zip(table["sha256"].to_pylist(), map(_box_key, table["box"].to_pylist()), strict=True))


def _box_key(box: dict[str, float] | None) -> tuple[float, ...] | None:
    return None if box is None else tuple(box.values())
