"""Who may see which images: products are split whole, and nothing that is scored is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, SPLITS, Catalog
from vpr.data.config import check_shares

log = get_logger(__name__)


def split_by_product(table: pa.Table, validation: float, test: float, seed: int) -> pa.Table:
    """Assign whole products to splits.

    Held-out products whose images have no retrieval role get one: the first half (rounded up) of a
    product's images, by path, is its gallery, the rest are queries. Products with a single
    image cannot be queried and stay in training.

    Args:
        table: of :data:`SCHEMA`.
        validation: share of products.
        test: share of products.
        seed: the same products and seed give the same split, whatever the order of the rows.

    Raises:
        UserError: shares that leave no training products, or a share that comes to no product.
    """
    if validation == 0 and test == 0:
        return table
    check_shares(validation, test, seed)
    products = table["product"].combine_chunks().dictionary_encode()
    names = sorted(products.dictionary.to_pylist())
    codes = pc.index_in(products.dictionary, pa.array(names)).to_numpy()[products.indices.to_numpy()]
    counts = np.bincount(codes, minlength=len(names))
    several = np.array([name for name, count in zip(names, counts.tolist(), strict=True) if count > 1], dtype=np.str_)
    np.random.default_rng(seed).shuffle(several)
    tests, validations = round(test * len(names)), round(validation * len(names))
    held = dict.fromkeys(several[:tests].tolist(), "test")
    held.update(dict.fromkeys(several[tests : tests + validations].tolist(), "validation"))
    for name, share in (("validation", validation), ("test", test)):
        if share and name not in held.values():
            raise UserError(
                f"{name} {share}: is none of {len(names)} products, {len(several)} of which have the two images "
                "that a query and its gallery need: raise it or add images"
            )
    splits = np.array([held.get(name, "train") for name in names], dtype=object)[codes]
    roles = table["role"].to_numpy().copy()
    asked = _order_in_product(table, codes, splits != "train") * 2 >= counts[codes]
    given = (splits == "train") | (roles != "train")
    roles[~given] = np.where(asked, "query", "gallery")[~given]
    columns = {"split": splits, "role": roles}
    return pa.table(
        {name: pa.array(columns[name], pa.string()) if name in columns else table[name] for name in SCHEMA.names},
        schema=SCHEMA,
    )


def check_leaks(train: Catalog, evaluation: Catalog, allow: bool = False) -> dict[str, Any]:
    """Refuse training images or products that are also evaluated.

    Args:
        train: what is trained on.
        evaluation: what is scored.
        allow: return what is found instead of refusing it.

    Returns:
        for ``products`` and ``images``, where they are shared, their ``count`` and the ``first`` few by name.

    Raises:
        UserError: with the number and the first few of the shared ones.
    """
    found: dict[str, Any] = {}
    for column, key, what in (("product", "products", "products"), ("sha256", "images", "images (same bytes)")):
        trained = train.table[column].combine_chunks()
        scored = evaluation.table[column].combine_chunks()
        shared = sorted(trained.filter(pc.is_in(trained, scored)).drop_null().unique().to_pylist())
        if not shared:
            continue
        first = shared[:3]
        if column == "sha256":
            at = pc.index_in(pa.array(first), trained).to_pylist()
            first = [train.table["image"][row].as_py() for row in at]
        if not allow:
            raise UserError(
                f"leak: {len(shared)} {what} are both trained and scored, first {', '.join(first)}: split again"
            )
        found[key] = {"count": len(shared), "first": first}
    return found


def find_leaks(catalog: Catalog, allow: bool) -> dict[str, Any]:
    """What is both trained on (or selected by) and scored; refused unless allowed."""
    parts = {split: catalog.select(split=split) for split in SPLITS}
    found = {}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        leak = check_leaks(parts[first], parts[second], allow)
        if leak:
            found[f"{first} in {second}"] = leak
            log.info(f"  leak allowed: {first} shares {leak} with {second}; the card says so")
    return found


def _order_in_product(table: pa.Table, codes: NDArray[np.int64], keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(n,) place of each kept row among its product's, which are all kept, by path and box; 0 for the others."""
    rows = np.flatnonzero(keep)
    part = table.take(rows)
    boxes = [str(box) for box in part["box"].to_pylist()]
    keys = list(zip(codes[rows].tolist(), part["image"].to_pylist(), boxes, strict=True))
    order = np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.int64)
    _, first, counts = np.unique(codes[rows][order], return_index=True, return_counts=True)
    places = np.zeros(len(table), dtype=np.int64)
    places[rows[order]] = np.arange(len(rows)) - np.repeat(first, counts)
    return places
