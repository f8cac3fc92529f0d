"""Readers of product data sets, which yield catalogue rows. Columns are found by name, never by position."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.boxes import BOX_COLUMNS, Form, find_box_columns, parse_box, to_xywh
from vpr.data.columns import read_mapping
from vpr.data.config import ReadOptions
from vpr.data.csv_table import MAX_COLUMNS, read_csv_rows
from vpr.data.hidden_labels import has_hidden_labels
from vpr.data.image_files import HIDDEN, PathGuard, check_utf8, image_files, image_suffixes, is_hidden, list_files
from vpr.data.split_folders import SPLIT_NAMES, find_split_folders, place_of
from vpr.data.tables import read_table_rows
from vpr.data.webdataset import read_label, read_samples

log = get_logger(__name__)

Row = dict[str, Any]
Reader = Callable[[Path, ReadOptions], Iterator[Row]]
ROLES = ("train", "gallery", "query")
SPLITS = ("train", "validation", "test")
UNLABELLED = "unlabelled"  # source of images without labels
_DEFAULTS = ReadOptions()
_EMPTY = ("", "nan", "none", "null")  # of a role or split


def read_products10k(root: Path, options: ReadOptions = _DEFAULTS) -> Iterator[Row]:
    """Read Products-10K: ``train.csv`` (name, class, group) and ``test_kaggletest.csv`` (name, class, Usage).

    One of the tables is enough. Both have the same 9,691 classes, and all rows are training rows.
    """
    tables = [(root / "train.csv", "train"), (root / "test_kaggletest.csv", "test")]
    tables = [(table, folder) for table, folder in tables if table.is_file()]
    if not tables:
        raise UserError(f"{root}: it has neither train.csv nor test_kaggletest.csv. Give the Products-10K folder.")
    guard = _guard(root, options)
    for table, folder in tables:
        for line, values in read_csv_rows(table, ("name", "class"), ("group",), ("class",)):
            image = guard.check(f"{folder}/{values['name']}", table, line)
            row = _row(image, f"products10k/{values['class']}", values.get("group") or "", "products10k")
            yield {**row, "line": line}


def read_aicrowd(root: Path, options: ReadOptions = _DEFAULTS) -> Iterator[Row]:
    """Read the development set of AIcrowd Visual Product Recognition 2023, or a hidden test set.

    ``gallery.csv`` has the columns img_path and product_id; ``queries.csv`` also bbox_x, bbox_y, bbox_w and bbox_h,
    in pixels of the image as it is stored. Neither table of a hidden test set has a product_id. Its images are
    unlabelled.
    """
    box_columns = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
    guard = _guard(root, options)
    labels = () if has_hidden_labels([root / "gallery.csv", root / "queries.csv"], "product_id") else ("product_id",)
    for name, role, columns in (("gallery.csv", "gallery", ()), ("queries.csv", "query", box_columns)):
        table = root / name
        for line, values in read_csv_rows(table, ("img_path", *labels, *columns), (), (*labels, *columns)):
            image = guard.check(values["img_path"], table, line)
            product = f"aicrowd/{values['product_id']}" if labels else f"{UNLABELLED}/{image}"
            row = _row(image, product, "", "aicrowd" if labels else UNLABELLED, role) | {"line": line}
            yield _with_box(row, [values[column] for column in columns], options.box_form) if columns else row


def read_csv(table: Path, options: ReadOptions = _DEFAULTS) -> Iterator[Row]:
    """Read a table with the columns of :class:`vpr.data.config.CatalogConfig`: CSV, JSON lines or Parquet by suffix.

    Paths are relative to ``image_root``, or to the folder of the table. A box has its form and unit still as in the
    table, left, top, width and height; ``raw_box`` has the four numbers. A box that is broken is ``invalid``.
    """
    mapping = read_mapping(options.columns)
    guard = _guard(Path(options.image_root) if options.image_root else table.parent, options)
    optional = ("category", "role", "split", *BOX_COLUMNS)
    columns: tuple[str, ...] | None = None
    form: Form = "auto"
    for line, values in read_table_rows(table, ("image", "product"), optional, ("product",), mapping):
        if columns is None:
            mapped = [name for name in mapping if name in BOX_COLUMNS]
            columns, form = find_box_columns(mapped or list(values), str(table))
            form = form if options.box_form == "auto" else options.box_form
        image = guard.check(guard.relative(values["image"]), table, line)
        row = _row(image, values["product"], values.get("category") or "", "csv") | {"line": line}
        for column in ("role", "split"):
            row[column] = _known(values.get(column) or "", column, f"{table}: line {line}")
        yield _with_box(row, [values[name] for name in columns], form) | {"box_columns": columns} if columns else row


def read_folder(root: Path, options: ReadOptions = _DEFAULTS) -> Iterator[Row]:
    """Read one folder per product, with images at any depth; files that are no images are skipped.

    If all folders of the root are named as splits or roles, the folders in them are the products
    (:func:`vpr.data.split_folders.find_split_folders`).
    """
    guard = _guard(root, options)
    names = list(image_files(root, _links(options)))
    places = find_split_folders(root, names)
    products: dict[str, str] = {}  # the first subfolder with images of each product, or nothing
    for name in names:
        folder, (split, role), rest = place_of(name, places)
        product, _, file = rest.partition("/")
        if not file or (places and not folder):
            place = f"{root}/{folder}/PRODUCT/" if folder else f"{root}/PRODUCT/"
            raise UserError(f"{root / name}: it is in no product's folder. Move it to {place}{file or rest}.")
        products[product] = products.get(product) or file.rpartition("/")[0]
        yield {**_row(guard.check(name), product, "", "folder", role), "split": split}
    _warn_of_subfolders(products)


def _warn_of_subfolders(products: dict[str, str]) -> None:
    """Warn if most products have images in subfolders, which may be the products that the user means."""
    nested = [f"{name}/{folder}" for name, folder in products.items() if folder and folder not in SPLIT_NAMES]
    if 2 * len(nested) > len(products):
        counts = f"the images of {len(nested)} of {len(products)} products are in subfolders ({nested[0]})"
        fix = "if the subfolders are your products, use a CSV or move them up"
        log.warning(f"{counts}. A product is the first folder: {fix}")


def read_images(root: Path, options: ReadOptions = _DEFAULTS) -> Iterator[Row]:
    """Read images without labels at any depth of a folder; each image becomes a separate product."""
    guard = _guard(root, options)
    for name in image_files(root, _links(options)):
        yield _row(guard.check(name), f"{UNLABELLED}/{name}", "", UNLABELLED)


def read_webdataset(root: Path, options: ReadOptions = _DEFAULTS) -> Iterator[Row]:
    """Read the images of WebDataset shards, ``*.tar`` at any depth of a folder, without unpacking them.

    A sample's ``.json`` has ``product`` and optionally ``category``, ``role``, ``split`` and ``box`` (four numbers).
    Alternatively its ``.cls`` is the product. Shards without labels are read like images without labels.
    Rows with ``rejected`` are members that cannot be used, with the reason. ``unread`` of a row are the keys of its
    label that are not read, if no earlier label has them.
    """
    guard = _guard(root, options)
    shards = [name for name in list_files(root, _links(options)) if name.lower().endswith((".tar", ".tar.gz", ".tgz"))]
    is_labelled: bool | None = None
    lone_label = ""
    unread: set[str] = set()
    for shard in shards:
        check_utf8(root, shard)
        if is_hidden(shard):
            yield {"image": shard, "rejected": HIDDEN}
            continue
        if not guard.check(shard).endswith(".tar"):
            raise UserError(f"{root / shard}: images are only read from uncompressed .tar shards. Run gunzip on it.")
        for sample in read_samples(root / shard, image_suffixes()):
            yield from ({"image": f"{shard}/{name}", "rejected": reason} for name, reason in sample.rejected)
            if not sample.images:
                if sample.labels:
                    lone_label = f"{shard}/{sample.key.lstrip('/')}"
                    yield {"image": lone_label, "rejected": "a label without an image"}
                continue
            where = f"{root / shard}: sample '{sample.key}'"
            label, keys = read_label(sample, where)
            if is_labelled not in (None, "product" in label):
                raise UserError(f"{where} has no product, or is the only one that has. Label all samples or none.")
            is_labelled = "product" in label
            for column in ("role", "split"):
                if column in label:
                    label[column] = _known(label[column], column, where)
            if new := [key for key in keys if key not in unread]:
                label["unread"] = new
                unread |= set(new)
                if len(unread) > MAX_COLUMNS:
                    raise UserError(f"{where}: more than {MAX_COLUMNS} different keys. Remove those not needed.")
            box = label.pop("box", None)
            for member in sample.images:
                image = shard + member
                row = _row(image, f"{UNLABELLED}/{image}", "", "webdataset" if is_labelled else UNLABELLED) | label
                yield row if box is None else _with_box(row, box, options.box_form)
    if lone_label and is_labelled is False:
        problem = f"no image has a label, and labels such as {lone_label} have no image next to them"
        raise UserError(f"{root}: {problem}. Write the shards again with tar --sort=name.")


READERS: dict[str, Reader] = {
    "products10k": read_products10k,
    "aicrowd": read_aicrowd,
    "csv": read_csv,
    "folder": read_folder,
    "images": read_images,
    "webdataset": read_webdataset,
}


def _known(text: str, column: str, where: str) -> str:
    """Return a role or split by its usual name: ``train`` for an empty role, and empty text for an empty split.

    A split may have the names that folders may have, such as ``val``.

    :func:`vpr.data.catalog.rows_to_table` checks it too, but here the line is known and no image has been decoded.
    """
    value, known = text.strip().lower(), {"role": ROLES, "split": SPLITS}[column]
    value = SPLIT_NAMES.get(value, value) if column == "split" else value
    if value in _EMPTY:
        return "train" if column == "role" else ""
    if value not in known:
        names = ", ".join(known)
        raise UserError(f"{where}: {column} '{value}' is not known. Use {names}, or rename the column, to ignore it.")
    return value


def _guard(root: Path, options: ReadOptions) -> PathGuard:
    return PathGuard(root, _links(options))


def _links(options: ReadOptions) -> list[Path]:
    """Return the folders that links may lead into."""
    for folder in options.follow_links:
        if not Path(folder).is_dir():
            raise UserError(f"follow_links: {folder} is not a folder. Name folders that links may lead into.")
    return [Path(folder) for folder in options.follow_links]


def _row(image: str, product: str, category: str, source: str, role: str = "train") -> Row:
    row = {"image": image, "product": product, "category": category, "role": role, "source": source}
    return {**row, "split": "", "box": None}


def _with_box(row: Row, cells: Sequence[Any], form: Form) -> Row:
    """Return a row with the box of some cells; ``invalid`` is the reason if it is broken."""
    try:
        raw = parse_box(cells)
        if raw is None:
            return row
        row = {**row, "raw_box": raw, "box_form": "xywh" if form == "auto" else form}
        x, y, w, h = to_xywh(raw, form)
    except ValueError as error:
        return {**row, "invalid": str(error)}
    return {**row, "box": {"x": x, "y": y, "w": w, "h": h}}
