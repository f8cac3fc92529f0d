"""Images of the galleries, addressed by their row in one or more catalogues."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from vpr.data.catalog import Catalog
from vpr.imaging.decode import decode

_THUMBNAIL = 240  # pixels of the longer side


@dataclass(frozen=True)
class GalleryImages:
    """Images of catalogues; their rows are counted through, catalogue after catalogue."""

    catalogs: Sequence[Catalog]

    def __len__(self) -> int:
        return sum(map(len, self.catalogs))

    @cached_property
    def places(self) -> dict[tuple[str, str], int]:
        """Row of each image by product and image id; the first catalogue counts, gallery rows first."""
        places: dict[tuple[str, str], int] = {}
        for start, catalog in zip(self._starts, self.catalogs, strict=True):
            columns = (catalog.table[name].to_pylist() for name in ("product", "image"))
            keys = list(zip(*columns, strict=True))
            for row in np.argsort(catalog.roles != "gallery", kind="stable").tolist():
                places.setdefault(keys[row], start + row)
        return places

    def thumbnail(self, row: int) -> bytes:
        """Return a small new WebP file of a row; raise :class:`ImageRejected` if its image cannot be read."""
        number = bisect_right(self._starts, row) - 1
        catalog, row = self.catalogs[number], row - self._starts[number]
        image = decode(catalog.path(row), catalog.box(row), _THUMBNAIL)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=80)
        return stream.getvalue()

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(map(len, self.catalogs))][:-1]
