"""``vpr bench skew``: recall of queries that other pipelines preprocess, in a gallery by the card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.config import SkewConfig
from benchmarks.recall.measure import hits_by_product
from benchmarks.recall.paired_drop import compute_recall_drop
from benchmarks.recall.queries import ScoredPart, choose_queries
from benchmarks.recall.seen_marks import log_seen, seen_notes, to_counts
from benchmarks.report.schema import Skew, SkewRow
from benchmarks.report.tables import SKEW_HEADINGS, skew_cells
from export.backends.registry import MODEL_KINDS, BackendUnavailable, Model, default_threads, models_of
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError, nearest_names, printable
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.seen import count_seen, hash_catalog, read_seen
from vpr.imaging.decode import read_image
from vpr.imaging.pipelines import Pipeline, client_pipelines, describe, to_model_input
from vpr.imaging.preprocess import ModelInput, Preprocess
from vpr.retrieval.embeddings import Forward, embed, l2_normalize
from vpr.retrieval.intervals import adjust_p_values
from vpr.retrieval.metrics import evaluate

log = get_logger(__name__)

_BATCH = 64


def measure_skew(config: SkewConfig) -> Path:
    """Score every pipeline and write an artifact of kind ``report`` with ``skew.json`` and ``skew.svg``.

    Raises:
        UserError: A pipeline is unknown, the model cannot run here, or the split has nothing to score.
    """
    catalog, artifact = load_catalog(config.catalog), load_artifact(config.model, MODEL_KINDS)
    if artifact.card.preprocess is None:
        raise UserError(f"{artifact.path}: the card has no preprocessing. Make the artifact again.")
    pipelines = choose_pipelines(config.pipelines, artifact.card.preprocess)
    parents = [artifact.as_parent("model"), *catalog.as_parents()]
    stage = Stage(config.output, "report", config_to_json(config), parents, "skew.json")
    if stage.find():
        return stage.path
    part = choose_queries(catalog.select(split=config.split), config.leave_one_out, config.skip_unmatched)
    seen = count_seen(read_seen(artifact), hash_catalog(part.catalog))
    log_seen(artifact.card.name, seen)
    model, forward = _open(artifact)
    rows = score_pipelines(part, model.preprocess, forward, pipelines, config.seed)
    from benchmarks.report.charts import draw_skew  # loads matplotlib

    queries = part.catalog.products[part.catalog.roles == "query"]
    skew = Skew(
        name=stage.path.name,
        model=model.name,
        split=config.split,
        queries=len(queries),
        products=len(np.unique(queries)),
        skipped=part.skipped,
        seen=to_counts(seen),
        rows=rows,
    )
    print_rows(skew)
    with stage.write() as draft:
        draft.catalog, draft.metrics = catalog.summary(), {"seen": asdict(seen)}
        (draft.path / "skew.json").write_text(json.dumps(skew.to_json(), indent=1), encoding="utf-8")
        (draft.path / "skew.svg").write_text(draw_skew(skew), encoding="utf-8")
    changed = sum(row.is_significant for row in rows)
    log.info(f"{config.output}: {len(rows)} pipelines, recall@1 of {changed} differs from the card's (*)")
    return stage.path


def choose_pipelines(names: tuple[str, ...], preprocess: Preprocess) -> dict[str, Pipeline]:
    """Return the card's pipeline and those with these names, or all; :class:`UserError` for an unknown name."""
    known = client_pipelines(preprocess)
    for name in names:
        if name not in known:
            nearest = nearest_names(name, known)
            raise UserError(f"pipelines: unknown pipeline '{name}' for this model. The nearest are {nearest}.")
    return {name: pipeline for name, pipeline in known.items() if not names or name in names or name == "card"}


def score_pipelines(
    part: ScoredPart, preprocess: Preprocess, forward: Forward, pipelines: Mapping[str, Pipeline], seed: int
) -> list[SkewRow]:
    """Score the queries of a split by each pipeline in one gallery; ``pipelines`` start with the card's."""
    catalog = part.catalog
    queries, gallery = catalog.select(role="query"), catalog.select(role="gallery")
    gallery_vectors = embed(gallery, preprocess, forward)
    embedder = _QueryEmbedder(queries, preprocess, forward)
    reference, _ = embedder.embed(pipelines["card"])
    expected: dict[str, str] = {}
    rows = []
    for name, pipeline in pipelines.items():
        vectors, changed = embedder.embed(pipeline)
        scores = evaluate(vectors, queries.products, gallery_vectors, gallery.products, seed, part.own)
        hits = hits_by_product(catalog, scores.hits)
        expected = expected or hits
        drop = compute_recall_drop(expected, hits, seed)
        changes = pipeline.departures or pipeline.changes
        row = SkewRow(
            pipeline=name,
            description="; ".join(describe(*change) for change in changes.items()) or "preprocessing of the card",
            agrees=not pipeline.departures,
            inputs_changed=changed,
            cosine_mean=float((reference.astype(np.float64) * vectors).sum(axis=1).mean()),
            recall_at_1=scores.recall_at_1,
            ci95=scores.ci95,
            drop=drop.mean,
            drop_ci95=drop.ci95 if name != "card" else None,
            p_value=drop.p_value if name != "card" else None,
        )
        log.info(f"  {name:<28} recall@1 {row.recall_at_1:.3f}  drop {row.drop:+.3f}")
        rows.append(row)
    return _adjust(rows)


def print_rows(skew: Skew) -> None:
    """Print a table and what the model has seen; a star marks a change of recall@1 beyond noise."""
    table = Table(*map(escape, SKEW_HEADINGS), box=None)
    for row in skew.rows:
        table.add_row(*map(escape, skew_cells(row)))
    console = Console(width=max(100, Console().width))
    console.print(table)
    for note in seen_notes(skew.seen):
        console.print(escape(printable(note)), soft_wrap=True)


class _QueryEmbedder:
    """Embeds queries by a pipeline; an input that the card's pipeline gave is not embedded again."""

    def __init__(self, queries: Catalog, preprocess: Preprocess, forward: Forward) -> None:
        self._queries, self._preprocess, self._forward = queries, preprocess, forward
        self._card: list[tuple[bytes, NDArray[np.float32]]] = []  # checksum of the input and vector of each query

    def embed(self, pipeline: Pipeline) -> tuple[NDArray[np.float32], float]:
        """Return the (queries, dim) float32 vectors, and the share of queries with another input than the first's."""
        vectors, changed = [], 0
        with ThreadPoolExecutor(default_threads()) as pool:
            for start in range(0, len(self._queries), _BATCH):
                rows = range(start, min(start + _BATCH, len(self._queries)))
                inputs = list(pool.map(lambda row: self._read(row, pipeline), rows))
                keys = [hashlib.sha256(values.tobytes()).digest() for values in inputs]
                known = {row: self._card[row][1] for row in rows if self._is_same(row, keys[row - start])}
                missing = [row for row in rows if row not in known]
                if missing:
                    embedded = self._forward(self._model_input([inputs[row - start] for row in missing]))
                    known |= dict(zip(missing, l2_normalize(embedded), strict=True))
                changed += len(missing)
                vectors += [(keys[row - start], known[row]) for row in rows]
        self._card = self._card or vectors
        return np.stack([vector for _, vector in vectors]), changed / len(self._queries)

    def _model_input(self, values: list[NDArray[np.float32]]) -> ModelInput:
        return to_model_input(np.stack(values), self._preprocess)

    def _is_same(self, row: int, key: bytes) -> bool:
        return bool(self._card) and self._card[row][0] == key

    def _read(self, row: int, pipeline: Pipeline) -> NDArray[np.float32]:
        path = self._queries.path(row)
        return pipeline.apply(read_image(path), path, self._preprocess, self._queries.box(row))


def _open(artifact: Artifact) -> tuple[Model, Forward]:
    """Load a model on its first backend that runs here."""
    reasons = []
    for model in models_of(artifact):
        try:
            return model, model.open(default_threads())
        except BackendUnavailable as reason:
            reasons.append(f"{model.name}: {reason}")
    raise UserError(f"{artifact.path}: no backend can run it here ({'; '.join(reasons)}). Run `vpr doctor`.")


def _adjust(rows: list[SkewRow]) -> list[SkewRow]:
    """Adjust the p-values for the number of pipelines."""
    tested = [row for row in rows if row.p_value is not None]
    p_values = adjust_p_values([row.p_value for row in tested if row.p_value is not None])
    adjusted = dict(zip((row.pipeline for row in tested), p_values, strict=True))
    return [row.model_copy(update={"p_value": adjusted.get(row.pipeline)}) for row in rows]
