"""What the clients of a load test upload, each with its right answer known beforehand."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from app.search_page.lookup import Searcher
from app.search_page.server import MAX_BYTES, UPLOAD_SECONDS
from tests.reliability.hostile.images import claimed_size_png
from tests.reliability.load.clients import Expected, Upload, Way
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.imaging.decode import ImageRejected

TOP = 12
SHARES: dict[str, float] = {
    "good": 0.50,
    "good, in chunks": 0.05,
    "good, slow": 0.10,
    "good, 12 megapixels": 0.04,
    "cut short": 0.08,
    "no image": 0.06,
    "says 144 megapixels": 0.03,
    "too many bytes": 0.03,
    "stalls": 0.01,
    "breaks off": 0.06,
    "leaves": 0.04,
}
_LARGE = 8  # different images of 12 megapixels


class Uploads:
    """Uploads with their right answers, which the same model gives in this process.

    Args:
        searcher: the page's model and gallery.
        images: queries.
        seed: of what is drawn.
    """

    def __init__(self, searcher: Searcher, images: Catalog, seed: int) -> None:
        self._searcher, self._images = searcher, images
        self._rng = np.random.default_rng(seed)
        self._known: dict[tuple[int, bool], tuple[bytes, Expected]] = {}

    def draw(self, kind: str = "") -> Upload:
        """An upload of this kind, or of a random one."""
        kind = kind or str(self._rng.choice(list(SHARES), p=list(SHARES.values())))
        row = int(self._rng.integers(len(self._images)))
        large = kind == "good, 12 megapixels"
        body, expected = self._good(row % _LARGE if large else row, large)
        ways: dict[str, Way] = {"good, in chunks": "in chunks", "good, slow": "slowly"}
        if kind.startswith("good"):
            return Upload(kind, body, expected, ways.get(kind, "at once"))
        match kind:
            case "breaks off":
                return Upload(kind, body, Expected(0), "then breaks off")
            case "leaves":
                return Upload(kind, body, Expected(0), "then leaves")
            case "stalls":
                said = f"the upload took more than {UPLOAD_SECONDS} s"
                return Upload(kind, body, Expected(408, said=said), "then stalls")
            case "too many bytes":
                return Upload(kind, body, Expected(413, said="Content Too Large"), size=MAX_BYTES + 1)
        bodies = {"cut short": body[: len(body) * 2 // 3], "no image": b"<svg><script>", "says 144 megapixels": _BOMB}
        try:
            self._searcher.search_bytes(bodies[kind], 1)
        except ImageRejected as refused:
            return Upload(kind, bodies[kind], Expected(422, said=refused.reason))
        raise UserError(f"load: image {row} of the queries is readable though {kind}: choose others")

    def _good(self, row: int, large: bool) -> tuple[bytes, Expected]:
        if (row, large) not in self._known:
            body = self._images.path(row).read_bytes()
            body = _enlarged(body) if large else body
            found = self._searcher.search_bytes(body, TOP)
            answer = Expected(200, tuple(found.rows.tolist()), tuple(found.scores.tolist()))
            self._known[row, large] = body, answer
        return self._known[row, large]


def _enlarged(body: bytes) -> bytes:
    """The image as a camera's JPEG of 12 megapixels."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(body)).convert("RGB").resize((4000, 3000)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


_BOMB = claimed_size_png(12_000, 8, 2)
