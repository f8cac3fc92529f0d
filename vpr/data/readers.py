"""Readers of product data sets, which yield catalogue rows. Columns are found by name, never by position."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vpr.common.errors import UserError
from vpr.data.csv_table import read_csv_rows
from vpr.data.hidden_labels import has_hidden_labels
from vpr.data.webdataset import read_label, read_samples

Row = dict[str, Any]
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
ROLES = ("train", "gallery", "query")
SPLITS = ("train", "validation", "test")
UNKNOWN_SUFFIX, FOLDER_LINK = "unknown suffix", "a link to a folder, which is not followed"
UNLABELLED = "unlabelled"  # source of images without labels
_MAX_COORDINATE = 1e6


def read_products10k(root: Path) -> Iterator[Row]:
    """Read Products-10K: ``train.csv`` (name, class, group) and ``test_kaggletest.csv`` (name, class, Usage).

    One of the tables is enough. Both have the same 9,691 classes, and all rows are training rows.
    """
    tables = [(root / "train.csv", "train"), (root / "test_kaggletest.csv", "test")]
    tables = [(table, folder) for table, folder in tables if table.is_file()]
    if not tables:
        raise UserError(f"{root}: it has neither train.csv nor test_kaggletest.csv. Give the Products-10K folder.")
    guard = PathGuard(root)
    for table, folder in tables:
        for line, values in read_csv_rows(table, ("name", "class")):
            image = guard.check(f"{folder}/{values['name']}", table, line)
            yield _row(image, f"products10k/{values['class']}", values.get("group") or "", "products10k")


def read_aicrowd(root: Path) -> Iterator[Row]:
    """Read the development set of AIcrowd Visual Product Recognition 2023, or a hidden test set.

    ``gallery.csv`` has the columns img_path and product_id; ``queries.csv`` also bbox_x, bbox_y, bbox_w and bbox_h.
    Neither table of a hidden test set has a product_id. Its images are unlabelled.
    """
    box_columns = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
    guard = PathGuard(root)
    labels = () if has_hidden_labels([root / "gallery.csv", root / "queries.csv"], "product_id") else ("product_id",)
    for name, role, columns in (("gallery.csv", "gallery", ()), ("queries.csv", "query", box_columns)):
        table = root / name
        for line, values in read_csv_rows(table, ("img_path", *labels, *columns)):
            image = guard.check(values["img_path"], table, line)
            product = f"aicrowd/{values['product_id']}" if labels else f"{UNLABELLED}/{image}"
            row = _row(image, product, "", "aicrowd" if labels else UNLABELLED, role)
            yield {**row, "box": _parse_box([values[c] for c in columns], f"{table}: line {line}") if columns else None}


def read_csv(table: Path) -> Iterator[Row]:
    """Read a CSV with the columns of :class:`vpr.data.config.CatalogConfig`; paths are relative to its folder."""
    box_columns = ("box_x", "box_y", "box_w", "box_h")
    guard = PathGuard(table.parent)
    for line, values in read_csv_rows(table, ("image", "product")):
        image = guard.check(values["image"], table, line)
        row = _row(image, values["product"], values.get("category") or "", "csv", values.get("role") or "train")
        box_values = [values.get(name) or "" for name in box_columns]
        box = _parse_box(box_values, f"{table}: line {line}") if any(box_values) else None
        row |= {"box": box, "split": values.get("split") or "train"}
        for column, known in (("role", ROLES), ("split", SPLITS)):
            if row[column] not in known:  # checked here too: the line is known, and no image has been decoded
                problem = f"{column} '{row[column]}' is not known. Use {', '.join(known)}."
                raise UserError(f"{table}: line {line}: {problem}")
        yield row


def read_folder(root: Path) -> Iterator[Row]:
    """Read one folder per product, with images at any depth; files without an image suffix are skipped."""
    guard = PathGuard(root)
    for name in _image_files(root):
        product, _, rest = name.partition("/")
        if not rest:
            raise UserError(f"{root / name}: it is in no product's folder. Move it to {root}/PRODUCT/{name}.")
        yield _row(guard.check(name), product, "", "folder")


def read_images(root: Path) -> Iterator[Row]:
    """Read images without labels at any depth of a folder; each image becomes a separate product."""
    guard = PathGuard(root)
    for name in _image_files(root):
        yield _row(guard.check(name), f"{UNLABELLED}/{name}", "", UNLABELLED)


def read_webdataset(root: Path) -> Iterator[Row]:
    """Read the images of WebDataset shards, ``*.tar`` at any depth of a folder, without unpacking them.

    A sample's ``.json`` has ``product`` and optionally ``category``, ``role``, ``split`` and ``box`` ([x, y, w, h]).
    Alternatively its ``.cls`` is the product. Shards without labels are read like images without labels.
    Rows with ``rejected`` are members that cannot be used, with the reason.
    """
    guard = PathGuard(root)
    shards = [name for name in _list_files(root) if name.lower().endswith((".tar", ".tar.gz", ".tgz"))]
    is_labelled: bool | None = None
    for shard in shards:
        _check_utf8(root, shard)
        if not guard.check(shard).endswith(".tar"):
            raise UserError(f"{root / shard}: images are only read from uncompressed .tar shards. Run gunzip on it.")
        for sample in read_samples(root / shard, SUFFIXES):
            yield from ({"image": f"{shard}/{name}", "rejected": reason} for name, reason in sample.rejected)
            if not sample.images:
                continue
            where = f"{root / shard}: sample '{sample.key}'"
            label = read_label(sample, where)
            if is_labelled not in (None, "product" in label):
                raise UserError(f"{where} has no product, or is the only one that has. Label all samples or none.")
            is_labelled = "product" in label
            if "box" in label:
                label["box"] = _parse_box(label["box"], where)
            for member in sample.images:
                image = shard + member
                row = _row(image, f"{UNLABELLED}/{image}", "", "webdataset" if is_labelled else UNLABELLED)
                yield {**row, **label}


def skipped_files(root: Path, output: Path) -> list[tuple[str, str]]:
    """List files and links that the readers of folders skip, with the reason; files of ``output`` are left out."""
    output = output.resolve()
    prefix = f"{output.relative_to(root.resolve()).as_posix()}/" if output.is_relative_to(root.resolve()) else None
    files, links = _walk(root)
    skipped = [(name, UNKNOWN_SUFFIX) for name in files if not _is_image(name)]
    skipped += [(name, FOLDER_LINK) for name in links]
    return [(name, reason) for name, reason in skipped if not (prefix and name.startswith(prefix))]


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "products10k": read_products10k,
    "aicrowd": read_aicrowd,
    "csv": read_csv,
    "folder": read_folder,
    "images": read_images,
    "webdataset": read_webdataset,
}


class PathGuard:
    """Check that file names stay inside a folder, with links followed; each folder is resolved once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._resolved = root.resolve()
        self._folders: dict[str, bool] = {}

    def check(self, name: str, table: Path | None = None, line: int = 0) -> str:
        """Return a name inside the root; else raise :class:`UserError`, with ``table`` and ``line`` if given."""
        folder, _, file = name.rpartition("/")
        if name.startswith("/") or "\0" in name or "\n" in name:
            is_inside = False
        elif file in ("", ".", "..") or os.path.islink(f"{self.root}/{name}"):
            is_inside = self._is_inside(name)
        else:
            if folder not in self._folders:
                self._folders[folder] = self._is_inside(folder)
            is_inside = self._folders[folder]
        if not is_inside:
            where = f"{table}: line {line}: " if table else ""
            fix = f"Put {table.name} into a folder that contains all images" if table else "Copy the file into it"
            raise UserError(f"{where}'{name}' leads out of {self.root}. {fix}, and use relative paths.")
        return name

    def _is_inside(self, name: str) -> bool:
        try:
            return (self.root / name).resolve().is_relative_to(self._resolved)
        except (OSError, RuntimeError):  # circular links, or a name that is too long for the file system
            return False


def _row(image: str, product: str, category: str, source: str, role: str = "train") -> Row:
    row = {"image": image, "product": product, "category": category, "role": role, "source": source}
    return {**row, "split": "train", "box": None}


def _parse_box(values: list[Any], where: str) -> dict[str, float]:
    try:
        x, y, w, h = (float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError(f"{where}: box {values} is not four numbers. Correct the row.") from None
    if not (w > 0 and h > 0 and all(math.isfinite(v) and abs(v) < _MAX_COORDINATE for v in (x, y, w, h))):
        raise UserError(f"{where}: box {values} has no area or is out of range. Correct the row.")
    return {"x": x, "y": y, "w": w, "h": h}


def _image_files(root: Path) -> Iterator[str]:
    for name in _list_files(root):
        if _is_image(name):
            _check_utf8(root, name)
            yield name


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _check_utf8(root: Path, name: str) -> None:
    if not name.isprintable() and any("\ud800" <= character <= "\udfff" for character in name):
        raise UserError(f"{root}/{ascii(name)}: its name is not UTF-8. Rename it.")


def _list_files(root: Path) -> list[str]:
    """List all files of a folder at any depth, sorted by the parts of their paths."""
    return _walk(root)[0]


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """List all files, and all links to folders, which are not followed."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Check --root.")
    files: list[tuple[str, ...]] = []
    links: list[tuple[str, ...]] = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        parts = PurePosixPath(folder).relative_to(root).parts
        files += [(*parts, name) for name in names]
        links += [(*parts, name) for name in subfolders if os.path.islink(f"{folder}/{name}")]
    return ["/".join(parts) for parts in sorted(files)], ["/".join(parts) for parts in sorted(links)]


def _raise(error: OSError) -> None:
    raise error  # the files of an unreadable folder must not be missing silently
