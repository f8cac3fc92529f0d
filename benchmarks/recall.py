"""``vpr bench recall``: every model on the same queries and gallery, each by the backend that runs it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.backends import BackendUnavailable, Model, default_threads, models_of
from benchmarks.baselines import colour_histogram, raw_pixels
from export.parity import parity
from vpr.artifact import load_artifact, write_artifact
from vpr.catalog import Catalog, load_catalog
from vpr.console import say
from vpr.embeddings import embed
from vpr.errors import UserError
from vpr.metrics import evaluate
from vpr.search import search

_TOP = 10


@dataclass(frozen=True)
class RecallConfig:
    """What is scored.

    Attributes:
        catalog: catalogue artifact with query and gallery pictures.
        models: artifacts.
        output: where the table is written.
        split: the scored split.
        seed: of the bootstrap.
    """

    catalog: str
    models: tuple[str, ...]
    output: str
    split: str = "test"
    seed: int = 0


@dataclass(frozen=True)
class Scored:
    """A row of the report and the embeddings behind it.

    Attributes:
        row: fields of ``report.json``.
        vectors: (n, dim) float32 of the split in order, or None if it could not run here.
        model: what was run; None for a baseline.
    """

    row: dict[str, Any]
    vectors: NDArray[np.float32] | None = None
    model: Model | None = None


def recall(config: RecallConfig) -> Path:
    """Score the models and write an artifact of kind ``report`` with ``recall.json``."""
    catalog = load_catalog(config.catalog)
    scored = score_models(catalog.select(split=config.split), config.models, config.seed)
    parents = [load_artifact(path).as_parent("model") for path in config.models]
    settings = {"models": list(config.models), "split": config.split, "seed": config.seed}
    with write_artifact(config.output, "report", settings, parents) as draft:
        draft.catalog = catalog.summary()
        rows = [one.row for one in scored]
        (draft.path / "recall.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    say(f"{config.output}: recall of {len(scored)} models")
    return Path(config.output)


def score_models(part: Catalog, paths: tuple[str, ...], seed: int) -> list[Scored]:
    """Baselines and every backend of every artifact, scored on one split.

    ``retention`` is recall@1 over that of the first teacher given; cosines and the overlap of the top ten
    are taken to the first student.
    """
    require_roles(part)
    scored = [
        Scored(_baseline(name, part, vectors, seed), vectors)
        for name, vectors in (("raw-pixels", raw_pixels(part)), ("colour-histogram", colour_histogram(part)))
    ]
    scored += [_score(model, part, seed) for path in paths for model in models_of(path)]
    teacher = next((one for one in scored if one.row["stage"] == "teacher"), None)
    student = next((one for one in scored if one.row["stage"] == "student"), None)
    for one in scored:
        if one.row["recall_at_1"] is None:
            continue
        if teacher and teacher.row["recall_at_1"]:
            one.row["retention"] = one.row["recall_at_1"] / teacher.row["recall_at_1"]
        if student and one.row["stage"] in ("student", "onnx", "engine"):
            one.row.update(_against(student, one, part))
    return scored


def require_roles(part: Catalog) -> None:
    """Refuse a split without queries or without a gallery."""
    absent = {"query", "gallery"} - set(part.roles.tolist())
    if absent:
        raise UserError(f"catalogue: this split has no {sorted(absent)[0]} pictures: choose another --split")


def score_row(part: Catalog, vectors: NDArray[np.float32], seed: int) -> dict[str, Any]:
    """The metrics of a row from the embeddings of a split."""
    query, gallery = part.roles == "query", part.roles == "gallery"
    scores = evaluate(vectors[query], part.products[query], vectors[gallery], part.products[gallery], seed)
    return {
        "recall_at_1": scores.recall_at_1,
        "recall_at_5": scores.recall_at_5,
        "recall_at_10": scores.recall_at_10,
        "map": scores.map,
        "map_at_1000": scores.map_at_1000,
        "queries": scores.queries,
        "gallery": scores.gallery,
        "ci95": list(scores.ci95),
    }


def empty_row(name: str, stage: str, backend: str | None, precision: str | None) -> dict[str, Any]:
    """A row of ``report.json`` in which nothing has been measured."""
    numbers = ("params", "size_bytes", "recall_at_1", "recall_at_5", "recall_at_10", "map", "map_at_1000")
    more = ("queries", "gallery", "ci95", "retention", "cosine_mean", "cosine_min", "top10_overlap")
    costs = ("latency_ms", "throughput", "cold_start_ms", "peak_memory_bytes")
    row: dict[str, Any] = {"name": name, "stage": stage, "backend": backend, "precision": precision}
    return {**row, **dict.fromkeys((*numbers, *more, *costs)), "notes": "peak memory: not measured"}


def _baseline(name: str, part: Catalog, vectors: NDArray[np.float32], seed: int) -> dict[str, Any]:
    scores = score_row(part, vectors, seed)
    _say_scores(name, scores)
    return {**empty_row(name, "baseline", None, None), **scores, "params": 0}


def _score(model: Model, part: Catalog, seed: int) -> Scored:
    card = model.artifact.card
    row = empty_row(card.name, model.stage, model.backend, model.precision)
    row["size_bytes"] = sum(e.size for name, e in card.files.items() if name.startswith(("model.", "engine.")))
    row["params"] = card.metrics.get("parameters")
    try:
        forward = model.open(default_threads())
    except BackendUnavailable as reason:
        say(f"  {model.name}: not scored: {reason}")
        return Scored({**row, "notes": f"not run: {reason}"}, None, model)
    if card.preprocess is None:
        raise UserError(f"{model.artifact.path}: its card has no preprocessing: make the artifact again")
    if (card.catalog or {}).get("leak"):
        row["notes"] = f"{row['notes']}; trained with a leak allowed, see its card: the recall is not honest"
        say(f"  {model.name}: its card tells of a leak: something scored was trained on")
    vectors = embed(part, card.preprocess, forward)
    scores = score_row(part, vectors, seed)
    _say_scores(model.name, scores)
    return Scored({**row, **scores}, vectors, model)


def _say_scores(name: str, scores: dict[str, Any]) -> None:
    low, high = scores["ci95"]
    say(f"  {name}: recall@1 {scores['recall_at_1']:.3f} [{low:.3f}, {high:.3f}], mAP {scores['map']:.3f}")


def _against(student: Scored, one: Scored, part: Catalog) -> dict[str, float]:
    assert student.vectors is not None
    assert one.vectors is not None
    found = parity(student.vectors, one.vectors)
    tops = [_top(part, vectors) for vectors in (student.vectors, one.vectors)]
    shared = [len(set(a) & set(b)) / len(a) for a, b in zip(*tops, strict=True)]
    return {
        "cosine_mean": found["cosine_mean"],
        "cosine_min": found["cosine_min"],
        "top10_overlap": float(np.mean(shared)),
    }


def _top(part: Catalog, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    gallery = vectors[part.roles == "gallery"]
    return search(vectors[part.roles == "query"], gallery, min(_TOP, len(gallery)))[1]
