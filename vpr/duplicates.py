"""Joining catalogues, and the pictures that they repeat: same bytes, and near-same by a perceptual hash."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from vpr.catalog import SCHEMA, Catalog
from vpr.images import decode
from vpr.readers import Row

NEAR_BITS = 4
_CHECK_SIZE = 64  # pixels; far above the 9 x 8 that the hash looks at
_BLOCK = 1 << 23  # comparisons of hashes at a time


@dataclass(frozen=True)
class Duplicates:
    """Pictures that a joined catalogue holds more than once, as pairs of files (later one, earlier one).

    Attributes:
        same_bytes: the two have the same checksum; both names are equal where two catalogues list one file.
        near_same: their :func:`picture_hash` differs in few bits; each picture is paired with its nearest earlier one.
    """

    same_bytes: list[tuple[str, str]]
    near_same: list[tuple[str, str]]


def merge(catalogs: list[Catalog], bits: int = NEAR_BITS) -> tuple[Catalog, Duplicates]:
    """Join catalogues and look for pictures that they repeat.

    Rows that say the same of the same file (product and box too) become one; every other row stays,
    and the report says which repeat each other. Products of the same id become one product.
    Near-same pairs are candidates for a person to look at: small objects on a plain ground hash alike.

    Args:
        catalogs: at least one; every distinct picture is decoded once.
        bits: largest difference, of 64, between hashes of near-same pictures.

    Returns:
        the joined catalogue, whose root is the folder that holds all of theirs, and the duplicates.
    """
    roots = [catalog.root.resolve() for catalog in catalogs]
    root = Path(os.path.commonpath(roots))
    kept: dict[str, Row] = {}
    by_bytes: dict[str, str] = {}
    same: list[tuple[str, str]] = []
    for catalog, folder in zip(catalogs, roots, strict=True):
        for row in catalog.table.to_pylist():
            image = (folder / row["image"]).relative_to(root).as_posix()
            first = by_bytes.setdefault(row["sha256"], image)
            key = repr((image, row["product"], row["box"]))
            if first != image or key in kept:
                same.append((image, first))
            kept.setdefault(key, {**row, "image": image})
    joined = Catalog(pa.Table.from_pylist(list(kept.values()), schema=SCHEMA), root)
    images = list(by_bytes.values())
    pairs = near_pairs(_hashes([root / image for image in images]), bits)
    return joined, Duplicates(same, [(images[later], images[earlier]) for later, earlier in pairs.tolist()])


def picture_hash(picture: Image.Image) -> int:
    """64-bit difference hash: is each of 8 x 8 places darker than its right neighbour (N. Krawetz, "dHash", 2013)."""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def near_pairs(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """For each hash the nearest earlier one, if it differs in at most ``bits``.

    Compares all with all in blocks of bounded memory (about 80 MB).

    Args:
        hashes: (n,) uint64.
        bits: largest Hamming distance.

    Returns:
        (pairs, 2) int64, rows of (later, earlier).
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    step = max(1, _BLOCK // max(1, len(hashes)))
    for start in range(0, len(hashes), step):
        later = np.arange(start, min(start + step, len(hashes)))
        distance = np.bitwise_count(hashes[later, None] ^ hashes[None, : later[-1] + 1])
        distance[np.arange(later[-1] + 1)[None, :] >= later[:, None]] = 255
        nearest = distance.argmin(axis=1)
        close = distance[np.arange(len(later)), nearest] <= bits
        found.append(np.stack([later[close], nearest[close]], axis=1))
    return np.concatenate(found)


def _hashes(paths: list[Path]) -> NDArray[np.uint64]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        hashes = pool.map(lambda path: picture_hash(decode(path, shortest=_CHECK_SIZE)), paths)
        return np.fromiter(hashes, dtype=np.uint64, count=len(paths))
