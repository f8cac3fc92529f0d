"""``vpr bench recall``: recall of every model on the same queries and gallery, on each backend that runs it here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from benchmarks.config import RERANK, RecallConfig
from benchmarks.models import load_models
from benchmarks.recall.baselines import colour_histogram, raw_pixels
from benchmarks.recall.extra_metrics import score_asymmetric, score_categories, score_reranked
from benchmarks.recall.paired_drop import ChangedQuery, compare_with_reference, compute_recall_drop, write_changed
from benchmarks.recall.queries import ScoredPart, choose_queries
from benchmarks.recall.seen_marks import add_seen, log_seen
from benchmarks.report.schema import LEAK_NOTE, Row
from export.backends.base import RunFailed
from export.backends.registry import BackendUnavailable, Model, default_threads, models_of
from vpr.artifacts.names import with_distinct_names
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact
from vpr.artifacts.writer import config_to_json
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.pixels import KeptPixels
from vpr.data.seen import count_seen, hash_catalog, read_seen
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.cut import check_dimensions, cut_vectors
from vpr.retrieval.embeddings import embed
from vpr.retrieval.intervals import TOO_FEW
from vpr.retrieval.metrics import evaluate

log = get_logger(__name__)

_BASELINES = {"raw-pixels": raw_pixels, "colour-histogram": colour_histogram}


@dataclass(frozen=True)
class ScoredModel:
    """A row of the report and the embeddings that it was computed from."""

    row: Row  # row of ``report.json``; costs are filled in later
    # (n, dim) float32 of the split in order, or None if the model cannot run here
    vectors: NDArray[np.float32] | None = None
    model: Model | None = None  # the model and its backend; None for a baseline
    # queries whose first result differs from the FP32 student's
    changed: list[ChangedQuery] = field(default_factory=list)


def measure_recall(config: RecallConfig) -> Path:
    """Score the models and write an artifact of kind ``report`` with ``recall.json`` and ``changed.csv``."""
    catalog = load_catalog(config.catalog)
    artifacts = load_models(config.models)
    parents = [artifact.as_parent("model") for artifact in artifacts] + catalog.as_parents()
    stage = Stage(config.output, "report", config_to_json(config), parents, "recall.json")
    if stage.find():
        return stage.path
    part = choose_queries(catalog.select(split=config.split), config.leave_one_out, config.skip_unmatched)
    for artifact in artifacts if config.dimensions else ():
        if artifact.card.kind != "teacher":
            check_dimensions(artifact, config.dimensions)
    named = with_distinct_names(artifacts)
    scored = score_models(part, named, config.seed, config.rerank, dimensions=config.dimensions)
    with stage.write() as draft:
        draft.catalog = catalog.summary()
        rows = [model.row.to_json() for model in scored]
        (draft.path / "recall.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        write_changed(draft.path / "changed.csv", [query for model in scored for query in model.changed])
    log.info(f"{config.output}: recall of {len(scored)} models")
    return stage.path


def score_models(
    part: ScoredPart,
    artifacts: Sequence[Artifact],
    seed: int,
    rerank: RerankConfig = RERANK,
    rivals: Sequence[Artifact] = (),
    dimensions: int = 0,
    kept: KeptPixels | None = None,
) -> list[ScoredModel]:
    """Score the baselines, and every artifact and rival on each of its backends, on one split.

    Embeddings are cut to their first ``dimensions``, unless that is 0 or the model is a teacher. ``kept`` keeps the
    pixels for a later measurement.
    ``retention`` is recall@1 divided by that of the first teacher, whose gallery is the one of ``asymmetric``.
    Differences are taken to the first student that is no assistant of another student in the list.
    """
    rerank = rerank if part.own is None else RerankConfig()
    kept = kept or KeptPixels()
    scored = [_score_baseline(name, part.embed(embed_images), part, seed) for name, embed_images in _BASELINES.items()]
    hashes = hash_catalog(part.catalog)
    for artifact in (*artifacts, *rivals):
        seen = count_seen(read_seen(artifact), hashes)
        log_seen(artifact.card.name, seen)
        for loaded in models_of(artifact):
            wanted = 0 if loaded.stage == "teacher" else dimensions
            scored.append(_score(loaded, part, seed, rerank, wanted, kept))
            add_seen(scored[-1].row, seen)
            scored[-1].row.rival = artifact in rivals
    teacher = next((model for model in scored if model.row.stage == "teacher" and not model.row.rival), None)
    student = _reference(scored)
    for model in scored:
        if teacher and teacher.row.recall_at_1 and model.row.recall_at_1 is not None:
            model.row.retention = model.row.recall_at_1 / teacher.row.recall_at_1
        if teacher and teacher.vectors is not None and model.row.stage not in ("baseline", "teacher"):
            _add_asymmetric(model, part, teacher.vectors, seed)
        if student:
            _add_differences(model, part, student, seed)
    return scored


def add_scores(row: Row, scored: ScoredPart, vectors: NDArray[np.float32], seed: int) -> None:
    """Fill in the retrieval metrics of a row from the embeddings of a split."""
    part = scored.catalog
    query, gallery = part.roles == "query", part.roles == "gallery"
    products = part.products
    scores = evaluate(vectors[query], products[query], vectors[gallery], products[gallery], seed, scored.own)
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "map", "map_at_1000", "ci95")
    for name in (*names, "queries", "query_products", "gallery"):
        setattr(row, name, getattr(scores, name))
    row.hits = hits_by_product(part, scores.hits)
    row.by_category = score_categories(part, scores.hits, seed)
    if scored.skipped:
        row.skipped_queries = scored.skipped
    for note in scored.notes:
        row.add_note(note)
    interval = f"[{scores.ci95[0]:.3f}, {scores.ci95[1]:.3f}]" if scores.ci95 else f"({TOO_FEW})"
    name = f"{row.name} ({row.backend})" if row.backend else row.name
    log.info(f"  {name:<32} recall@1 {scores.recall_at_1:.3f} {interval}  mAP {scores.map:.3f}")


def hits_by_product(part: Catalog, hits: NDArray[np.bool_]) -> dict[str, str]:
    """Return the (queries,) hits of a split, in its order, as one digit per query, by product, image and box."""
    products, digits = part.products[part.roles == "query"].tolist(), ["01"[hit] for hit in hits.tolist()]
    grouped: dict[str, str] = {}
    for index in sorted(_order_by_name(part), key=lambda index: products[index]):
        grouped[products[index]] = grouped.get(products[index], "") + digits[index]
    return grouped


def _order_by_name(part: Catalog) -> list[int]:
    """Return the queries sorted by image and box: the same order for catalogues of the same rows."""
    queries = part.table.filter(pc.equal(part.table["role"], "query"))
    keys = list(zip(queries["image"].to_pylist(), map(str, queries["box"].to_pylist()), strict=True))
    return sorted(range(len(keys)), key=lambda index: keys[index])


def _score_baseline(name: str, vectors: NDArray[np.float32], part: ScoredPart, seed: int) -> ScoredModel:
    row = Row.empty(name, "baseline", None, None)
    row.params = 0
    add_scores(row, part, vectors, seed)
    return ScoredModel(row, vectors)


def _score(
    model: Model, part: ScoredPart, seed: int, rerank: RerankConfig, dimensions: int, kept: KeptPixels | None = None
) -> ScoredModel:
    card = model.artifact.card
    row = Row.empty(card.name, model.stage, model.backend, model.precision)
    row.size_bytes = sum(e.size for name, e in card.files.items() if name.startswith(("model.", "engine.")))
    row.params = card.metrics.get("parameters")
    row.licences = card.licences
    try:
        forward = model.open(default_threads())
        forward(model.random_input(1))  # some backends reject a graph at the first call only
    except (BackendUnavailable, RunFailed) as reason:
        log.info(f"  {model.name:<32} not run: {reason}")
        row.add_note(f"not run: {reason}")
        return ScoredModel(row, None, model)
    if (card.catalog or {}).get("leak"):
        row.add_note(f"{LEAK_NOTE}, see its card: recall is overestimated")
        log.warning(f"{model.name}: {LEAK_NOTE}, see its card. Its recall is overestimated.")
    full = part.embed(lambda images: embed(images, model.preprocess, forward, kept=kept))
    vectors = cut_vectors(full, dimensions)
    if dimensions:
        row.add_note(f"the first {dimensions} dimensions of its embedding")
    add_scores(row, part, vectors, seed)
    row.reranked = score_reranked(part.catalog, vectors, rerank, seed)
    return ScoredModel(row, vectors, model)


def _reference(scored: list[ScoredModel]) -> ScoredModel | None:
    """Return the FP32 student: the first student that is no assistant of another one."""
    students = [(scores, scores.model.artifact) for scores in scored if scores.model and scores.row.stage == "student"]
    students = [(scores, artifact) for scores, artifact in students if not scores.row.rival]
    students = [(scores, artifact) for scores, artifact in students if scores.vectors is not None]
    assistants = {parent.sha256 for _, artifact in students for parent in artifact.parents("assistant")}
    return next((scores for scores, artifact in students if artifact.sha256 not in assistants), None)


def _add_asymmetric(model: ScoredModel, part: ScoredPart, teacher: NDArray[np.float32], seed: int) -> None:
    if model.vectors is None:
        return
    embedding = model.model.artifact.card.embedding if model.model else None
    if embedding is not None and embedding.nested:
        model.row.add_note("no search in the teacher's gallery: its nested dimensions are in another order")
        return
    model.row.asymmetric = score_asymmetric(part.catalog, model.vectors, teacher, seed, part.own)
    if model.row.asymmetric is None:
        dims = f"it has {teacher.shape[1]} dimensions, the queries have {model.vectors.shape[1]}"
        model.row.add_note(f"no search in the teacher's gallery: {dims}")


def _add_differences(model: ScoredModel, part: ScoredPart, student: ScoredModel, seed: int) -> None:
    row = model.row
    if model.vectors is None or student.vectors is None or row.hits is None or student.row.hits is None:
        return
    row.reference = model is student
    drop = compute_recall_drop(student.row.hits, row.hits, seed)
    row.recall_drop = drop.mean
    if not row.reference:  # its drop to itself is 0 by definition
        row.recall_drop_ci95, row.recall_drop_upper_bound = drop.ci95, drop.upper_bound
    if row.backend is None:
        return
    vectors = (student.vectors, model.vectors)
    difference = compare_with_reference(part.catalog, *vectors, row.name, row.backend, part.own)
    row.cosine_mean, row.cosine_min = difference.cosine_mean, difference.cosine_min
    row.top10_overlap, row.first_changed = difference.top10_overlap, difference.first_changed
    model.changed.extend(difference.changed)
