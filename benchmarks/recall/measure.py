"""``vpr bench recall``: every model on the same queries and gallery, each by the backend that runs it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from benchmarks.config import RERANK, RecallConfig
from benchmarks.recall.baselines import colour_histogram, raw_pixels
from benchmarks.recall.extra_metrics import asymmetric, by_category, metrics_dict, reranked
from benchmarks.recall.paired_bootstrap import compare_with_reference, recall_drop, write_changed
from export.backends.registry import BackendUnavailable, Model, default_threads, models_of
from vpr.artifacts.store import Parent, config_to_json, find_up_to_date, load_artifact, write_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.embeddings import embed
from vpr.retrieval.metrics import evaluate

log = get_logger(__name__)


@dataclass(frozen=True)
class Scored:
    """A row of the report and the embeddings behind it.

    Attributes:
        row: fields of ``report.json``.
        vectors: (n, dim) float32 of the split in order, or None if it could not run here.
        model: what was run; None for a baseline.
        changed: queries with another first result than the FP32 student's, see :mod:`benchmarks.recall.paired_bootstrap`.
    """

    row: dict[str, Any]
    vectors: NDArray[np.float32] | None = None
    model: Model | None = None
    changed: list[dict[str, Any]] = field(default_factory=list)


def measure_recall(config: RecallConfig) -> Path:
    """Score the models and write an artifact of kind ``report`` with ``recall.json`` and ``changed.csv``."""
    catalog = load_catalog(config.catalog)
    parents = parents_of(config.models, catalog)
    if find_up_to_date(config.output, "report", config_to_json(config), parents, "recall.json"):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    scored = score_models(catalog.select(split=config.split), config.models, config.seed, config.rerank)
    with write_artifact(config.output, "report", config_to_json(config), parents) as draft:
        draft.catalog = catalog.summary()
        rows = [one.row for one in scored]
        (draft.path / "recall.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        write_changed(draft.path / "changed.csv", [line for one in scored for line in one.changed])
    log.info(f"{config.output}: recall of {len(scored)} models")
    return Path(config.output)


def parents_of(models: tuple[str, ...], catalog: Catalog) -> list[Parent]:
    """What a report is made from.

    Raises:
        UserError: no models, or two of one name, whose rows could not be told apart.
    """
    if not models:
        raise UserError("models: none given: name at least one artifact")
    parents = [load_artifact(path).as_parent("model") for path in models]
    name, times = Counter(parent.name for parent in parents).most_common(1)[0]
    if times > 1:
        raise UserError(f"models: {times} artifacts are named '{name}': name each once, in folders of their own names")
    return parents + ([catalog.artifact.as_parent("catalog")] if catalog.artifact else [])


def score_models(part: Catalog, paths: tuple[str, ...], seed: int, rerank: RerankConfig = RERANK) -> list[Scored]:
    """Baselines and every backend of every artifact, scored on one split.

    ``retention`` is recall@1 over that of the first teacher given, whose gallery is the one of ``asymmetric``;
    differences are taken to the first student that is no assistant of another one given.
    """
    require_roles(part)
    scored = [
        Scored(_baseline(name, part, vectors, seed), vectors)
        for name, vectors in (("raw-pixels", raw_pixels(part)), ("colour-histogram", colour_histogram(part)))
    ]
    scored += [_score(model, part, seed, rerank) for path in paths for model in models_of(path)]
    teacher = next((one for one in scored if one.row["stage"] == "teacher"), None)
    student = _reference(scored)
    for one in scored:
        if one.vectors is None:
            continue
        if teacher and teacher.row["recall_at_1"]:
            one.row["retention"] = one.row["recall_at_1"] / teacher.row["recall_at_1"]
        if teacher and teacher.vectors is not None and one.row["stage"] not in ("baseline", "teacher"):
            _add_asymmetric(one, part, teacher.vectors, seed)
        if student:
            _add_differences(one, part, student, seed)
    return scored


def require_roles(part: Catalog) -> None:
    """Refuse a split without queries or without a gallery."""
    absent = {"query", "gallery"} - set(part.roles.tolist())
    if absent:
        raise UserError(f"catalogue: this split has no {sorted(absent)[0]} images: choose another --split")


def score_row(part: Catalog, vectors: NDArray[np.float32], seed: int) -> dict[str, Any]:
    """The metrics of a row from the embeddings of a split."""
    query, gallery = part.roles == "query", part.roles == "gallery"
    scores = evaluate(vectors[query], part.products[query], vectors[gallery], part.products[gallery], seed)
    return {
        **metrics_dict(scores),
        "queries": scores.queries,
        "gallery": scores.gallery,
        "hits": "".join("1" if scores.hits[place] else "0" for place in _by_name(part)),
        "by_category": by_category(part, scores.hits, seed),
    }


def _by_name(part: Catalog) -> list[int]:
    """The queries by image and box: an order that two catalogues of the same rows share."""
    queries = part.table.filter(pc.equal(part.table["role"], "query"))
    keys = list(zip(queries["image"].to_pylist(), map(str, queries["box"].to_pylist()), strict=True))
    return sorted(range(len(keys)), key=lambda place: keys[place])


def empty_row(name: str, stage: str, backend: str | None, precision: str | None) -> dict[str, Any]:
    """A row of ``report.json`` in which nothing has been measured."""
    numbers = ("params", "size_bytes", "recall_at_1", "recall_at_5", "recall_at_10", "map", "map_at_1000")
    more = ("queries", "gallery", "ci95", "hits", "by_category", "reranked", "asymmetric", "retention")
    differences = ("recall_drop", "recall_drop_ci95", "first_changed", "cosine_mean", "cosine_min", "top10_overlap")
    costs = ("latency_ms", "throughput", "cold_start_ms", "peak_memory_bytes")
    row: dict[str, Any] = {"name": name, "stage": stage, "backend": backend, "precision": precision, "reference": False}
    return {**row, **dict.fromkeys((*numbers, *more, *differences, *costs)), "notes": ""}


def add_note(row: dict[str, Any], note: str) -> None:
    """Say in ``notes`` why something is None, after what stands there already."""
    row["notes"] = "; ".join(part for part in (row["notes"], note) if part)


def _baseline(name: str, part: Catalog, vectors: NDArray[np.float32], seed: int) -> dict[str, Any]:
    scores = score_row(part, vectors, seed)
    _say_scores(name, scores)
    return {**empty_row(name, "baseline", None, None), **scores, "params": 0}


def _score(model: Model, part: Catalog, seed: int, rerank: RerankConfig) -> Scored:
    card = model.artifact.card
    row = empty_row(card.name, model.stage, model.backend, model.precision)
    row["size_bytes"] = sum(e.size for name, e in card.files.items() if name.startswith(("model.", "engine.")))
    row["params"] = card.metrics.get("parameters")
    try:
        forward = model.open(default_threads())
    except BackendUnavailable as reason:
        log.info(f"  {model.name}: not scored: {reason}")
        return Scored({**row, "notes": f"not run: {reason}"}, None, model)
    if card.preprocess is None:
        raise UserError(f"{model.artifact.path}: its card has no preprocessing: make the artifact again")
    if (card.catalog or {}).get("leak"):
        add_note(row, "trained with a leak allowed, see its card: the recall is not honest")
        log.info(f"  {model.name}: its card tells of a leak: something scored was trained on")
    vectors = embed(part, card.preprocess, forward)
    scores = score_row(part, vectors, seed)
    _say_scores(model.name, scores)
    return Scored({**row, **scores, "reranked": reranked(part, vectors, rerank, seed)}, vectors, model)


def _say_scores(name: str, scores: dict[str, Any]) -> None:
    low, high = scores["ci95"]
    log.info(f"  {name}: recall@1 {scores['recall_at_1']:.3f} [{low:.3f}, {high:.3f}], mAP {scores['map']:.3f}")


def _reference(scored: list[Scored]) -> Scored | None:
    """The FP32 student: the first that is no assistant of another one."""
    students = [one for one in scored if one.row["stage"] == "student" and one.vectors is not None]
    cards = [one.model.artifact for one in students if one.model]
    assistants = {parent.sha256 for one in cards for parent in one.card.parents if parent.role == "assistant"}
    return next((one for one in students if one.model and one.model.artifact.sha256 not in assistants), None)


def _add_asymmetric(one: Scored, part: Catalog, teacher: NDArray[np.float32], seed: int) -> None:
    assert one.vectors is not None
    one.row["asymmetric"] = asymmetric(part, one.vectors, teacher, seed)
    if one.row["asymmetric"] is None:
        add_note(
            one.row,
            f"search in the teacher's gallery: it has {teacher.shape[1]} dimensions, these queries "
            f"{one.vectors.shape[1]}",
        )


def _add_differences(one: Scored, part: Catalog, student: Scored, seed: int) -> None:
    assert one.vectors is not None
    assert student.vectors is not None
    one.row["reference"] = one is student
    one.row.update(recall_drop(student.row["hits"], one.row["hits"], seed))
    if one.row["stage"] == "baseline":
        return
    found, changed = compare_with_reference(part, student.vectors, one.vectors)
    one.row.update(found)
    named = {"model": one.row["name"], "backend": one.row["backend"]}
    one.changed.extend({**named, **line} for line in changed)
