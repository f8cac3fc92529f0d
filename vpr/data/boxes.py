"""Boxes of tables: their columns, forms and coordinate frames, converted to the catalogue's form and checked.

The catalogue's form is left, top, width and height in pixels of the upright image.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vpr.common.errors import UserError
from vpr.imaging.decode import Box, Header

Form = Literal["auto", "xywh", "xyxy", "cxcywh"]
Unit = Literal["pixels", "shares"]
Frame = Literal["auto", "upright", "stored"]
Boxes = Mapping[str, tuple[Box, Header]]  # by the name of the row: the four numbers in the table, the image's header
CANONICAL = ("box_x", "box_y", "box_w", "box_h")
# Sets of four columns, with the form that their names say; the first set in a table is read.
_COLUMN_SETS: tuple[tuple[tuple[str, str, str, str], Form], ...] = (
    (CANONICAL, "xywh"),
    (("bbox_x", "bbox_y", "bbox_w", "bbox_h"), "xywh"),
    (("bbox_x", "bbox_y", "bbox_width", "bbox_height"), "xywh"),
    (("xmin", "ymin", "xmax", "ymax"), "xyxy"),
    (("x_min", "y_min", "x_max", "y_max"), "xyxy"),
    (("x1", "y1", "x2", "y2"), "xyxy"),
    (("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), "xyxy"),
    (("left", "top", "right", "bottom"), "xyxy"),
    (("left", "top", "width", "height"), "xywh"),
    (("x", "y", "w", "h"), "xywh"),
    (("x", "y", "width", "height"), "xywh"),
    (("cx", "cy", "w", "h"), "cxcywh"),
    (("x_center", "y_center", "width", "height"), "cxcywh"),
)
_SINGLE = ("box", "bbox", "bounding_box")  # one column with four numbers
BOX_COLUMNS = tuple(dict.fromkeys([name for names, _ in _COLUMN_SETS for name in names] + list(_SINGLE)))
_MISSING = ("", "nan", "none", "null", "na", "n/a")
_MAX_COORDINATE = 1e6
_TOLERANCE, _TOLERANCE_PIXELS = 0.05, 2.0  # by which a box may leave its image and still fit
_MAX_MISFITS, _MAX_MISFITS_GIVEN, _MAX_MISFITS_OTHER = 0.1, 0.2, 0.02  # shares of the boxes
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap the sides


@dataclass(frozen=True)
class BoxReading:
    """How the numbers of a box are read.

    Attributes:
        form: Meaning of the four numbers: left, top, width, height (``xywh``); left, top, right, bottom (``xyxy``);
            centre, width, height (``cxcywh``). ``auto`` follows the names of the columns, else ``xywh``.
        unit: ``pixels``, or ``shares`` of the image's width and height.
        frame: Image that the numbers are about: ``upright``, with its EXIF orientation applied, or as ``stored``.
            ``auto`` is ``upright``.
    """

    form: Form = "auto"
    unit: Unit = "pixels"
    frame: Frame = "auto"

    def describe(self) -> str:
        """Return the reading in words."""
        frame = "stored" if self.frame == "stored" else "upright"
        return f"{'xywh' if self.form == 'auto' else self.form} in {self.unit} of the {frame} image"


def find_box_columns(names: Sequence[str], where: str) -> tuple[tuple[str, ...], Form]:
    """Return the box columns of a table and the form that their names say; no columns if it has no boxes.

    Raises:
        UserError: The table has some of the columns ``box_x``, ``box_y``, ``box_w``, ``box_h``, but not all.
    """
    found = [name for name in CANONICAL if name in names]
    if found and len(found) < len(CANONICAL):
        missing = next(name for name in CANONICAL if name not in names)
        raise UserError(f"{where}: column '{missing}' is missing, but there is '{found[0]}'. Give all four or none.")
    for columns, form in _COLUMN_SETS:
        if all(name in names for name in columns):
            return columns, form
    single = next((name for name in _SINGLE if name in names), None)
    return ((single,), "xywh") if single else ((), "auto")


def parse_box(values: Sequence[Any]) -> Box | None:
    """Return four numbers, from four cells or one; None if the cells are empty.

    Raises:
        ValueError: The cells are not four finite numbers; the message says so.
    """
    cells = _split(values[0]) if len(values) == 1 else list(values)
    if all(str(cell).strip().lower() in _MISSING for cell in cells):
        return None
    try:
        # Tables with semicolons often have decimal commas.
        numbers = [float(cell.replace(",", ".") if isinstance(cell, str) else cell) for cell in cells]
        a, b, c, d = numbers
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise ValueError(f"box {_show(cells)} is not four numbers") from None
    if not all(math.isfinite(number) and abs(number) < _MAX_COORDINATE for number in numbers):
        raise ValueError(f"box {_show(cells)} is out of range")
    return a, b, c, d


def to_xywh(box: Box, form: Form) -> Box:
    """Return left, top, width and height of a box.

    Raises:
        ValueError: The box has no area.
    """
    a, b, c, d = box
    if form == "xyxy":
        a, b, c, d = a, b, c - a, d - b
    elif form == "cxcywh":
        a, b = a - c / 2, b - d / 2
    if not (c > 0 and d > 0):
        raise ValueError(f"box {_show(box)} has no area")
    return a, b, c, d


def to_upright(box: Box, reading: BoxReading, header: Header) -> Box:
    """Convert left, top, width and height to pixels of the upright image.

    ``header`` has the stored size and the EXIF orientation (EXIF 2.3, tag 0x0112).
    """
    x, y, w, h = box
    is_turned = header.orientation in _TURNED
    is_stored = reading.frame == "stored"
    width, height = (header.height, header.width) if is_turned and not is_stored else (header.width, header.height)
    if reading.unit == "shares":
        x, y, w, h = x * width, y * height, w * width, h * height
    if not is_stored:
        return x, y, w, h
    right, bottom = width - x - w, height - y - h  # distances to the other edges
    return {
        2: (right, y, w, h),
        3: (right, bottom, w, h),
        4: (x, bottom, w, h),
        5: (y, x, h, w),
        6: (bottom, x, h, w),
        7: (bottom, right, h, w),
        8: (y, right, h, w),
    }.get(header.orientation, (x, y, w, h))


def reaches_out(box: Box, header: Header) -> bool:
    """Return whether a box in pixels of the upright image leaves it by more than the rounding to pixels."""
    width, height = upright_size(header)
    x, y, w, h = box
    return min(x, y) < -0.5 or x + w > width + 0.5 or y + h > height + 0.5


def is_outside(box: Box, header: Header) -> bool:
    """Return whether no pixel is left of a box that is cut at the edges of its upright image."""
    (x, y, w, h), (width, height) = box, upright_size(header)
    is_empty = min(width, round(x + w)) <= max(0, round(x))
    return is_empty or min(height, round(y + h)) <= max(0, round(y))


def covers_image(box: Box, header: Header) -> bool:
    """Return whether a box that is rounded to pixels and cut at the edges is the full upright image."""
    (x, y, w, h), (width, height) = box, upright_size(header)
    return max(round(x), round(y)) <= 0 and round(x + w) >= width and round(y + h) >= height


def upright_size(header: Header) -> tuple[int, int]:
    """Return width and height of the upright image."""
    is_turned = header.orientation in _TURNED
    return (header.height, header.width) if is_turned else (header.width, header.height)


def check_plausible(boxes: Boxes, reading: BoxReading, is_given: bool, where: str) -> None:
    """Raise :class:`UserError` if the boxes fit their images much better when read in another way; it names that way.

    Args:
        boxes: Boxes to check.
        reading: How they are read, with the form that the names of the columns say.
        is_given: Whether the user gave the form, which then may fail for more boxes.
        where: Table, for the error.
    """
    turned = {name: pair for name, pair in boxes.items() if pair[1].orientation in _TURNED}
    level = {name: pair for name, pair in boxes.items() if name not in turned}
    other = BoxReading(reading.form, reading.unit, "upright" if reading.frame == "stored" else "stored")
    if _misfit_share(turned, reading) > _MAX_MISFITS and _misfit_share(turned, other) <= _MAX_MISFITS_OTHER:
        _raise_implausible(turned, reading, [f"--box-frame {other.frame}"], where)
    checked = level or turned
    if _misfit_share(checked, reading) <= (_MAX_MISFITS_GIVEN if is_given else _MAX_MISFITS):
        return
    readings = [BoxReading(form, unit, reading.frame) for unit in get_args(Unit) for form in get_args(Form)[1:]]
    likely = [other for other in readings if _misfit_share(checked, other) <= _MAX_MISFITS_OTHER]
    if likely:
        _raise_implausible(checked, reading, [f"--box-form {r.form} --box-unit {r.unit}" for r in likely], where)


def _raise_implausible(boxes: Boxes, reading: BoxReading, fixes: list[str], where: str) -> None:
    misfits = [name for name, (box, header) in boxes.items() if not _fits(box, header, reading)]
    box, header = boxes[misfits[0]]
    width, height = upright_size(header)
    example = f"{_show(box)} in the {width}x{height} image of {misfits[0]}"
    problem = f"{len(misfits)} of {len(boxes)} boxes do not fit their images as {reading.describe()}, such as {example}"
    raise UserError(f"{where}: {problem}. They fit with {', or '.join(fixes)}.")


def _misfit_share(boxes: Boxes, reading: BoxReading) -> float:
    misfits = sum(not _fits(box, header, reading) for box, header in boxes.values())
    return misfits / max(1, len(boxes))


def _fits(box: Box, header: Header, reading: BoxReading) -> bool:
    """Return whether a box has an area, is in its image within the tolerance, and is larger than a pixel."""
    try:
        x, y, w, h = to_upright(to_xywh(box, reading.form), reading, header)
    except ValueError:
        return False
    width, height = upright_size(header)
    sides = ((x, w, width), (y, h, height))
    slack = [_TOLERANCE * side + _TOLERANCE_PIXELS if side > 20 else 1.0 for _, _, side in sides]
    is_inside = all(a >= -s and a + b <= side + s for (a, b, side), s in zip(sides, slack, strict=True))
    return is_inside and (w > 1 or h > 1 or max(width, height) <= 1)


def _split(cell: Any) -> list[Any]:
    """Return the numbers of a cell such as ``[10, 20, 30, 40]`` or ``10 20 30 40``."""
    if not isinstance(cell, str):
        return list(cell) if isinstance(cell, list | tuple) else [cell]
    text = cell.strip()
    if text.startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, list):
            return values
    return [part for part in re.split(r"[\s,;]+", text.strip("[](){}")) if part] or [""]


def _show(values: Sequence[Any]) -> str:
    return f"({', '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)})"[:200]
