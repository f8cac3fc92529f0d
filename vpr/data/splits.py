"""Splits by product, and checks that no scored image or product is trained on."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.config import check_shares
from vpr.data.readers import SPLITS

log = get_logger(__name__)


def split_by_product(table: pa.Table, validation: float, test: float, seed: int) -> pa.Table:
    """Assign each product of a table to one split; the seed gives the same split in any order of the rows.

    Images of held-out products without a retrieval role get one. The first half (rounded up) of a product's
    images, by path, becomes its gallery; the other images become queries. Products with a single image have
    no pair of gallery and query, so they stay in training. ``validation`` and ``test`` are shares of the products.

    Raises:
        UserError: The shares leave no training products, or a share selects no product.
    """
    if validation == 0 and test == 0:
        return table
    check_shares(validation, test, seed)
    products = table["product"].combine_chunks().dictionary_encode()
    names = sorted(products.dictionary.to_pylist())
    codes = pc.index_in(products.dictionary, pa.array(names)).to_numpy()[products.indices.to_numpy()]
    counts = np.bincount(codes, minlength=len(names))
    splittable = np.array(names, dtype=np.str_)[counts > 1]
    np.random.default_rng(seed).shuffle(splittable)
    test_count, validation_count = round(test * len(names)), round(validation * len(names))
    held_out = dict.fromkeys(splittable[:test_count].tolist(), "test")
    held_out.update(dict.fromkeys(splittable[test_count : test_count + validation_count].tolist(), "validation"))
    for name, share in (("validation", validation), ("test", test)):
        if share and name not in held_out.values():
            counted = f"none of {len(names)} products. {len(splittable)} products have two images"
            need = "as a query and its gallery need. Raise it or add images."
            raise UserError(f"{name}: {share} selects {counted}, {need}")
    splits = np.array([held_out.get(name, "train") for name in names], dtype=object)[codes]
    roles = table["role"].to_numpy().copy()
    is_query = _rank_in_product(table, codes, splits != "train") * 2 >= counts[codes]
    has_role = (splits == "train") | (roles != "train")
    roles[~has_role] = np.where(is_query, "query", "gallery")[~has_role]
    columns = {"split": pa.array(splits, pa.string()), "role": pa.array(roles, pa.string())}
    return pa.table({name: columns.get(name, table[name]) for name in SCHEMA.names}, schema=SCHEMA)


def check_leaks(train: Catalog, evaluation: Catalog, allow: bool = False) -> dict[str, Any]:
    """Check that no training image or product is also scored.

    Returns leaks by ``products`` and ``images``: their ``count`` and the ``first`` three names; empty without a leak.

    Raises:
        UserError: There is a leak and ``allow`` is false; the message has its count and the first three names.
    """
    leaks: dict[str, Any] = {}
    for column, key, label in (("product", "products", "products"), ("sha256", "images", "images (same bytes)")):
        trained = train.table[column].combine_chunks()
        scored = evaluation.table[column].combine_chunks()
        shared = sorted(trained.filter(pc.is_in(trained, scored)).drop_null().unique().to_pylist())
        if not shared:
            continue
        first = shared[:3]
        if column == "sha256":
            rows = pc.index_in(pa.array(first), trained).to_pylist()
            first = [train.table["image"][row].as_py() for row in rows]
        if not allow:
            examples = ", ".join(first)
            fix = "Rerun `vpr catalog` with --validation and --test, or correct the splits in its table."
            raise UserError(f"leak: {len(shared)} {label} are trained and scored: {examples}. {fix}")
        leaks[key] = {"count": len(shared), "first": first}
    return leaks


def find_leaks(catalog: Catalog, allow: bool) -> dict[str, Any]:
    """Find images and products that two splits of a catalogue share; raise unless ``allow``."""
    parts = {split: catalog.select(split=split) for split in SPLITS}
    leaks = {}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        leak = check_leaks(parts[first], parts[second], allow)
        if leak:
            leaks[f"{first} in {second}"] = leak
            counts = (f"{value['count']} {key} ({', '.join(value['first'])})" for key, value in leak.items())
            shared = " and ".join(counts)
            log.warning(f"leak allowed: {first} and {second} share {shared}. The card records it.")
    return leaks


def _rank_in_product(table: pa.Table, codes: NDArray[np.int64], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the (n,) rank of each row in its product, by path and box; 0 outside of ``mask``."""
    rows = np.flatnonzero(mask)
    selected = table.take(rows)
    boxes = [str(box) for box in selected["box"].to_pylist()]
    keys = list(zip(codes[rows].tolist(), selected["image"].to_pylist(), boxes, strict=True))
    order = np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.int64)
    _, first, counts = np.unique(codes[rows][order], return_index=True, return_counts=True)
    ranks = np.zeros(len(table), dtype=np.int64)
    ranks[rows[order]] = np.arange(len(rows)) - np.repeat(first, counts)
    return ranks
