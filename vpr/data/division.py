"""Division of products into splits. A hash of the product's id decides, so a product keeps its split for good.

No decision depends on other products, on the order of the rows or on the number of images: in a catalogue that grows,
a product that was trained on never becomes a scored one (same seed, same shares).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpr.data.catalog import SCHEMA, Rejected
from vpr.data.config import check_shares
from vpr.data.readers import SPLITS

Codes = NDArray[np.int64]
Mask = NDArray[np.bool_]
UNSET, TRAIN, VALIDATION, TEST = range(4)
_CODES = {"": UNSET, **{name: code for code, name in enumerate(SPLITS, TRAIN)}}
_ROLES = ("query", "gallery")
_MARKED = "a role without a split: other images of its product are trained on"
_DECIMAL = re.compile(r"(?<=\d)\.0+$")
_NAMES = np.array(["", *SPLITS], dtype=object)


@dataclass(frozen=True)
class Shares:
    """Shares of the products to hold out.

    Attributes:
        validation: Share of the products for validation.
        test: Share of the products for test.
        seed: Seed of the hash.
        resplit: Divide all products, also those that have a split or a role of query or gallery already.
    """

    validation: float = 0.0
    test: float = 0.0
    seed: int = 0
    resplit: bool = False

    def __post_init__(self) -> None:
        check_shares(self.validation, self.test, self.seed, self.resplit)

    def items(self) -> list[tuple[str, int, float]]:
        """Return name, code and value of each share above 0."""
        shares = [("validation", VALIDATION, self.validation), ("test", TEST, self.test)]
        return [share for share in shares if share[2]]


@dataclass(frozen=True)
class Division:
    """Table with the split and role of every row, and what is worth a report.

    Attributes:
        table: Table of :data:`vpr.data.catalog.SCHEMA`.
        own: (n,) bool, rows of the table that the data set itself puts into validation or test.
        left_out: Images that are in no split, with the reason.
        notes: Lines about splits that stayed, were drawn or were derived from roles.
        unmet: Error message of each share that selected no product to search for, or of an empty training split.
        drawn: Names of the splits that the shares select.
    """

    table: pa.Table
    own: Mask
    left_out: list[Rejected] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    drawn: tuple[str, ...] = ()

    def find_lost(self, table: pa.Table, example: str) -> list[str]:
        """Return an error message for each drawn split, and for training, that other rows left nothing of.

        Args:
            table: Rows that are left after more of them were set aside.
            example: One that was set aside, with the reason.
        """
        columns = (table[name].to_pylist() for name in ("split", "role", "product"))
        found = set(zip(*columns, strict=True))
        fix = f"Images were set aside ({example}). Correct them, or raise the share."
        messages = []
        for name in self.drawn:
            in_query, in_gallery = ({row[2] for row in found if row[:2] == (name, role)} for role in _ROLES)
            if not in_query & in_gallery:
                messages.append(f"{name}: no product with a query and a gallery image is left. {fix}")
        if self.drawn and not any(split == "train" for split, _, _ in found):
            messages.append(f"validation, test: they leave no product to train on. {fix}")
        return messages


def split_by_product(table: pa.Table, shares: Shares, unusable: Mapping[int, str] | None = None) -> Division:
    """Divide the products of a table that the data set does not hold out itself.

    Validation and test rows of the data set stay what they are, and products of which all rows have a role of query or
    gallery and no split are test products (:func:`_own_splits`). The other products are divided by
    :func:`hashed_splits`; a share of a split that the data set has itself selects nothing. Two kinds of rows are left
    out: images (same bytes) that would be in several splits (:func:`find_overlap`), and rows with a role of query or
    gallery and no split in a product that is trained on. Held-out images without a role get one
    (:func:`_assign_roles`).

    A held-out product with a single image is in the gallery of its split, without a query. It is not trained on, since
    it may gain images later and be searched for.

    Unusable rows are left out too. They count for the split of their product, which must not depend on which of its
    images are copied, and have no role.

    Args:
        table: Table of :data:`vpr.data.catalog.SCHEMA`; the split of a row may be empty.
        shares: Shares, seed, and whether the data set's splits are replaced.
        unusable: Rows that cannot be used, with the reason.
    """
    products, codes = encode(table["product"])
    given = split_codes(table)
    is_marked = (given == UNSET) & (table["role"].to_numpy() != "train") & (not shares.resplit)
    own_splits = np.full(len(table), UNSET) if shares.resplit else _own_splits(given, is_marked, codes)
    is_held_out, is_own = own_splits >= VALIDATION, (own_splits >= VALIDATION) & ~is_marked
    is_free = np.bincount(codes, is_held_out, len(products)) == 0
    taken = {VALIDATION: bool(np.any(own_splits == VALIDATION)), TEST: bool(np.any(is_marked | (own_splits == TEST)))}
    drawn = [share for share in shares.items() if not taken[share[1]]]
    zones = hashed_splits(products, shares)
    is_drawn = is_free & np.isin(zones, [code for _, code, _ in drawn])
    splits = np.where(is_held_out, own_splits, np.where(is_drawn, zones, TRAIN)[codes])

    reasons = dict.fromkeys(np.flatnonzero(is_marked & (splits == TRAIN)).tolist(), _MARKED)
    is_kept = ~np.isin(np.arange(len(table)), list(reasons))
    _, images = encode(image_keys(table))
    # Unusable rows count here too: an earlier version may have trained on their image.
    reasons |= _overlap_reasons(table, images, np.where(is_kept, splits, UNSET), is_own)
    reasons |= dict(unusable or {})
    is_kept = ~np.isin(np.arange(len(table)), list(reasons))
    splits = np.where(is_kept, splits, UNSET)
    roles = _assign_roles(table, codes, splits, shares.seed)
    kept_own = np.where(splits == UNSET, UNSET, own_splits)
    columns = {"split": pa.array(_NAMES[splits], pa.string()), "role": pa.array(roles, pa.string())}
    divided = pa.table({name: columns.get(name, table[name]) for name in SCHEMA.names}, schema=SCHEMA)
    names = table["image"].to_pylist()
    return Division(
        divided.filter(pa.array(is_kept)),
        is_own[is_kept],
        [(names[row], reason) for row, reason in sorted(reasons.items())],
        _notes(shares, is_marked, kept_own, codes, zones, is_free & _present(codes, splits)),
        _unmet(shares, drawn, splits, roles, codes, is_free, images),
        tuple(name for name, _, _ in drawn),
    )


def hashed_splits(products: list[str], shares: Shares) -> Codes:
    """Return the (n,) code of each product's split; it depends on its id, the seed and the shares only.

    The ids ``4`` and ``4.0`` have the same split: as long as all ids are numbers, they are one product.
    ``test`` takes hashes from 0 up and ``validation`` from 1 down. Hence a larger share keeps the products of a smaller
    one, and neither share moves the products of the other.
    """
    hashes = np.array([_hash(f"{shares.seed}:{_DECIMAL.sub('', product)}") for product in products])
    is_validation = (hashes >= 1 - shares.validation) & (shares.validation > 0)
    return np.where(hashes < shares.test, TEST, np.where(is_validation, VALIDATION, TRAIN)).astype(np.int64)


def find_overlap(keys: Codes, splits: Codes, is_own: Mask) -> Mask:
    """Return the (n,) mask of rows to leave out, so that no key (an image or a product) is in two splits.

    A key that the data set itself puts into validation or test stays there, in ``test`` rather than ``validation``.
    Another key stays in no split: a model of an earlier version may have seen it in training.

    Args:
        keys: (n,) code of each row's key.
        splits: (n,) code of each row's split.
        is_own: (n,) whether the data set itself puts the row into validation or test.
    """
    count = int(keys.max(initial=-1)) + 1
    first, last, own = np.full(count, TEST + 1), np.full(count, UNSET), np.full(count, UNSET)
    np.minimum.at(first, keys, splits)
    np.maximum.at(last, keys, splits)
    np.maximum.at(own, keys[is_own], splits[is_own])
    return (first < last)[keys] & (splits != own[keys])


def _own_splits(given: Codes, is_marked: Mask, codes: Codes) -> Codes:
    """Return the (n,) code of the split that the data set itself gives each row.

    A marked row, one with a role of query or gallery and without a split, is in the split that holds out other rows of
    its product. If no row of the product has a split or is unmarked, its rows are in ``test``. Else it has none: a
    product with images to train on must not become a scored one because it gains a query image.

    Args:
        given: (n,) code of the split in the data set.
        is_marked: (n,) whether the row is marked.
        codes: (n,) code of the product.
    """
    count = int(codes.max(initial=-1)) + 1
    has_validation, has_test = (np.bincount(codes, given == code, count) > 0 for code in (VALIDATION, TEST))
    has_training = np.bincount(codes, (given == TRAIN) | ((given == UNSET) & ~is_marked), count) > 0
    other = np.where(has_validation, VALIDATION, np.where(has_training, UNSET, TEST))
    return np.where(is_marked, np.where(has_test, TEST, other)[codes], given)


def _assign_roles(table: pa.Table, codes: Codes, splits: Codes, seed: int) -> NDArray[np.object_]:
    """Return the (n,) roles: held-out rows without a role get one.

    If the product has queries in its split already, its other images are gallery images, and the other way round.
    Else a hash of the image's bytes decides, so that an image keeps its role when others are added. If it gives all
    images of the product the same role, the image at the end of the order changes its role. Copies of an image have
    the same role. An image without a different image next to it is a gallery image.
    """
    roles: NDArray[np.object_] = table["role"].to_numpy().copy()
    is_scored = splits >= VALIDATION
    keys = codes * (TEST + 1) + splits  # a product in its split
    count = int(keys.max(initial=-1)) + 1
    has_query, has_gallery = (np.bincount(keys[is_scored], roles[is_scored] == r, count) > 0 for r in _ROLES)
    rows = np.flatnonzero(is_scored & (roles == "train"))
    hashes = np.array([_hash(f"role:{seed}:{image}") for image in image_keys(table.take(rows))])
    low, high = np.ones(count), np.zeros(count)
    np.minimum.at(low, keys[rows], hashes)
    np.maximum.at(high, keys[rows], hashes)
    low, high = low[keys[rows]], high[keys[rows]]
    is_query = np.where(low >= 0.5, hashes > low, np.where(high < 0.5, (hashes == high) & (low < high), hashes >= 0.5))
    has_query, has_gallery = has_query[keys[rows]], has_gallery[keys[rows]]
    is_query = np.where(has_query, False, np.where(has_gallery, True, is_query))
    roles[rows] = np.where(is_query, "query", "gallery")
    return roles


def _unmet(
    shares: Shares,
    drawn: list[tuple[str, int, float]],
    splits: Codes,
    roles: NDArray[np.object_],
    codes: Codes,
    is_free: Mask,
    images: Codes,
) -> list[str]:
    """Return an error message for each drawn share without a product to search for, and for an empty training split."""
    messages = []
    kept = splits != UNSET
    pairs = np.bincount(np.unique(np.stack([codes[kept], images[kept]]), axis=1)[0], minlength=len(is_free)) > 1
    searchable, free = int(np.sum(pairs & is_free)), int(is_free.sum())
    for name, code, share in drawn:
        in_query, in_gallery = (set(codes[(splits == code) & (roles == role)].tolist()) for role in _ROLES)
        if in_query & in_gallery:
            continue
        problem = f"{share} selects none of {free} products. {searchable} products have two images"
        fix = "Raise it, use another --seed or add images."
        if not free:
            problem = f"{share} selects nothing. The data set holds out every product by a split or a role"
            fix = "Add --resplit to divide all products by the shares."
        else:
            problem += ", as a query and its gallery need"
            fix = fix if searchable else "Add a second image of each product."
        messages.append(f"{name}: {problem}. {fix}")
    if shares.test and "test" not in [name for name, _, _ in drawn] and not np.any(splits == TEST):
        problem = "Images have a role and no split, next to images of their product without a role"
        messages.append(f"test: {shares.test} selects nothing. {problem}. Fill in the splits, or add --resplit.")
    if drawn and not messages and not np.any(splits == TRAIN):
        messages.append("validation, test: they leave no product to train on. Lower them or use another --seed.")
    return messages


def _present(codes: Codes, splits: Codes) -> Mask:
    """Return whether each product has a row in a split."""
    return np.bincount(codes, splits != UNSET, int(codes.max(initial=-1)) + 1) > 0


def _notes(shares: Shares, is_marked: Mask, own: Codes, codes: Codes, zones: Codes, is_free: Mask) -> list[str]:
    notes = []
    if marked := int(np.sum(is_marked & (own == TEST))):
        notes.append(f"roles: {marked} images with a role of query or gallery and no split are test images")
    requested = {name: share for name, _, share in shares.items()}
    for name, code in (("validation", VALIDATION), ("test", TEST)):
        if kept := len(np.unique(codes[own == code])):
            note = f"{name}: {kept} products as in the data set"
            unused = f"; --{name} {requested.get(name)} adds none (--resplit divides all products)"
            notes.append(note + (unused if name in requested else ""))
        elif name in requested and is_free.any():
            reached, count = int(np.sum(is_free & (zones == code))), int(is_free.sum())
            counted = f"{reached} of {count} products ({reached / count:.3g})"
            notes.append(f"{name}: {counted}, requested {requested[name]:g}")
    return notes


def _overlap_reasons(table: pa.Table, images: Codes, splits: Codes, is_own: Mask) -> dict[int, str]:
    """Return the rows to leave out since several splits share their image, with the name of a row in another split."""
    inside = np.flatnonzero(splits != UNSET)
    rows = inside[find_overlap(images[inside], splits[inside], is_own[inside])]
    names = table["image"].to_pylist()
    others: dict[tuple[int, int], int] = {}
    for row in inside[np.isin(images[inside], images[rows])].tolist():
        others.setdefault((int(images[row]), int(splits[row])), row)
    reasons = {}
    for row in rows.tolist():
        code = next(c for c in (TEST, VALIDATION, TRAIN) if c != splits[row] and (int(images[row]), c) in others)
        other = names[others[int(images[row]), code]]
        reasons[row] = f"in several splits: same bytes as {other} of {SPLITS[code - 1]}"
    return reasons


def split_codes(table: pa.Table) -> Codes:
    """Return the (n,) code of each row's split: 0 for none, then in the order of :data:`vpr.data.readers.SPLITS`."""
    return np.array([_CODES[name] for name in table["split"].to_pylist()], dtype=np.int64)


def image_keys(table: pa.Table) -> list[str]:
    """Return what identifies the bytes of each row's image: the checksum, or the name without one."""
    pairs = zip(table["sha256"].to_pylist(), table["image"].to_pylist(), strict=True)
    return [sha256 or image for sha256, image in pairs]


def encode(values: Iterable[str] | pa.ChunkedArray) -> tuple[list[str], Codes]:
    """Return the distinct values, and the (n,) index of each value in them."""
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(values, pa.string())
    encoded = column.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _hash(text: str) -> float:
    """Return a number in [0, 1): the first 53 bits of the text's SHA-256, which a float holds exactly."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 11) / (1 << 53)
