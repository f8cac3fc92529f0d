"""Uploads of a load test, with their correct answers."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from app.search_page.lookup import Searcher
from app.search_page.server import MAX_BYTES, UPLOAD_SECONDS
from app.search_page.upload import Upload as SearchUpload
from tests.reliability.hostile.images import promised_png
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
    "claims 144 megapixels": 0.03,
    "too many bytes": 0.03,
    "stalls": 0.01,
    "breaks off": 0.06,
    "leaves": 0.04,
}
_LARGE_IMAGES = 8  # number of distinct images of 12 megapixels


class Uploads:
    """Uploads with their correct answers, computed by the same model in this process.

    Args:
        searcher: Model and gallery of the page.
        images: Queries.
        seed: Seed of the draws.
    """

    def __init__(self, searcher: Searcher, images: Catalog, seed: int) -> None:
        self._searcher, self._images = searcher, images
        self._rng = np.random.default_rng(seed)
        self._answers: dict[tuple[int, bool], tuple[bytes, Expected]] = {}

    def draw(self, kind: str = "") -> Upload:
        """Return an upload of this kind, or of a random kind."""
        kind = kind or str(self._rng.choice(list(SHARES), p=list(SHARES.values())))
        row = int(self._rng.integers(len(self._images)))
        large = kind == "good, 12 megapixels"
        body, expected = self._valid(row % _LARGE_IMAGES if large else row, large)
        ways: dict[str, Way] = {"good, in chunks": "in chunks", "good, slow": "slowly"}
        if kind.startswith("good"):
            return Upload(kind, body, expected, ways.get(kind, "at once"))
        match kind:
            case "breaks off":
                return Upload(kind, body, Expected(0), "then breaks off")
            case "leaves":
                return Upload(kind, body, Expected(0), "then leaves")
            case "stalls":
                text = f"the upload took more than {UPLOAD_SECONDS} s"
                return Upload(kind, body, Expected(408, text=text), "then stalls")
            case "too many bytes":
                return Upload(kind, body, Expected(413, text="Content Too Large"), size=MAX_BYTES + 1)
        bodies = {"cut short": body[: len(body) * 2 // 3], "no image": b"<svg><script>", "claims 144 megapixels": _BOMB}
        try:
            self._searcher.search(SearchUpload(bodies[kind]), 1)
        except ImageRejected as rejected:
            return Upload(kind, bodies[kind], Expected(422, text=rejected.reason))
        raise UserError(f"load: query image {row} is readable although {kind}. Choose another catalogue.")

    def _valid(self, row: int, large: bool) -> tuple[bytes, Expected]:
        if (row, large) not in self._answers:
            body = self._images.path(row).read_bytes()
            body = _enlarged(body) if large else body
            hits = self._searcher.search(SearchUpload(body), TOP).hits
            answer = Expected(200, tuple(hit.row for hit in hits), tuple(hit.score for hit in hits))
            self._answers[row, large] = body, answer
        return self._answers[row, large]


def _enlarged(body: bytes) -> bytes:
    """Return the image as a JPEG of 12 megapixels."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(body)).convert("RGB").resize((4000, 3000)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


_BOMB = promised_png(12_000, 8, 2)
