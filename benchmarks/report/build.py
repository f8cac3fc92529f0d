"""``vpr bench report``: recall and costs of every model, as JSON, Markdown and one HTML page."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.config import ReportConfig
from benchmarks.latency.measure import time_models
from benchmarks.models import load_models
from benchmarks.recall.measure import ScoredModel, score_models
from benchmarks.recall.paired_drop import write_changed
from benchmarks.recall.queries import ScoredPart, choose_queries
from benchmarks.report import schema
from benchmarks.report.examples import draw_changed_examples, draw_examples
from benchmarks.report.recommendation import SELECTION_SPLIT, build_verdict, timed_batches
from benchmarks.report.selection import order_rows, select_row
from benchmarks.report.storage_schema import Storage
from export.backends.registry import default_threads
from vpr.artifacts.names import with_distinct_names
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError
from vpr.common.flags import to_flags
from vpr.common.hardware import environment
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.pixels import KeptPixels
from vpr.retrieval.embeddings import embed, score_split

log = get_logger(__name__)


def build_report(config: ReportConfig) -> Path:
    """Measure recall, then latency, and write an artifact of kind ``report``.

    The artifact has ``report.json`` and its schema, ``report.md``, ``report.html``, and ``changed.csv``: the queries
    whose first result differs from the FP32 student's.
    """
    catalog = load_catalog(config.catalog)
    models = load_models((*config.models, *config.rivals))
    ranges = [load_artifact(path, "ranges") for path in config.ranges]
    skews = [load_artifact(path, "report") for path in config.skew]
    storages = [load_artifact(path, "report") for path in config.storage]
    parents = [model.as_parent("model") for model in models] + catalog.as_parents()
    parents += [artifact.as_parent("ranges") for artifact in ranges]
    parents += [artifact.as_parent("skew") for artifact in skews]
    parents += [artifact.as_parent("storage") for artifact in storages]
    stage = Stage(config.output, "report", config_to_json(config), parents, "report.json")
    if stage.find():
        return stage.path
    drawn = [read_skew(artifact) for artifact in skews], [read_storage(artifact) for artifact in storages]
    models = with_distinct_names(models)
    part = _choose_queries(catalog, config)
    if {"query", "gallery"} <= set(catalog.select(split=SELECTION_SPLIT).roles.tolist()):
        # An error of the choice comes before the measurements.
        choose_queries(catalog.select(split=SELECTION_SPLIT), skip_unmatched=config.skip_unmatched)
    compared, rivals = models[: len(config.models)], models[len(config.models) :]
    kept = KeptPixels()
    scored = score_models(part, compared, config.seed, config.rerank, rivals, kept=kept)
    threads = config.threads or default_threads()
    add_timings(scored, time_models(models, config.batches, config.seconds, threads))
    selection = choose_row(catalog, scored, config, kept)
    values = assemble_report(config, catalog, part.catalog, scored, models, ranges, selection, drawn).to_json()
    report = schema.parse_report(values, "report.json")
    from benchmarks.report.render import draw_html, draw_markdown  # loads matplotlib, so only after the timing

    with stage.write() as draft:
        draft.catalog = catalog.summary()
        (draft.path / "report.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        (draft.path / "report.schema.json").write_text(
            json.dumps(schema.Report.model_json_schema(), indent=1), encoding="utf-8"
        )
        (draft.path / "report.md").write_text(draw_markdown(report), encoding="utf-8")
        (draft.path / "report.html").write_text(draw_html(report), encoding="utf-8")
        write_changed(draft.path / "changed.csv", [query for model in scored for query in model.changed])
    log.info(f"{config.output}: report of {len(report.rows)} rows. {build_verdict(report).headline}")
    return stage.path


def _choose_queries(catalog: Catalog, config: ReportConfig) -> ScoredPart:
    """Return what the report scores; raise :class:`UserError` where the queries are the gallery."""
    part = choose_queries(catalog.select(split=config.split), skip_unmatched=config.skip_unmatched)
    if part.own is not None:
        problem = "the queries and the gallery are the same images, which `vpr bench recall` scores"
        raise UserError(f"split: {problem}. Set the roles of the images in the table for a report.")
    return part


def add_timings(scored: list[ScoredModel], timings: dict[str, schema.Timing]) -> None:
    """Fill in the costs of every row."""
    for scores in scored:
        if scores.model is None:
            scores.row.notes = "needs no model; not timed"
        else:
            scores.row.add_timing(timings[scores.model.name])


def choose_row(
    catalog: Catalog, scored: list[ScoredModel], config: ReportConfig, kept: KeptPixels | None = None
) -> schema.Selection | None:
    """Choose the model to recommend on the validation split; None if there is none to choose from.

    Products that a search for layers has used are left out: the search picked layers that suit them.
    """
    rows = [scores.row for scores in scored]
    batches = timed_batches(rows)
    part = catalog.select(split=SELECTION_SPLIT)
    if config.split == SELECTION_SPLIT or not batches or not any(row.reference for row in rows):
        return None
    if not {"query", "gallery"} <= set(part.roles.tolist()):
        return None
    chosen = choose_queries(part, skip_unmatched=config.skip_unmatched)
    if chosen.own is not None:  # the queries are the gallery, so each would find itself
        return None
    part = chosen.catalog
    artifacts = [scores.model.artifact for scores in scored if scores.model]
    searched = {
        product
        for artifact in artifacts
        if "decision.json" in artifact.card.files
        for product in read_decision(artifact).search_products
    }
    ordered = order_rows(rows, batches[0])
    products = part.products[part.roles == "query"]
    is_unsearched = ~np.isin(products, sorted(searched))
    if not ordered or not ordered[0].reference or not is_unsearched.any():
        return None
    hits = {}
    for scores in scored:
        if scores.model and any(row is scores.row for row in ordered):
            log.info(f"choice on the validation split: {scores.row.title}")
            vectors = embed(part, scores.model.preprocess, scores.model.open(default_threads()), kept=kept)
            hits[scores.row.title] = score_split(part, vectors).hits
    return select_row(
        ordered,
        {title: row_hits[is_unsearched] for title, row_hits in hits.items()},
        products[is_unsearched],
        SELECTION_SPLIT,
        config.drop,
        config.confidence,
    )


def assemble_report(
    config: ReportConfig,
    catalog: Catalog,
    part: Catalog,
    scored: list[ScoredModel],
    models: list[Artifact],
    ranges: list[Artifact],
    selection: schema.Selection | None,
    drawn: tuple[list[schema.Skew], list[Storage]],
) -> schema.Report:
    """Return the rows with the examples, calibrations and layer decisions around them.

    ``part`` has the scored rows of ``catalog``; ``drawn`` are the tables of other measurements.
    """
    return schema.Report(
        schema=schema.SCHEMA,
        environment=schema.Environment(**environment()),
        catalog=schema.ScoredCatalog(**catalog.summary(), split=config.split),
        threads=config.threads or default_threads(),
        drop=config.drop,
        selection=selection,
        command=format_command(config),
        rerank=asdict(config.rerank),
        rows=[scores.row for scores in scored],
        sheet=draw_examples(part, scored, config.sheet_queries, config.seed),
        changed_sheet=draw_changed_examples(part, scored, config.sheet_queries // 2, config.seed),
        calibrations=[read_calibration(artifact) for artifact in ranges],
        decisions=[read_decision(model) for model in models if "decision.json" in model.card.files],
        skews=drawn[0],
        storages=drawn[1],
    )


def format_command(config: ReportConfig) -> str:
    """Return the command line that repeats this report."""
    return shlex.join(["vpr", "bench", "report", *to_flags(ReportConfig, vars(config))])


def read_calibration(artifact: Artifact) -> schema.Calibration:
    """Read the ranges of a ``ranges`` artifact."""
    with reraise_as_artifact_error(artifact):
        ranges = json.loads(artifact.file("ranges.json").read_text(encoding="utf-8"))
        keys = ("threshold", "method", "thresholds", "largest")
        tensors = [schema.TensorRange(name=name, **{key: entry[key] for key in keys}) for name, entry in ranges.items()]
    return schema.Calibration(name=artifact.card.name, tensors=tensors)


def read_skew(artifact: Artifact) -> schema.Skew:
    """Read the table of a ``vpr bench skew``."""
    with reraise_as_artifact_error(artifact):
        return schema.Skew.model_validate_json(artifact.file("skew.json").read_bytes())


def read_storage(artifact: Artifact) -> Storage:
    """Read the table of a ``vpr bench storage``."""
    with reraise_as_artifact_error(artifact):
        return Storage.model_validate_json(artifact.file("storage.json").read_bytes())


def read_decision(artifact: Artifact) -> schema.LayerDecision:
    """Read the ``decision.json`` of a graph that was made within a recall budget."""
    with reraise_as_artifact_error(artifact):
        decision = json.loads(artifact.file("decision.json").read_text(encoding="utf-8"))
        return schema.LayerDecision(name=artifact.card.name, **decision)
