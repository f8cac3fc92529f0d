"""Example queries with their nearest images, as thumbnails for people to look at."""

import base64
import io

import numpy as np
from numpy.typing import NDArray

from benchmarks.recall.measure import ScoredModel
from benchmarks.report.schema import ChangedExamples, ExampleQuery, Hit
from vpr.data.catalog import Catalog
from vpr.imaging.decode import decode
from vpr.retrieval.search import search

_THUMBNAIL = 72
_TOP = 5


def draw_examples(part: Catalog, scored: list[ScoredModel], count: int, seed: int) -> list[ExampleQuery]:
    """Return seeded queries with the top five of teacher, student and INT8."""
    queries = np.flatnonzero(part.roles == "query")
    return _draw(part, _columns(scored), np.random.default_rng(seed).permutation(queries)[:count])


def draw_changed_examples(part: Catalog, scored: list[ScoredModel], count: int, seed: int) -> ChangedExamples | None:
    """Return seeded queries whose first result INT8 changed from the student's, broken ones first; None without any."""
    columns = {heading: model for heading, model in _columns(scored).items() if heading in ("student", "INT8")}
    changed = columns["INT8"].changed if len(columns) == 2 else []
    if not changed:
        return None
    rows = {image: row for row, image in enumerate(part.table["image"].to_pylist()) if part.roles[row] == "query"}
    order = np.random.default_rng(seed).permutation(len(changed))
    drawn = sorted(order, key=lambda index: changed[index].right_after - changed[index].right_before)[:count]
    return ChangedExamples(
        model=columns["INT8"].row.title,
        changed=len(changed),
        sheet=_draw(part, columns, np.array([rows[changed[index].query] for index in drawn], dtype=np.int64)),
    )


def _columns(scored: list[ScoredModel]) -> dict[str, ScoredModel]:
    """Return the first teacher, the FP32 student and its first INT8 model, by heading."""
    columns: dict[str, ScoredModel] = {}
    for model in scored:
        if model.vectors is None:
            continue
        is_teacher = model.model is not None and bool(model.model.artifact.parents("teacher"))
        if (model.row.precision or "").startswith("int8") and not is_teacher:
            columns.setdefault("INT8", model)
        elif model.row.reference:
            columns.setdefault("student", model)
        elif model.row.stage == "teacher":
            columns.setdefault("teacher", model)
    return columns


def _draw(part: Catalog, columns: dict[str, ScoredModel], queries: NDArray[np.int64]) -> list[ExampleQuery]:
    gallery, products = np.flatnonzero(part.roles == "gallery"), part.products
    examples = [ExampleQuery(product=str(products[i]), image=_thumbnail(part, int(i)), results={}) for i in queries]
    for heading, model in columns.items():
        assert model.vectors is not None  # _columns leaves the others out
        scores, rows = search(model.vectors[queries], model.vectors[gallery], min(_TOP, len(gallery)))
        for example, values, hits in zip(examples, scores, gallery[rows], strict=True):
            example.results[heading] = [
                Hit(
                    product=str(products[hit]),
                    image=_thumbnail(part, int(hit)),
                    score=round(float(value), 3),
                    right=bool(products[hit] == example.product),
                )
                for value, hit in zip(values, hits, strict=True)
            ]
    return examples


def _thumbnail(part: Catalog, row: int) -> str:
    image = decode(part.path(row), part.box(row), _THUMBNAIL)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
