"""Checks that no scored image or product is trained on."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.data.readers import SPLITS

log = get_logger(__name__)

_PAIRS = (("train", "validation"), ("train", "test"), ("validation", "test"))
_FIXES = {
    "products": "Correct the splits of the data set, or rerun `vpr catalog` with --resplit, --validation and --test.",
    "images": "Rerun `vpr catalog`, which leaves such images out.",
}


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
            raise UserError(f"leak: {len(shared)} {label} are trained and scored: {examples}. {_FIXES[key]}")
        leaks[key] = {"count": len(shared), "first": first}
    return leaks


def find_leaks(catalog: Catalog, allow: bool) -> dict[str, Any]:
    """Find images and products that two splits of a catalogue share; raise unless ``allow``."""
    parts = {split: catalog.select(split=split) for split in SPLITS}
    leaks = {}
    for first, second in _PAIRS:
        leak = check_leaks(parts[first], parts[second], allow)
        if leak:
            leaks[f"{first} in {second}"] = leak
            counts = (f"{value['count']} {key} ({', '.join(value['first'])})" for key, value in leak.items())
            shared = " and ".join(counts)
            log.warning(f"leak allowed: {first} and {second} share {shared}. The card records it.")
    return leaks


def warn_of_own_leaks(catalog: Catalog) -> None:
    """Warn of products that the data set itself puts into two splits, which training rejects."""
    for first, second in _PAIRS:
        leak = check_leaks(catalog.select(split=first), catalog.select(split=second), allow=True).get("products")
        if leak:
            shared = f"{leak['count']} products ({', '.join(leak['first'])})"
            log.warning(f"{first} and {second} share {shared}, which training rejects. {_FIXES['products']}")


def warn_of_moves(old: Catalog, new: Catalog) -> None:
    """Warn of products and images that are scored now and that an older version of the catalogue had for training."""
    leaks = check_leaks(old.select(split="train"), new.where(new.table["split"].to_numpy() != "train"), allow=True)
    if leaks:
        moved = " and ".join(f"{leak['count']} {key} ({', '.join(leak['first'])})" for key, leak in leaks.items())
        fix = "Train again before you score models of the old one."
        log.warning(f"the catalogue that is replaced had {moved} for training, which are held out now. {fix}")
