"""Joining catalogues, and the images that they repeat: same bytes, and near-same by a perceptual hash."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from vpr.common.hardware import available_cpus
from vpr.data.catalog import SCHEMA, Catalog
from vpr.imaging.decode import decode

NEAR_BITS = 4  # of 64: largest difference between the hashes of near-same images
_CHECK_SIZE = 64  # pixels; far above the 9 x 8 that the hash looks at
_BLOCK = 1 << 17  # comparisons of hashes at a time: a megabyte, which stays in the cache
_BITS = 64


@dataclass(frozen=True)
class Duplicates:
    """Images that a joined catalogue holds more than once, as pairs of files (later one, earlier one).

    Attributes:
        same_bytes: the two have the same checksum; both names are equal where two catalogues list one file.
        near_same: their :func:`image_hash` differs in few bits; each image is paired with its nearest earlier one.
    """

    same_bytes: list[tuple[str, str]]
    near_same: list[tuple[str, str]]


def merge(catalogs: list[Catalog]) -> tuple[Catalog, Duplicates]:
    """Join catalogues and look for images that they repeat.

    Rows that say the same of the same file (product and box too) become one; every other row stays,
    and the report says which repeat each other. Products of the same id become one product.
    Near-same pairs are candidates for a person to look at: small objects on a plain ground hash alike.

    Args:
        catalogs: at least one; every distinct image is decoded once.

    Returns:
        the joined catalogue, whose root is the folder that holds all of theirs, and the duplicates.
    """
    roots = [catalog.root.resolve() for catalog in catalogs]
    root = common_root(roots)
    seen: set[tuple[str, str, str]] = set()
    by_bytes: dict[str, str] = {}
    same: list[tuple[str, str]] = []
    tables = []
    for catalog, folder in zip(catalogs, roots, strict=True):
        table = _table_from(root, catalog, folder)
        names, products, checksums = (table[name].to_pylist() for name in ("image", "product", "sha256"))
        boxes = [str(box) for box in table["box"].to_pylist()]
        kept = []
        for row, (image, product, box, sha256) in enumerate(zip(names, products, boxes, checksums, strict=True)):
            first = by_bytes.setdefault(sha256, image)
            key = (image, product, box)
            if first != image or key in seen:
                same.append((image, first))
            if key not in seen:
                seen.add(key)
                kept.append(row)
        tables.append(table.take(pa.array(kept, pa.int64())))
    joined = Catalog(pa.concat_tables(tables).combine_chunks(), root)
    images = list(by_bytes.values())
    pairs = near_pairs(_hashes([root / image for image in images]), NEAR_BITS)
    return joined, Duplicates(same, [(images[later], images[earlier]) for later, earlier in pairs.tolist()])


def concatenate(catalogs: list[Catalog]) -> Catalog:
    """The rows of several catalogues as one, whose root is the folder that holds all of theirs."""
    roots = [catalog.root.resolve() for catalog in catalogs]
    root = common_root(roots)
    tables = [_table_from(root, catalog, folder) for catalog, folder in zip(catalogs, roots, strict=True)]
    return Catalog(pa.concat_tables(tables).combine_chunks(), root)


def duplicates_of(catalog: Catalog, others: Catalog) -> NDArray[np.bool_]:
    """(n,) bool, which images of a catalogue are, or nearly are, some image of another one.

    Args:
        catalog: n images.
        others: the images that they are compared with.
    """
    same = np.isin(np.array(catalog.table["sha256"].to_pylist()), others.table["sha256"].to_pylist())
    mine, theirs = (_hashes([one.path(row) for row in range(len(one))]) for one in (catalog, others))
    for start in range(0, len(mine), step := max(1, _BLOCK // max(1, len(theirs)))):
        block = slice(start, start + step)
        distances = np.bitwise_count(mine[block, None] ^ theirs[None])
        same[block] |= (distances <= NEAR_BITS).any(axis=1)
    return same


def common_root(folders: list[Path]) -> Path:
    """The folder that holds all of these, links followed."""
    return Path(os.path.commonpath([folder.resolve() for folder in folders]))


def image_hash(image: Image.Image) -> int:
    """64-bit difference hash: is each of 8 x 8 places darker than its right neighbour (N. Krawetz, "dHash", 2013)."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def near_pairs(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """For each hash the nearest earlier one, if it differs in at most ``bits``; the earliest of equally near ones.

    Multi-index hashing (Norouzi, Punjani & Fleet, "Fast Search in Hamming Space with Multi-Index Hashing",
    CVPR 2012): of ``bits + 1`` bands of bits, two hashes within ``bits`` agree on one at least, so that only
    hashes that share a band are compared. Equal hashes are compared once, and blocks bound the memory.

    Args:
        hashes: (n,) uint64.
        bits: largest Hamming distance.

    Returns:
        (pairs, 2) int64, rows of (later, earlier).
    """
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    distinct = np.sort(first)  # the place of each value's first occurrence
    nearest = _nearest_distinct(hashes[distinct], bits)
    earlier = first[inverse]
    earlier[distinct] = np.where(nearest < 0, -1, distinct[nearest])
    later = np.flatnonzero(earlier >= 0)
    return np.stack([later, earlier[later]], axis=1)


def _nearest_distinct(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """(n,) the nearest earlier one of hashes that all differ, -1 where none is within ``bits``."""
    count = len(hashes)
    # Distance and place in one number, so that the smallest is the nearest and of those the earliest.
    best = np.full(count, (bits + 1) * count, dtype=np.int64)
    for mask in _bands(hashes, bits + 1):
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        starts, stops = np.append(0, edges), np.append(edges, count)
        shared = stops - starts > 1
        for start, stop in zip(starts[shared].tolist(), stops[shared].tolist(), strict=True):
            rows = order[start:stop]
            distance, place = _nearest_earlier(hashes[rows])
            best[rows[1:]] = np.minimum(best[rows[1:]], distance * count + rows[place])
    found = best < (bits + 1) * count
    return np.where(found, best % max(1, count), -1)


def _bands(hashes: NDArray[np.uint64], count: int) -> list[np.uint64]:
    """Masks that deal the 64 bits to bands, the most even ones first: a bit that rarely differs tells little apart."""
    ones = np.array([np.count_nonzero(hashes & np.uint64(1 << bit)) for bit in range(_BITS)])
    order = np.argsort(np.abs(2 * ones - len(hashes)), kind="stable").tolist()
    return [np.uint64(sum(1 << bit for bit in order[band::count])) for band in range(count)]


def _nearest_earlier(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distance to, and place of, the nearest earlier hash, of each but the first: two times (n - 1,) int64."""
    distances, places = [], []
    start = 1
    while start < len(hashes):
        stop = min(len(hashes), start + max(1, _BLOCK // len(hashes)))
        later = np.arange(start, stop)
        distance = np.bitwise_count(hashes[start:stop, None] ^ hashes[None, : stop - 1])
        distance[np.arange(stop - 1)[None, :] >= later[:, None]] = 255
        nearest = distance.argmin(axis=1)
        distances.append(distance[later - start, nearest].astype(np.int64))
        places.append(nearest)
        start = stop
    return np.concatenate(distances), np.concatenate(places)


def _table_from(root: Path, catalog: Catalog, folder: Path) -> pa.Table:
    """A catalogue's table with the images' names from a root above ``folder``, its own."""
    prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    names = catalog.table["image"].to_pylist()
    odd = ("./", "//")  # spellings of a path that would hide that two rows are of one file
    names = [prefix + (PurePosixPath(n).as_posix() if any(part in n for part in odd) else n) for n in names]
    place, field = SCHEMA.get_field_index("image"), SCHEMA.field("image")
    return catalog.table.set_column(place, field, pa.array(names, pa.string()))


def _hashes(paths: list[Path]) -> NDArray[np.uint64]:
    with ThreadPoolExecutor(len(available_cpus())) as pool:
        hashes = pool.map(lambda path: image_hash(decode(path, shortest=_CHECK_SIZE)), paths)
        return np.fromiter(hashes, dtype=np.uint64, count=len(paths))
