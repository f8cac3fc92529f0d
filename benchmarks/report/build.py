"""``vpr bench report``: what each model keeps and what it costs, as JSON, Markdown and one HTML page."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.config import ReportConfig
from benchmarks.latency.measure import time_models
from benchmarks.recall.measure import Scored, add_note, parents_of, score_models
from benchmarks.recall.paired_bootstrap import write_changed
from benchmarks.report.examples import changed_sheet, query_sheet
from benchmarks.report.schema import SCHEMA, check, json_schema
from export.backends.registry import default_threads
from vpr.artifacts.store import (
    config_to_json,
    find_up_to_date,
    load_artifact,
    reraise_as_artifact_error,
    write_artifact,
)
from vpr.common.flags import to_flags
from vpr.common.hardware import environment
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog

log = get_logger(__name__)


def build_report(config: ReportConfig) -> Path:
    """Measure recall, then latency, and write an artifact of kind ``report``.

    It holds ``report.json`` with its schema, ``report.md``, ``report.html``, and ``changed.csv``: the queries whose
    first result is another than the FP32 student's.
    """
    catalog = load_catalog(config.catalog)
    parents = parents_of(config.models, catalog)
    parents += [load_artifact(path, "ranges").as_parent("ranges") for path in config.ranges]
    if find_up_to_date(config.output, "report", config_to_json(config), parents, "report.json"):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    measured, changed = _measure(config, catalog)
    check(measured, "report.json")
    from benchmarks.report.render import draw_html, draw_markdown  # matplotlib is loaded after the timing

    with write_artifact(config.output, "report", config_to_json(config), parents) as draft:
        draft.catalog = catalog.summary()
        (draft.path / "report.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
        (draft.path / "report.schema.json").write_text(json.dumps(json_schema(), indent=1), encoding="utf-8")
        (draft.path / "report.md").write_text(draw_markdown(measured), encoding="utf-8")
        (draft.path / "report.html").write_text(draw_html(measured), encoding="utf-8")
        write_changed(draft.path / "changed.csv", changed)
    log.info(f"{config.output}: report of {len(measured['rows'])} rows")
    return Path(config.output)


def _measure(config: ReportConfig, catalog: Catalog) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``report.json``, and the lines of ``changed.csv``."""
    part = catalog.select(split=config.split)
    scored = score_models(part, config.models, config.seed, config.rerank)
    threads = config.threads or default_threads()
    _add_latency(scored, time_models(config.models, config.batches, config.seconds, threads))
    measured = {
        "schema": SCHEMA,
        "environment": environment(),
        "catalog": {**catalog.summary(), "split": config.split},
        "threads": threads,
        "drop": config.drop,
        "command": command(config),
        "rerank": asdict(config.rerank),
        "rows": [one.row for one in scored],
        "sheet": query_sheet(part, scored, config.sheet_queries, config.seed),
        "changed_sheet": changed_sheet(part, scored, config.sheet_queries // 2, config.seed),
        "calibrations": [read_calibration(path) for path in config.ranges],
        "decisions": read_decisions(config.models),
    }
    return measured, [line for one in scored for line in one.changed]


def command(config: ReportConfig) -> str:
    """The command line that makes this report again."""
    return shlex.join(["vpr", "bench", "report", *to_flags(ReportConfig, vars(config))])


def read_calibration(path: str) -> dict[str, Any]:
    """The ranges of an artifact: for each tensor the thresholds of every method and the largest magnitude seen."""
    artifact = load_artifact(path, "ranges")
    with reraise_as_artifact_error(artifact):
        ranges = json.loads(artifact.file("ranges.json").read_text(encoding="utf-8"))
        keys = ("threshold", "method", "thresholds", "largest")
        tensors = [{"name": name, **{key: one[key] for key in keys}} for name, one in ranges.items()]
    return {"name": artifact.card.name, "tensors": tensors}


def read_decisions(models: tuple[str, ...]) -> list[dict[str, Any]]:
    """``decision.json`` of those models that were made within a budget of recall."""
    found = []
    for artifact in map(load_artifact, models):
        if "decision.json" in artifact.card.files:
            with reraise_as_artifact_error(artifact):
                decision = json.loads(artifact.file("decision.json").read_text(encoding="utf-8"))
            found.append({"name": artifact.card.name, **decision})
    return found


def _add_latency(scored: list[Scored], timed: dict[str, dict[str, Any]]) -> None:
    for one in scored:
        if one.model is None:
            one.row["notes"] = "needs no model; not timed"
            continue
        found = dict(timed[one.model.name])
        note = found.pop("notes", "")
        one.row.update(found)
        if note and note not in one.row["notes"]:
            add_note(one.row, note)
        if one.row["latency_ms"] and one.row["peak_memory_bytes"] is None:
            add_note(one.row, "peak memory: not measured")
