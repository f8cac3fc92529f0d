"""Queries with their nearest images, for people to look at."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.recall.measure import Scored
from vpr.data.catalog import Catalog
from vpr.imaging.decode import decode
from vpr.retrieval.search import search

_THUMBNAIL = 72
_TOP = 5
Sheet = list[dict[str, Any]]


def query_sheet(part: Catalog, scored: list[Scored], count: int, seed: int) -> Sheet:
    """Seeded queries with the top five of teacher, student and INT8, thumbnails as data URIs."""
    queries = np.flatnonzero(part.roles == "query")
    return _draw(part, _columns(scored), np.random.default_rng(seed).permutation(queries)[:count])


def changed_sheet(part: Catalog, scored: list[Scored], count: int, seed: int) -> dict[str, Any] | None:
    """Seeded queries whose first result INT8 changed from the student's, those first that it put wrong.

    Returns:
        ``model``, ``changed`` (how many queries in all) and ``sheet``; None without INT8, a student or a change.
    """
    columns = {title: one for title, one in _columns(scored).items() if title in ("student", "INT8")}
    changed = columns["INT8"].changed if len(columns) == 2 else []
    if not changed:
        return None
    rows = {image: row for row, image in enumerate(part.table["image"].to_pylist()) if part.roles[row] == "query"}
    order = np.random.default_rng(seed).permutation(len(changed))
    shown = sorted(order, key=lambda place: changed[place]["right_after"] - changed[place]["right_before"])[:count]
    row = columns["INT8"].row
    return {
        "model": f"{row['name']} on {row['backend']}",
        "changed": len(changed),
        "sheet": _draw(part, columns, np.array([rows[changed[place]["query"]] for place in shown])),
    }


def _columns(scored: list[Scored]) -> dict[str, Scored]:
    found: dict[str, Scored] = {}
    for one in scored:
        stage, precision = one.row["stage"], one.row["precision"] or ""
        heading = "INT8" if precision.startswith("int8") else "student" if one.row["reference"] else stage
        if one.vectors is not None and (heading in ("INT8", "teacher") or one.row["reference"]):
            found.setdefault(heading, one)
    return found


def _draw(part: Catalog, columns: dict[str, Scored], shown: NDArray[np.int64]) -> Sheet:
    gallery, products = np.flatnonzero(part.roles == "gallery"), part.products
    sheet: Sheet = [
        {"product": str(products[row]), "image": _thumbnail(part, int(row)), "results": {}} for row in shown
    ]
    for heading, one in columns.items():
        assert one.vectors is not None  # columns holds no other
        top = min(_TOP, len(gallery))
        scores, found = search(one.vectors[shown], one.vectors[gallery], top)
        for entry, values, hits in zip(sheet, scores, gallery[found], strict=True):
            entry["results"][heading] = [
                {
                    "product": str(products[hit]),
                    "image": _thumbnail(part, int(hit)),
                    "score": round(float(value), 3),
                    "right": bool(products[hit] == entry["product"]),
                }
                for value, hit in zip(values, hits, strict=True)
            ]
    return sheet


def _thumbnail(part: Catalog, row: int) -> str:
    image = decode(part.path(row), part.box(row), _THUMBNAIL)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
