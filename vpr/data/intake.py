"""From a data set to checked rows: ids, boxes and images are read, checked and normalised."""

import hashlib
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from vpr.common.errors import UserError
from vpr.common.hardware import available_cpus
from vpr.common.log import get_logger
from vpr.data.boxes import (
    BoxReading,
    Form,
    Frame,
    check_plausible,
    covers_image,
    is_outside,
    reaches_out,
    to_upright,
    upright_size,
)
from vpr.data.catalog import Rejected, image_root, rows_to_table
from vpr.data.columns import read_mapping
from vpr.data.config import ReadOptions
from vpr.data.division import Division, Shares, split_by_product
from vpr.data.duplicates import image_hash
from vpr.data.identities import (
    clean_ids,
    describe_near_twins,
    drop_repeats,
    find_conflicts,
    find_twins,
    hash_keys,
    reject_invalid,
    row_name,
)
from vpr.data.image_files import PathGuard, is_image
from vpr.data.readers import READERS, UNLABELLED, Row
from vpr.data.tables import describe_unread, describe_unread_keys
from vpr.imaging.decode import Box, Header, ImageRejected, decode_bytes, read_header, read_image
from vpr.imaging.formats import HEIC_UNREADABLE

log = get_logger(__name__)

_CHUNK = 32  # images of one task: the hand-over of a task costs as much as a tenth of an image
CHECK_SIZE = 64  # pixels; JPEGs are decoded to their end, at a reduced scale
_EARLY_BOXES = 256  # boxes that are checked before all images are decoded
_COLUMNS = ("image", "product", "category", "role", "split")
_TABLES = ("csv", "aicrowd", "products10k")


@dataclass
class Intake:
    """Checked rows of a data set.

    Attributes:
        table: Rows as a catalogue's table, without splits by share.
        root: Folder that ``image`` is relative to.
        set_aside: (image, reason) of the rows that are left out.
        notes: Lines for the summary, about what was found in the data.
        hashes: Perceptual hash of each row, by image and box.
        conflicts: Rows with an image that is under several products, with the reason. The division leaves them out.
    """

    table: pa.Table
    root: Path
    set_aside: list[Rejected]
    notes: list[str]
    hashes: dict[tuple[str, str], int] = field(default_factory=dict)
    conflicts: dict[int, str] = field(default_factory=dict)

    def divide(self, shares: Shares) -> Division:
        """Divide the usable rows, and set aside queries that equal a gallery image of their split.

        Adds to ``set_aside`` and ``notes``, which also count near-duplicates of queries. Unmet shares are left to the
        caller, as ``unmet`` of the division.

        Raises:
            UserError: No row, or no query of a split, is left.
        """
        division = split_by_product(self.table, shares, self.conflicts)
        is_twin, twins, twin_notes = find_twins(division.table)
        self.set_aside += twins
        set_aside = [*self.set_aside, *division.left_out]
        if all(is_twin):
            example = ": ".join(set_aside[0])
            problem = f"all its {len(self.table)} images are set aside ({example})"
            raise UserError(f"{self.root}: {problem}. Correct the labels.")
        is_kept = np.array([not twin for twin in is_twin])
        table = division.table.filter(pa.array(is_kept))
        unmet = division.unmet or (division.find_lost(table, ": ".join(twins[0])) if twins else [])
        self.notes += [*division.notes, *twin_notes, *describe_near_twins(table, self.hashes)]
        return replace(division, table=table, own=division.own[is_kept], unmet=unmet)


def read_data(
    reader: str, path: Path, options: ReadOptions, skip_unreadable: bool = False, skip_invalid_rows: bool = False
) -> Intake:
    """Read a data set, decode every image once, and return the rows that can be used.

    Raises:
        UserError: The data set has no images, a table is broken, ids or boxes are invalid without
            ``skip_invalid_rows``, or an image is unreadable without ``skip_unreadable``.
    """
    rows, notes = clean_ids(list(READERS[reader](path, options)), str(path))
    if not rows:
        raise UserError(f"{path}: there are no images here. Check --root and --reader.")
    root = Path(options.image_root) if options.image_root else image_root(reader, str(path))
    guard = PathGuard(root, [Path(folder) for folder in options.follow_links])
    count, reading, notices = len(rows), _box_reading(reader, rows, options), _box_notes(reader, rows, options)
    _check_early(root, rows, reading, options, str(path))
    if reader in _TABLES:
        notes += _describe_unlisted(root, rows)
    if reader == "csv":
        boxes = next((row["box_columns"] for row in rows if "box_columns" in row), ())
        notes += describe_unread(path, (*_COLUMNS, *boxes), read_mapping(options.columns))
    notes += _describe_keys(rows)
    rows, invalid = reject_invalid(rows, skip_invalid_rows, str(path))
    rows, rejected = check_images(root, rows, skip_unreadable, reading, guard)
    check_plausible(_boxes(rows), reading, options.box_form != "auto", str(path))
    notes += _describe_boxes(rows, reading, notices)
    rows, outside = reject_invalid(rows, skip_invalid_rows, str(path))
    rows, repeated, repeat_notes = drop_repeats(rows)
    set_aside = [*rejected, *invalid, *outside, *repeated]
    if broken := invalid + outside:
        notes.append(f"rows without a product id or with a broken box: {len(broken)} set aside ({broken[0][0]})")
    if not rows:
        example = ": ".join(set_aside[0])
        raise UserError(f"{path}: none of its {count} images can be used ({example}). Check the data, and --root.")
    table = rows_to_table(rows)
    hashes = dict(zip(hash_keys(table), [row["hash"] for row in rows], strict=True))
    conflicts, conflict_notes = find_conflicts(table)
    return Intake(table, root, set_aside, notes + repeat_notes + conflict_notes, hashes, conflicts)


def check_images(
    root: Path,
    rows: list[Row],
    skip_unreadable: bool,
    reading: BoxReading | None = None,
    guard: PathGuard | None = None,
) -> tuple[list[Row], list[Rejected]]:
    """Decode every image once; return the readable rows with ``sha256`` and ``hash``, and (image, reason) of others.

    Rows with ``rejected`` have the reason there and are not decoded. Boxes are converted to pixels of the upright
    image, and a box that covers all of it becomes None, so that the same pixels are found under the same box. A box
    outside of its image makes a row ``invalid``. An unreadable image raises :class:`UserError` unless
    ``skip_unreadable``. With ``guard``, a missing name is also looked for in other Unicode forms.
    """
    readable: list[Row] = []
    rejected: list[Rejected] = []
    reading = reading or BoxReading()
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    with ThreadPoolExecutor(len(available_cpus())) as pool:
        results = pool.map(lambda chunk: [_check_image(root, row, reading, guard) for row in chunk], chunks)
        for row, result in zip(rows, chain.from_iterable(results), strict=True):
            if not isinstance(result, ImageRejected):
                readable.append(result)
            elif skip_unreadable or "rejected" in row:
                rejected.append((row["image"], result.reason))
            else:
                pool.shutdown(cancel_futures=True)
                _raise_unreadable(root, row, result)
    return readable, rejected


def warn_of_skipped(skipped: list[Rejected]) -> None:
    """Warn of the files of a folder that are images of an unsupported format."""
    heic = [name for name, reason in skipped if reason == HEIC_UNREADABLE]
    if heic:
        fix = "To read them: pip install -r requirements-heic.txt"
        log.warning(f"HEIC files: {len(heic)} left out ({heic[0]}), see set_aside.csv. {fix}")


def _check_image(root: Path, row: Row, reading: BoxReading, guard: PathGuard | None) -> Row | ImageRejected:
    if "rejected" in row:
        return ImageRejected(root / row["image"], row["rejected"])
    try:
        path, data = _read(root, row["image"], guard)
        row = {**row, "image": path, "sha256": hashlib.sha256(data).hexdigest()}
        box = None
        if row["box"] is not None:
            header = read_header(data, root / path)
            x, y, w, h = to_upright(tuple(row["box"].values()), reading, header)
            box = (x, y, w, h)
            row |= {"box": dict(zip("xywh", box, strict=True)), "header": header}
            row["reaches_out"] = reaches_out(box, header)
            if is_outside(box, header):
                width, height = upright_size(header)
                numbers = ", ".join(f"{number:g}" for number in row["raw_box"])
                row["invalid"] = f"box ({numbers}) is outside the {width}x{height} image"
                box = None
            elif covers_image(box, header):
                row["box"] = box = None
        return {**row, "hash": image_hash(decode_bytes(data, root / path, box, CHECK_SIZE))}
    except ImageRejected as error:
        return error


def _read(root: Path, name: str, guard: PathGuard | None) -> tuple[str, bytes]:
    """Return name and bytes of an image; a missing name of a table is looked for in other spellings."""
    try:
        return name, read_image(root / name)
    except ImageRejected:
        if guard is not None and not os.path.lexists(root / name):
            for form in ("NFC", "NFD"):
                for other in (unicodedata.normalize(form, name), unicodedata.normalize(form, name.strip())):
                    if other != name and guard.is_inside(other) and (root / other).is_file():
                        return other, read_image(root / other)
        raise


def _raise_unreadable(root: Path, row: Row, error: ImageRejected) -> None:
    """Raise the error of an image; for a missing image of a table, one that names line and folder."""
    if not row.get("line") or os.path.lexists(root / row["image"]):
        raise error
    fix = "Give the folder that paths are relative to with --image-root, or build with --skip-unreadable"
    raise UserError(f"{root / row['image']}: no such file, but line {row['line']} of the table names it. {fix}.")


def _box_reading(reader: str, rows: list[Row], options: ReadOptions) -> BoxReading:
    """Return how the boxes of a data set are read, with the form that the names of the columns say."""
    frame: Frame = "stored" if options.box_frame == "auto" and reader == "aicrowd" else options.box_frame
    form: Form = next((row["box_form"] for row in rows if "box_form" in row), "xywh")
    return BoxReading(form, options.box_unit, frame)


def _box_notes(reader: str, rows: list[Row], options: ReadOptions) -> tuple[str, str]:
    """Return the columns that boxes were read from, and what to check if images are turned."""
    columns = next((row["box_columns"] for row in rows if "box_columns" in row), ())
    is_guessed = options.box_frame == "auto" and reader != "aicrowd"
    hint = "; give --box-frame stored if they were drawn without regard to EXIF" if is_guessed else ""
    return f" from {', '.join(columns)}" if columns else "", hint


def _check_early(root: Path, rows: list[Row], reading: BoxReading, options: ReadOptions, where: str) -> None:
    """Check some boxes against their images before all images are decoded."""
    boxed = [row for row in rows if "raw_box" in row]
    boxes = {}
    for row in boxed[:: max(1, len(boxed) // _EARLY_BOXES)]:
        with suppress(ImageRejected):  # reported when all images are decoded
            path = root / row["image"]
            boxes[row_name(row)] = (row["raw_box"], read_header(read_image(path), path))
    check_plausible(boxes, reading, options.box_form != "auto", where)


def _boxes(rows: list[Row]) -> dict[str, tuple[Box, Header]]:
    return {row_name(row): (row["raw_box"], row["header"]) for row in rows if "header" in row}


def _describe_boxes(rows: list[Row], reading: BoxReading, notices: tuple[str, str]) -> list[str]:
    """Return lines about boxes: how they were read, those that reach out, and those in images that are turned."""
    boxed = [row for row in rows if "header" in row]
    if not boxed:
        return []
    columns, hint = notices
    notes = [f"boxes: {len(boxed)}{columns}, read as {reading.describe()}"]
    if out := [row for row in boxed if row["reaches_out"] and "invalid" not in row]:
        notes.append(f"boxes that reach out of their image and are clipped: {len(out)} ({row_name(out[0])})")
    if turned := [row for row in boxed if row["header"].orientation in range(2, 9)]:
        example = row_name(turned[0])
        frame = "stored" if reading.frame == "stored" else "upright"
        text = f"boxes of images with an EXIF orientation: {len(turned)} ({example})"
        notes.append(f"{text}, read in the {frame} image{hint}")
    return notes


def _describe_keys(rows: list[Row]) -> list[str]:
    """Return lines about the keys of shard labels that are not read."""
    keys = list(dict.fromkeys(key for row in rows for key in row.get("unread", ())))
    has = {"product": any(row.get("source", UNLABELLED) != UNLABELLED for row in rows)}
    has |= {"split": any(row.get("split") for row in rows), "box": any("raw_box" in row for row in rows)}
    return describe_unread_keys(keys, [name for name, is_there in has.items() if not is_there])


def _describe_unlisted(root: Path, rows: list[Row]) -> list[str]:
    """Return a line that counts the images next to those of a table that the table does not list."""
    listed = {os.path.normpath(row["image"]) for row in rows}
    unlisted = []
    for folder in sorted({os.path.dirname(name) for name in listed}):
        with suppress(OSError):  # missing folders are reported when the images are read
            names = [os.path.join(folder, entry.name) for entry in os.scandir(root / folder) if entry.is_file()]
            unlisted += [name for name in sorted(names) if name not in listed and is_image(root, name)]
    if not unlisted:
        return []
    return [f"images in the folders of the table without a label: {len(unlisted)} ({unlisted[0]})"]
