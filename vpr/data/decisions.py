"""Decisions about the images of a catalogue, read from a CSV file, and the catalogue that they leave."""

import csv
import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, file_sha256, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, Catalog, Rejected, write_catalog_files
from vpr.data.csv_table import read_csv_rows
from vpr.data.relocate import find_relocated

log = get_logger(__name__)

_EXPECTED = "Use keep, drop, move PRODUCT or merge PRODUCT."
_COLUMNS = ("image", "decision", "product", "new_product", "split", "new_split")
_DROPPED = "dropped by a decision"
Change = tuple[str, str, str, str, str, str]


@dataclass
class Decisions:
    """Decisions of a CSV file.

    Attributes:
        images: ``drop``, or the product to move the image to after ``move ``, for each changed row of the catalogue.
        merges: Product that all images of a product go to.
    """

    images: dict[int, str] = field(default_factory=dict)
    merges: dict[str, str] = field(default_factory=dict)


def write_cleaned_catalog(catalog: Catalog, decisions: Path, output: str) -> Path:
    """Write the catalogue that decisions leave; its card counts the changes and ``changes.csv`` lists them.

    Raises:
        UserError: A decision is broken, or leaves no images or a query without gallery images.
    """
    read = read_decisions(decisions, catalog)
    assert catalog.artifact is not None
    values = {"reader": "table", "root": str(catalog.root.resolve()), "decisions": file_sha256(decisions)}
    stage = Stage(output, "catalog", values, catalog.as_parents(), "changes.csv")
    if find_relocated(stage, catalog.root):
        return stage.path
    cleaned, changes = apply_decisions(catalog, read, decisions)
    set_aside = _read_set_aside(catalog.artifact)
    set_aside += [(change[0], _DROPPED) for change in changes if change[1] == "drop"]
    counts = Counter(change[1] for change in changes)
    splits = Counter(split for change in changes for split in {change[4], change[5]} if split)
    with stage.write() as draft:
        write_catalog_files(draft, cleaned, set_aside)
        with (draft.path / "changes.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([_COLUMNS, *changes])
        draft.metrics |= {"changes": dict(counts), "changed_images": dict(splits)}
    summary = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "no changes"
    log.info(f"{output}: {len(cleaned)} images, {summary} (listed in changes.csv)")
    if scored := splits["validation"] + splits["test"]:
        log.warning(f"{output}: {scored} scored images changed. Scores are not comparable with those of before.")
    return stage.path


def read_decisions(table: Path, catalog: Catalog) -> Decisions:
    """Read and check decisions.

    Raises:
        UserError: A column is missing, an image, a product or a decision is unknown, or two decisions conflict.
    """
    rows_of: dict[str, list[int]] = {}
    for row, image in enumerate(catalog.table["image"].to_pylist()):
        rows_of.setdefault(image, []).append(row)
    products = catalog.table["product"].to_pylist()
    known = set(products)
    decisions = Decisions()
    for line, values in read_csv_rows(table, ("image", "decision")):
        where, image = f"{table}: line {line}:", values["image"]
        verb, _, target = values["decision"].partition(" ")
        if verb not in ("keep", "drop", "move", "merge") or bool(target) != (verb in ("move", "merge")):
            raise UserError(f"{where} decision '{values['decision']}' is not known. {_EXPECTED}")
        if image not in rows_of:
            raise UserError(f"{where} the catalogue has no image '{image}'.{_nearest(image, rows_of)}")
        if target and target not in known:
            raise UserError(f"{where} the catalogue has no product '{target}'.{_nearest(target, known)}")
        rows = _select(rows_of[image], products, values.get("product") or "", where)
        _record(decisions, verb, target, rows, products, where)
    if chained := [product for product in decisions.merges.values() if product in decisions.merges]:
        end = decisions.merges[chained[0]]
        raise UserError(f"{table}: '{chained[0]}' is merged into '{end}' and is a target too. Merge both into one.")
    return decisions


def apply_decisions(catalog: Catalog, decisions: Decisions, source: Path) -> tuple[Catalog, list[Change]]:
    """Return the changed catalogue, and its changes as rows of ``changes.csv``.

    A moved image takes the split and the category of its new product. Rows that become equal are kept once.

    Args:
        catalog: Catalogue to change.
        decisions: Decisions of :func:`read_decisions`.
        source: File of the decisions, for errors.

    Raises:
        UserError: No image is left, or a query of a scored split loses its last gallery image.
    """
    rows: list[dict[str, Any]] = catalog.table.to_pylist()
    homes = _homes(rows)
    decided = [_decide(row, decisions.images.get(number, ""), decisions.merges) for number, row in enumerate(rows)]
    seen = {_key(row) for row, (verb, _) in zip(rows, decided, strict=True) if not verb}
    kept, changes = [], []
    for row, (verb, product) in zip(rows, decided, strict=True):
        new = _in_product(row, product, *homes[product]) if verb else row
        if verb and verb != "drop" and _key(new) in seen:
            verb = "repeated"
        if verb in ("drop", "repeated"):
            changes.append((row["image"], verb, row["product"], "", row["split"], ""))
            continue
        kept.append(new)
        if verb:
            seen.add(_key(new))
            changes.append((row["image"], verb, row["product"], product, row["split"], new["split"]))
    if not kept:
        raise UserError(f"{source}: the decisions drop every image. Keep some.")
    if lost := sorted(_without_gallery(kept) - _without_gallery(rows)):
        split, product = lost[0]
        problem = f"product '{product}' of the {split} split has queries but no gallery image left"
        raise UserError(f"{source}: {problem}. Drop its queries too, or keep a gallery image.")
    return Catalog(pa.Table.from_pylist(kept, schema=SCHEMA), catalog.root, catalog.artifact), changes


def _read_set_aside(artifact: Artifact) -> list[Rejected]:
    with reraise_as_artifact_error(artifact):
        lines = artifact.file("set_aside.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        return [(image, reason) for image, reason in list(csv.reader(lines))[1:]]


def _select(rows: list[int], products: list[str], product: str, where: str) -> list[int]:
    """Return the rows of an image that a decision is about."""
    if product:
        rows = [row for row in rows if products[row] == product]
        if not rows:
            raise UserError(f"{where} the image is not of product '{product}'. Correct the row.")
    elif len({products[row] for row in rows}) > 1:
        raise UserError(f"{where} the image is listed for several products. Add a column 'product'.")
    return rows


def _record(decisions: Decisions, verb: str, target: str, rows: list[int], products: list[str], where: str) -> None:
    """Add a decision; raise :class:`UserError` if it conflicts with an earlier one or changes nothing."""
    product = products[rows[0]]
    if verb == "keep":
        return
    if target == product:
        raise UserError(f"{where} '{target}' is the product of the image. Give another product, or keep.")
    if verb == "merge":
        if decisions.merges.setdefault(product, target) != target:
            earlier = decisions.merges[product]
            raise UserError(f"{where} '{product}' is also merged into '{earlier}'. Keep one of the rows.")
        return
    for row in rows:
        decision = f"{verb} {target}".strip()
        if decisions.images.setdefault(row, decision) != decision:
            raise UserError(f"{where} the image has another decision, '{decisions.images[row]}'. Keep one of the rows.")


def _homes(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the split and the category of most images of each product."""
    counters: dict[str, Counter[tuple[str, str]]] = {}
    for row in rows:
        counters.setdefault(row["product"], Counter())[row["split"], row["category"]] += 1
    return {product: counter.most_common(1)[0][0] for product, counter in counters.items()}


def _decide(row: dict[str, Any], decision: str, merges: dict[str, str]) -> tuple[str, str]:
    """Return the verb, empty for no change, and the product of a row."""
    verb, _, target = decision.partition(" ")
    product = target or row["product"]
    final = merges.get(product, product)
    return verb or ("merge" if final != row["product"] else ""), final


def _in_product(row: dict[str, Any], product: str, split: str, category: str) -> dict[str, Any]:
    """Return a row in another product. Images of scored splits are gallery or query."""
    role = row["role"]
    if row["split"] != split:
        role = "train" if split == "train" else "gallery" if role == "train" else role
    return {**row, "product": product, "split": split, "category": category, "role": role}


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["image"], row["product"], str(row["box"])


def _without_gallery(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return (split, product) of the scored products that have queries but no gallery image."""
    found: dict[str, set[tuple[str, str]]] = {"query": set(), "gallery": set()}
    for row in rows:
        if row["split"] != "train" and row["role"] in found:
            found[row["role"]].add((row["split"], row["product"]))
    return found["query"] - found["gallery"]


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else " Correct the row."
