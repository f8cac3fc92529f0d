"""Join catalogues, and find repeated images: same bytes, or near-duplicates by a perceptual hash."""

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

NEAR_BITS = 4  # of 64; largest Hamming distance between the hashes of near-duplicates
_DECODE_SIZE = 64  # pixels, far above the 9 x 8 of the hash
_REDUCED = 32  # pixels of the shorter side before the hash resizes: four per cell
_BLOCK = 1 << 17  # comparisons at a time: one megabyte, which fits the cache
_HASH_BITS = 64


@dataclass(frozen=True)
class Duplicates:
    """Repeated images of a joined catalogue, as pairs of files (later, earlier).

    Attributes:
        same_bytes: Pairs with the same checksum; both names are equal if two catalogues list one file.
        near_same: Pairs whose :func:`image_hash` differs in few bits: each image and its nearest earlier image.
    """

    same_bytes: list[tuple[str, str]]
    near_same: list[tuple[str, str]]


def merge(catalogs: list[Catalog]) -> tuple[Catalog, Duplicates]:
    """Join catalogues under their common root, and find repeated images; every distinct image is decoded once.

    Rows with the same file, product, box, role and split become one row; all other rows stay, such as a query that is
    in the gallery too. Products with the same id become one product. Near-duplicates need a manual check: small objects
    on a plain background have similar hashes.
    """
    roots = [catalog.root.resolve() for catalog in catalogs]
    root = common_root(roots)
    seen: set[tuple[str, ...]] = set()
    by_bytes: dict[str, str] = {}
    same: list[tuple[str, str]] = []
    tables = []
    for catalog, folder in zip(catalogs, roots, strict=True):
        table = _table_from(root, catalog, folder)
        names = ("image", "sha256", "product", "box", "role", "split")
        columns = [map(str, table[name].to_pylist()) for name in names]
        kept = []
        for row, (image, sha256, *place) in enumerate(zip(*columns, strict=True)):
            first = by_bytes.setdefault(sha256, image)
            key = (image, *place)
            if first != image or key in seen:
                same.append((image, first))
            if key not in seen:
                seen.add(key)
                kept.append(row)
        tables.append(table.take(pa.array(kept, pa.int64())))
    joined = Catalog(pa.concat_tables(tables).combine_chunks(), root)
    images = list(by_bytes.values())
    pairs = find_near_pairs(_hash_files([root / image for image in images]), NEAR_BITS)
    return joined, Duplicates(same, [(images[later], images[earlier]) for later, earlier in pairs.tolist()])


def concatenate(catalogs: list[Catalog]) -> Catalog:
    """Join catalogues without looking for duplicates; the root is their common root."""
    roots = [catalog.root.resolve() for catalog in catalogs]
    root = common_root(roots)
    tables = [_table_from(root, catalog, folder) for catalog, folder in zip(catalogs, roots, strict=True)]
    return Catalog(pa.concat_tables(tables).combine_chunks(), root)


def common_root(folders: list[Path]) -> Path:
    """Return the deepest folder that contains all folders, with links resolved."""
    return Path(os.path.commonpath([folder.resolve() for folder in folders]))


def image_hash(image: Image.Image) -> int:
    """Return the 64-bit difference hash of 8 x 8 left-right comparisons (N. Krawetz, "dHash", 2013)."""
    small = image.reduce(max(1, min(image.size) // _REDUCED))  # much faster than to resize all its pixels
    grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def find_near_pairs(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Find the nearest earlier hash of each (n,) uint64 hash, within ``bits``: (pairs, 2) int64 of (later, earlier).

    Of equally near hashes it is the earliest. Multi-index hashing (Norouzi, Punjani & Fleet, "Fast Search in Hamming
    Space with Multi-Index Hashing", CVPR 2012): two hashes within ``bits`` agree on at least one of ``bits + 1`` bands
    of bits. So only hashes that share a band are compared. Equal hashes are compared once, and blocks limit the memory.
    """
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    distinct = np.sort(first)  # index of each value's first occurrence
    nearest = _nearest_distinct(hashes[distinct], bits)
    earlier = first[inverse]
    earlier[distinct] = np.where(nearest < 0, -1, distinct[nearest])
    later = np.flatnonzero(earlier >= 0)
    return np.stack([later, earlier[later]], axis=1)


def _nearest_distinct(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Return the (n,) index of the nearest earlier hash within ``bits``, or -1; all hashes differ."""
    count = len(hashes)
    # Distance and index in one number: its minimum is the nearest hash, and the earliest of equally near ones.
    best = np.full(count, (bits + 1) * count, dtype=np.int64)
    for mask in _bands(hashes, bits + 1):
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        starts, stops = np.append(0, edges), np.append(edges, count)
        shared = stops - starts > 1
        for start, stop in zip(starts[shared].tolist(), stops[shared].tolist(), strict=True):
            rows = order[start:stop]
            distance, index = _nearest_earlier(hashes[rows])
            best[rows[1:]] = np.minimum(best[rows[1:]], distance * count + rows[index])
    is_near = best < (bits + 1) * count
    return np.where(is_near, best % max(1, count), -1)


def _bands(hashes: NDArray[np.uint64], count: int) -> list[np.uint64]:
    """Return bit masks of the bands; each gets balanced bits first, as unbalanced bits discriminate poorly."""
    ones = np.array([np.count_nonzero(hashes & np.uint64(1 << bit)) for bit in range(_HASH_BITS)])
    order = np.argsort(np.abs(2 * ones - len(hashes)), kind="stable").tolist()
    return [np.uint64(sum(1 << bit for bit in order[band::count])) for band in range(count)]


def _nearest_earlier(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return distance and index of the nearest earlier hash, for all but the first: two (n - 1,) int64."""
    distances, indices = [], []
    start = 1
    while start < len(hashes):
        stop = min(len(hashes), start + max(1, _BLOCK // len(hashes)))
        later = np.arange(start, stop)
        distance = np.bitwise_count(hashes[start:stop, None] ^ hashes[None, : stop - 1])
        distance[np.arange(stop - 1)[None, :] >= later[:, None]] = 255
        nearest = distance.argmin(axis=1)
        distances.append(distance[later - start, nearest].astype(np.int64))
        indices.append(nearest)
        start = stop
    return np.concatenate(distances), np.concatenate(indices)


def _table_from(root: Path, catalog: Catalog, folder: Path) -> pa.Table:
    """Return a catalogue's table with image paths relative to ``root``, a parent of its ``folder``."""
    prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    names = catalog.table["image"].to_pylist()
    redundant = ("./", "//")  # they would hide that two rows name the same file
    names = [prefix + (PurePosixPath(n).as_posix() if any(part in n for part in redundant) else n) for n in names]
    column, field = SCHEMA.get_field_index("image"), SCHEMA.field("image")
    return catalog.table.set_column(column, field, pa.array(names, pa.string()))


def _hash_files(paths: list[Path]) -> NDArray[np.uint64]:
    with ThreadPoolExecutor(len(available_cpus())) as pool:
        hashes = pool.map(lambda path: image_hash(decode(path, shortest=_DECODE_SIZE)), paths)
        return np.fromiter(hashes, dtype=np.uint64, count=len(paths))
