"""Readers of product data sets: each gives catalogue rows, by column name, never by position."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vpr.common.errors import UserError
from vpr.data.webdataset import read_label, read_samples

Row = dict[str, Any]
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
UNKNOWN_SUFFIX, LINKED = "unknown suffix", "a link to a folder, which is not followed"
UNLABELLED = "unlabelled"  # source of images without labels
_MAX_FIELD = 1 << 20
_MAX_RECORD = 4 << 20  # letters of a row of a CSV, on however many lines
_MAX_COLUMNS = 1000


def read_products10k(root: Path) -> Iterator[Row]:
    """Products-10K: ``train.csv`` (name, class, group) and ``test_kaggletest.csv`` (name, class, Usage).

    Either table may be alone. Both hold the same 9,691 classes; all rows are training rows.
    """
    tables = [(root / "train.csv", "train"), (root / "test_kaggletest.csv", "test")]
    found = [(table, folder) for table, folder in tables if table.is_file()]
    if not found:
        raise UserError(f"{root}: neither train.csv nor test_kaggletest.csv is there: give the Products-10K folder")
    below = PathGuard(root)
    for table, folder in found:
        for line, values in _read_csv(table, ("name", "class")):
            image = below.check(f"{folder}/{values['name']}", table, line)
            yield _row(image, f"products10k/{values['class']}", values.get("group") or "", "products10k")


def read_aicrowd(root: Path) -> Iterator[Row]:
    """AIcrowd Visual Product Recognition 2023, development set.

    ``gallery.csv`` (img_path, product_id) and ``queries.csv`` (the same and bbox_x, bbox_y, bbox_w, bbox_h).
    """
    boxes = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
    below = PathGuard(root)
    for name, role, columns in (("gallery.csv", "gallery", ()), ("queries.csv", "query", boxes)):
        table = root / name
        for line, values in _read_csv(table, ("img_path", "product_id", *columns)):
            image = below.check(values["img_path"], table, line)
            row = _row(image, f"aicrowd/{values['product_id']}", "", "aicrowd", role)
            yield {**row, "box": _box([values[c] for c in columns], f"{table}: line {line}") if columns else None}


def read_csv(table: Path) -> Iterator[Row]:
    """A CSV with columns ``image`` and ``product``, and optionally ``category``, ``role``, ``split``, ``box_x/y/w/h``.

    Paths are relative to the folder of the CSV.
    """
    boxes = ("box_x", "box_y", "box_w", "box_h")
    below = PathGuard(table.parent)
    for line, values in _read_csv(table, ("image", "product")):
        image = below.check(values["image"], table, line)
        row = _row(image, values["product"], values.get("category") or "", "csv", values.get("role") or "train")
        given = [values.get(name) or "" for name in boxes]
        box = _box(given, f"{table}: line {line}") if any(given) else None
        yield {**row, "box": box, "split": values.get("split") or "train"}


def read_folder(root: Path) -> Iterator[Row]:
    """A folder per product, images anywhere below it; files that are no images by name are passed over."""
    below = PathGuard(root)
    for name in _files(root):
        if _is_image(name):
            _check_name(root, name)
            product, _, rest = name.partition("/")
            if not rest:
                raise UserError(f"{root / name}: lies in no product's folder: move it to {root}/PRODUCT/{name}")
            yield _row(below.check(name), product, "", "folder")


def read_images(root: Path) -> Iterator[Row]:
    """Images without labels, anywhere below a folder: each is taken for a product of its own."""
    below = PathGuard(root)
    for name in _files(root):
        if _is_image(name):
            _check_name(root, name)
            yield _row(below.check(name), f"unlabelled/{name}", "", UNLABELLED)


def read_webdataset(root: Path) -> Iterator[Row]:
    """WebDataset shards, ``*.tar`` anywhere below a folder: each image of a sample is a row, read where it lies.

    A sample's ``.json`` holds ``product`` and, where wanted, ``category``, ``role``, ``split`` and ``box`` ([x, y, w,
    h]); or its ``.cls`` is the product. Shards without any label are read as images without labels. Rows with
    ``refused`` are members that are no images of use, with the reason.
    """
    below = PathGuard(root)
    shards = [name for name in _files(root) if name.lower().endswith((".tar", ".tar.gz", ".tgz"))]
    labelled: bool | None = None
    for shard in shards:
        _check_name(root, shard)
        if not below.check(shard).endswith(".tar"):
            raise UserError(f"{root / shard}: images are read at their place in plain .tar shards: gunzip it")
        for sample in read_samples(root / shard, SUFFIXES):
            yield from ({"image": f"{shard}/{name}", "refused": reason} for name, reason in sample.refused)
            if not sample.images:
                continue
            where = f"{root / shard}: sample '{sample.key}'"
            label = read_label(sample, where)
            if labelled not in (None, "product" in label):
                raise UserError(f"{where} has no product, or it alone has one: label all samples or none")
            labelled = "product" in label
            if "box" in label:
                label["box"] = _box(label["box"], where)
            for member in sample.images:
                image = shard + member
                row = _row(image, f"{UNLABELLED}/{image}", "", "webdataset" if labelled else UNLABELLED)
                yield {**row, **label}


def skipped_files(root: Path, output: Path) -> list[tuple[str, str]]:
    """What the readers of folders leave out, with the reason; no files of the catalogue itself, where it lies below."""
    own = output.resolve()
    skip = f"{own.relative_to(root.resolve()).as_posix()}/" if own.is_relative_to(root.resolve()) else None
    files, links = _files_and_links(root)
    over = [(name, UNKNOWN_SUFFIX) for name in files if not _is_image(name)] + [(name, LINKED) for name in links]
    return [(name, reason) for name, reason in over if not (skip and name.startswith(skip))]


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "products10k": read_products10k,
    "aicrowd": read_aicrowd,
    "csv": read_csv,
    "folder": read_folder,
    "images": read_images,
    "webdataset": read_webdataset,
}


def _check_name(root: Path, name: str) -> None:
    if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise UserError(f"{root}/{ascii(name)}: its name is not UTF-8: rename it")


def _row(image: str, product: str, category: str, source: str, role: str = "train") -> Row:
    return {
        "image": image,
        "product": product,
        "category": category,
        "role": role,
        "split": "train",
        "box": None,
        "source": source,
    }


def _read_csv(table: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV with their line number; refuses a missing column, a short row and broken text."""
    if not table.is_file():
        raise UserError(f"{table}: no such file: check the path")
    csv.field_size_limit(_MAX_FIELD)
    with table.open(newline="", encoding="utf-8-sig") as stream:
        lines = BoundedLines(stream)
        reader = csv.DictReader(lines, strict=True)
        try:
            if len(reader.fieldnames or []) > _MAX_COLUMNS:
                raise UserError(f"{table}: more than {_MAX_COLUMNS} columns: leave out those that are not needed")
            missing = [name for name in required if name not in (reader.fieldnames or [])]
            if missing:
                needs = ", ".join(required)
                raise UserError(f"{table}: column '{missing[0]}' is missing: it needs {needs}")
            for values in reader:
                absent = [name for name in required if not values[name]]
                if absent:
                    raise UserError(f"{table}: line {reader.line_num}: no value for '{absent[0]}': complete the row")
                if None in values:
                    raise UserError(
                        f"{table}: line {reader.line_num}: more cells than columns: quote those with commas"
                    )
                if any("\0" in value for value in values.values() if value):  # NumPy drops those that end a text
                    raise UserError(f"{table}: line {reader.line_num}: a zero byte: write it as CSV in UTF-8")
                broken = [name for name in required if "\n" in values[name] or "\r" in values[name]]
                if broken:  # a stray quote swallows the rows below it
                    reason = f"'{broken[0]}' has a line break: look for a stray quote above"
                    raise UserError(f"{table}: line {reader.line_num}: {reason}")
                yield reader.line_num, values
                lines.letters = 0
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{table}: line {reader.line_num + 1}: {error}: write it as CSV in UTF-8") from None


class BoundedLines:
    """The lines of a CSV, of which no row may be without end.

    Args:
        stream: the table, with its line ends as they are.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.letters = 0  # of the row so far; set to 0 where a row has ended

    def __iter__(self) -> BoundedLines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(_MAX_RECORD + 1)
        if not line:
            raise StopIteration
        self.letters += 0 if line.isspace() else len(line)
        if self.letters > _MAX_RECORD:
            raise csv.Error(f"a row of more than {_MAX_RECORD} letters")
        return line


def _files(root: Path) -> list[str]:
    """Names of all files below a folder, in the order of their parts."""
    return _files_and_links(root)[0]


def _files_and_links(root: Path) -> tuple[list[str], list[str]]:
    """The same, and those of links to folders, which are not followed."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder: check --root")
    found: tuple[list[tuple[str, ...]], list[tuple[str, ...]]] = ([], [])
    for folder, folders, files in os.walk(root, onerror=_raise):
        parts = PurePosixPath(folder).relative_to(root).parts
        links = [name for name in folders if os.path.islink(f"{folder}/{name}")]
        for names, several in zip((files, links), found, strict=True):
            several += [(*parts, name) for name in names]
    files, links = (["/".join(parts) for parts in sorted(several)] for several in found)
    return files, links


def _raise(error: OSError) -> None:
    raise error  # a folder that cannot be listed must not vanish


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


class PathGuard:
    """Refuses file names that lead out of a folder, links followed; each folder is resolved once.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._resolved = root.resolve()
        self._folders: dict[str, bool] = {}

    def check(self, name: str, table: Path | None = None, line: int = 0) -> str:
        """``name`` if it is relative and the file stays below the root; ``table`` and ``line`` are named if not."""
        folder, _, file = name.rpartition("/")
        if name.startswith("/") or "\0" in name or "\n" in name:
            inside = False
        elif file in ("", ".", "..") or os.path.islink(f"{self.root}/{name}"):
            inside = self._stays(name)
        else:
            if folder not in self._folders:
                self._folders[folder] = self._stays(folder)
            inside = self._folders[folder]
        if not inside:
            where = f"{table}: line {line}: " if table else ""
            raise UserError(f"{where}'{name}' leads out of {self.root}: use paths below it")
        return name

    def _stays(self, name: str) -> bool:
        try:
            return (self.root / name).resolve().is_relative_to(self._resolved)
        except (OSError, RuntimeError):  # links that go round in circles, a name too long for the file system
            return False


def _box(values: list[Any], where: str) -> dict[str, float]:
    try:
        x, y, w, h = (float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError(f"{where}: box {values} is not four numbers: mend the row") from None
    if not (w > 0 and h > 0 and all(math.isfinite(v) and abs(v) < 1e6 for v in (x, y, w, h))):
        raise UserError(f"{where}: box {values} has no area or is out of range: mend the row")
    return {"x": x, "y": y, "w": w, "h": h}
