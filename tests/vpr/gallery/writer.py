"""Process that changes a gallery until it is killed; it announces each change before and after it."""

from __future__ import annotations

import logging
import sys
from itertools import count
from pathlib import Path

import numpy as np

from tests.vpr.gallery.shop import name_images, unit_vectors, write_shop
from vpr.gallery.change import compact_gallery, remove_images, update_images
from vpr.gallery.config import CompactConfig, RemoveConfig, UpdateConfig

DELIVERIES = 6
_PRODUCTS = 4  # of a delivery
_IMAGES = 3
Contents = dict[tuple[str, str], bytes]


def write_deliveries(folder: Path) -> list[Contents]:
    """Write embeddings to add or to replace, and return their contents; neighbours share half of their products."""
    deliveries = []
    for number in range(DELIVERIES):
        ids = name_images(_PRODUCTS * _IMAGES, _IMAGES, first=number * _PRODUCTS // 2)
        vectors = unit_vectors(len(ids), seed=number)
        write_shop(folder / f"delivery-{number}", ids, vectors)
        deliveries.append({key: vector.tobytes() for key, vector in zip(ids, vectors, strict=True)})
    return deliveries


def choose(number: int) -> tuple[str, str]:
    """Return the change of this number: its kind, and the delivery or the product."""
    rng = np.random.default_rng(number)
    kind = rng.choice(["update", "remove", "compact"], p=[0.5, 0.3, 0.2])
    places = {"update": DELIVERIES, "remove": (DELIVERIES + 1) * _PRODUCTS // 2, "compact": 1}
    return str(kind), str(rng.integers(places[kind]))


def expect(contents: Contents, number: int, deliveries: list[Contents]) -> Contents:
    """Return the contents after a change, as a plain dictionary computes them."""
    kind, place = choose(number)
    if kind == "update":
        return {**contents, **deliveries[int(place)]}
    if kind == "remove":
        return {key: vector for key, vector in contents.items() if key[0] != f"p{place}"}
    return contents


def change(folder: Path, number: int) -> None:
    """Make a change by the commands."""
    gallery = str(folder / "gallery")
    kind, place = choose(number)
    if kind == "update":
        update_images(UpdateConfig(gallery, str(folder / f"delivery-{place}")))
    elif kind == "remove":
        remove_images(RemoveConfig(gallery, products=(f"p{place}",), skip_missing=True))
    else:
        compact_gallery(CompactConfig(gallery))


if __name__ == "__main__":
    logging.disable()
    for number in count(int(sys.argv[2])):
        print(f"begin {number}", flush=True)
        change(Path(sys.argv[1]), number)
        print(f"end {number}", flush=True)
