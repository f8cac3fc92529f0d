"""One search: the bytes of an image, the box that was drawn on it, and a filter of the results."""

import re
from dataclasses import dataclass

from PIL import Image
from starlette.datastructures import QueryParams

from vpr.common.errors import UserError
from vpr.imaging.decode import Box, decode_bytes, read_header

MAX_FILTER = 1000  # characters of a condition
# Others, such as `repeat`, may need any time and memory for each image.
FUNCTIONS = ("abs", "cast", "coalesce", "contains", "length", "lower", "round", "starts_with", "upper")
_KEYWORDS = ("and", "between", "case", "else", "ilike", "in", "like", "not", "or", "then", "when")
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`""")
_CALL = re.compile(r"(\w+|[\"`'\]])\s*\(")
_COMMENTS_AND_ESCAPES = ("--", "/*", "\\", "$$")
_SHARE = re.compile(r"[01](\.[0-9]{1,9})?")
_ROUNDING = 1e-5  # the page rounds shares to six digits


class BadRequest(UserError):
    """Request with an invalid box or filter."""


@dataclass(frozen=True)
class Upload:
    """An uploaded image to search for.

    Attributes:
        data: Bytes of the image file.
        box: Part to search for: (x, y, width, height) as shares of the upright image's width and height; None for the
            full image.
        where: Condition in SQL on the results; empty for all.
    """

    data: bytes
    box: Box | None = None
    where: str = ""

    def decode(self, shortest: int) -> Image.Image:
        """Decode the image, or the part in the box, like an image of a catalogue.

        Args:
            shortest: Shortest side that the model needs, in pixels.

        Raises:
            ImageRejected: The bytes are not a usable image.
            BadRequest: The box has no pixel.
        """
        return decode_bytes(self.data, "upload", self._box_in_pixels(), shortest)

    def _box_in_pixels(self) -> Box | None:
        if self.box is None:
            return None
        width, height = read_header(self.data, "upload").upright_size
        x, y, w, h = self.box
        x, y, w, h = x * width, y * height, w * width, h * height
        if round(x + w) <= round(x) or round(y + h) <= round(y):
            raise BadRequest(f"box: it has no pixel of the {width}x{height} image. Draw a larger box.")
        return x, y, w, h


def read_upload(data: bytes, query: QueryParams) -> Upload:
    """Return the upload of a request's body and query string; raise :class:`BadRequest` for an invalid one."""
    where = query.get("where", "").strip()
    if len(where) > MAX_FILTER or not where.isprintable():
        raise BadRequest(f"where: expected at most {MAX_FILTER} characters in one line. Shorten the condition.")
    _check_filter(where)
    return Upload(data, _read_box(query["box"]) if "box" in query else None, where)


def _check_filter(where: str) -> None:
    """Reject functions that may grow a value; the gallery checks everything else."""
    if found := [text for text in _COMMENTS_AND_ESCAPES if text in where]:
        raise BadRequest(f"where: '{found[0]}' is not supported in the page. Leave it out.")
    # Texts may have brackets. A quoted name stays a quote, so that it is no known function.
    unquoted = _QUOTED.sub(lambda match: match[0][0], where)
    if found := [name for name in _CALL.findall(unquoted) if name.lower() not in (*FUNCTIONS, *_KEYWORDS)]:
        raise BadRequest(f"where: the page has no function '{found[0]}'. Use {', '.join(FUNCTIONS)}.")


def _read_box(text: str) -> Box:
    parts = text.split(",")
    if len(parts) == 4 and all(_SHARE.fullmatch(part) for part in parts):
        x, y, w, h = (float(part) for part in parts)
        if w > 0 and h > 0 and max(x + w, y + h) <= 1 + _ROUNDING:
            return x, y, w, h
    rule = "expected x,y,width,height inside the image, as shares of its width and height from 0 to 1"
    raise BadRequest(f"box: {rule}, got '{text[:60]}'. Draw the box again.")
