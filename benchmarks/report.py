"""``vpr bench report``: what each model keeps and what it costs, as JSON, Markdown and one HTML page."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.backends import default_threads
from benchmarks.latency import time_models
from benchmarks.page import draw_html, draw_markdown
from benchmarks.recall import Scored, score_models
from vpr.artifact import find_current, load_artifact, plain, write_artifact
from vpr.catalog import Catalog, load_catalog
from vpr.console import say
from vpr.environment import environment
from vpr.errors import UserError
from vpr.images import decode
from vpr.search import search

SCHEMA = 1
_THUMBNAIL = 72
_TOP = 5


@dataclass(frozen=True)
class ReportConfig:
    """What is compared.

    Attributes:
        catalog: catalogue artifact with query and gallery pictures.
        models: artifacts: teacher, student, ONNX graphs, engines.
        output: where the report is written.
        split: the scored split.
        batches: pictures per call, for latency.
        seconds: time spent on each model and batch.
        threads: of every backend alike; 0 is one per processor.
        drop: recall@1 that the recommended model may lose against the FP32 student.
        sheet_queries: queries shown with their top five.
        seed: of the bootstrap and of the queries shown.
    """

    catalog: str
    models: tuple[str, ...]
    output: str
    split: str = "test"
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 1.5
    threads: int = 0
    drop: float = 0.02
    sheet_queries: int = 12
    seed: int = 0


def report(config: ReportConfig) -> Path:
    """Measure recall, then latency, and write an artifact of kind ``report``."""
    if not config.models:
        raise UserError("models: none given: name at least one artifact")
    catalog = load_catalog(config.catalog)
    parents = [load_artifact(path).as_parent("model") for path in config.models]
    if catalog.artifact:
        parents.append(catalog.artifact.as_parent("catalog"))
    if find_current(config.output, "report", plain(config), parents):
        say(f"{config.output}: up to date")
        return Path(config.output)
    part = catalog.select(split=config.split)
    scored = score_models(part, config.models, config.seed)
    threads = config.threads or default_threads()
    _add_latency(scored, time_models(config.models, config.batches, config.seconds, threads))
    measured: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment(),
        "catalog": {**catalog.summary(), "split": config.split},
        "threads": threads,
        "drop": config.drop,
        "rows": [one.row for one in scored],
        "sheet": _sheet(part, scored, config),
    }
    with write_artifact(config.output, "report", plain(config), parents) as draft:
        draft.catalog = catalog.summary()
        (draft.path / "report.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
        (draft.path / "report.md").write_text(draw_markdown(measured), encoding="utf-8")
        (draft.path / "report.html").write_text(draw_html(measured), encoding="utf-8")
    say(f"{config.output}: report of {len(scored)} rows")
    return Path(config.output)


def _add_latency(scored: list[Scored], timed: dict[str, dict[str, Any]]) -> None:
    for one in scored:
        if one.model is None:
            one.row["notes"] = "needs no model; not timed"
        else:
            one.row.update(timed[one.model.name])


def _sheet(part: Catalog, scored: list[Scored], config: ReportConfig) -> list[dict[str, Any]]:
    """Seeded queries with the top five of teacher, student and INT8, thumbnails as data URIs."""
    columns: dict[str, Scored] = {}
    for one in scored:
        stage, precision = one.row["stage"], one.row["precision"]
        title = "INT8" if precision == "int8" else stage
        if one.vectors is not None and (title == "INT8" or stage in ("teacher", "student")):
            columns.setdefault(title, one)
    queries, gallery = np.flatnonzero(part.roles == "query"), np.flatnonzero(part.roles == "gallery")
    shown = np.random.default_rng(config.seed).permutation(queries)[: config.sheet_queries]
    products = part.products
    sheet: list[dict[str, Any]] = [
        {"product": str(products[row]), "picture": _thumbnail(part, int(row)), "results": {}} for row in shown
    ]
    for title, one in columns.items():
        assert one.vectors is not None  # columns holds no other
        top = min(_TOP, len(gallery))
        scores, found = search(one.vectors[shown], one.vectors[gallery], top)
        for entry, values, hits in zip(sheet, scores, gallery[found], strict=True):
            entry["results"][title] = [
                {
                    "product": str(products[hit]),
                    "picture": _thumbnail(part, int(hit)),
                    "score": round(float(value), 3),
                    "right": bool(products[hit] == entry["product"]),
                }
                for value, hit in zip(values, hits, strict=True)
            ]
    return sheet


def _thumbnail(part: Catalog, row: int) -> str:
    picture = decode(part.path(row), part.box(row), _THUMBNAIL)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
