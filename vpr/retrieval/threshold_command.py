"""``vpr gallery threshold``: the score below which a search answers "no match", confirmed on absent products."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.card import Parent
from vpr.artifacts.names import tell_apart
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import CheckFailed, UserError
from vpr.common.log import get_logger
from vpr.data.seen import count_seen, hash_products, read_seen
from vpr.retrieval.config import ScoreName, ThresholdConfig
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.intervals import Ids
from vpr.retrieval.open_set import (
    BestProducts,
    Division,
    Probability,
    Scores,
    divide_products,
    find_best_products,
    fit_probability,
    probability_from_json,
    probability_to_json,
    score_queries,
)
from vpr.retrieval.self_search import SearchRows, find_search_rows, self_search_values
from vpr.retrieval.threshold import ScoredQueries, confirm_threshold, needed_products, smallest_confirmable

log = get_logger(__name__)

FILE = "threshold.json"
_CURVE_POINTS = 200
_SCORES: tuple[ScoreName, ...] = get_args(ScoreName)


@dataclass(frozen=True)
class Queries:
    """Queries of a split, and their best images in a gallery without the absent products.

    Attributes:
        products: (queries,) product ids.
        best: Best images.
        right: (queries,) bool, whether the best image is of the query's product.
    """

    products: Ids
    best: BestProducts
    right: NDArray[np.bool_]

    def fit(self, division: Division) -> Probability:
        """Fit the probability on the products drawn for it."""
        used = np.isin(self.products, np.concatenate([division.present_fit, division.absent_fit]))
        return fit_probability(self.best.select(used), self.right[used], self.products[used])

    def confirming(self, scores: Scores, division: Division) -> ScoredQueries:
        """Return the scored queries of the products that confirm."""
        used = np.isin(self.products, np.concatenate([division.present, division.absent]))
        is_absent = np.isin(self.products[used], division.absent)
        return ScoredQueries(scores[used], self.products[used], is_absent, self.right[used])


@dataclass(frozen=True)
class StoredThreshold:
    """Confirmed threshold of an artifact.

    Attributes:
        score: Score that is compared.
        value: Queries with this score or more are answered.
        probability: Probability that the best image is of the query's product.
        gallery_products: Number of products in the gallery that it was confirmed with.
        max_false_accept: Confirmed bound on the rate of false accepts; None if an older gallery did not store it.
        confidence: Confidence of the bound; None if an older gallery did not store it.
    """

    score: ScoreName
    value: float
    probability: Probability
    gallery_products: int
    max_false_accept: float | None = None
    confidence: float | None = None

    def accepts(self, best: BestProducts) -> NDArray[np.bool_]:
        """Return for each query, (queries,) bool, whether it has a match."""
        return score_queries(self.score, best, self.probability) >= self.value


def find_threshold(config: ThresholdConfig) -> Path:
    """Write ``threshold.json``, ``curves.csv`` and ``products.csv``.

    Raises:
        UserError: The embeddings lack queries or gallery images, or those to compare are of other images.
        CheckFailed: The products are too few to confirm a threshold. The artifact is still written, with its curves.
    """
    embeddings = load_embeddings(config.embeddings)
    others = [load_embeddings(path) for path in config.compare]
    parents = [embeddings.artifact.as_parent("embeddings"), embeddings.model]
    parents += [other.artifact.as_parent("compare") for other in others]
    rows = _find_rows(config, embeddings)
    values = {**config_to_json(config), "compare": [other.artifact.card.name for other in others]}
    values |= self_search_values(rows)
    stage = Stage(config.output, "threshold", values, parents, FILE)
    if artifact := stage.find():
        result = json.loads(artifact.file(FILE).read_text(encoding="utf-8"))
        return _finish(stage.path, result)
    result, queries, division, probability = _measure(config, embeddings, others, rows)
    with stage.write() as draft:
        (draft.path / FILE).write_text(json.dumps(result, indent=1), encoding="utf-8")
        _write_csv(draft.path / "curves.csv", _CURVE_COLUMNS, _curves(queries, division, probability))
        _write_csv(draft.path / "products.csv", ("product", "gallery", "use"), _draws(division))
        draft.embedding, draft.preprocess = embeddings.artifact.card.embedding, embeddings.artifact.card.preprocess
        draft.metrics = {key: result[key] for key in ("statement", "seen", "gallery_products", "absent_products")}
    _log(result, config)
    return _finish(stage.path, result)


def load_threshold(path: str, model: Parent, dim: int) -> StoredThreshold:
    """Load a confirmed threshold of a model's embeddings with ``dim`` dimensions.

    Raises:
        UserError: The artifact is broken, of another model or another number of dimensions, or its products confirmed
            no threshold.
    """
    artifact = load_artifact(path, "threshold")
    models = artifact.parents("model")
    if [parent.sha256 for parent in models] != [model.sha256]:
        names = tell_apart(models[0], model) if len(models) == 1 else ("several", f"'{model.name}'")
        problem = f"the threshold is of model {names[0]}, the embeddings are of {names[1]}"
        raise UserError(f"threshold: {path}: {problem}. Run `vpr gallery threshold` with this model's embeddings.")
    if artifact.card.embedding is not None and artifact.card.embedding.dim != dim:
        problem = f"the threshold is of {artifact.card.embedding.dim} dimensions, the embeddings have {dim}"
        raise UserError(f"threshold: {path}: {problem}. Run `vpr gallery threshold` with these embeddings.")
    with reraise_as_artifact_error(artifact):
        values = json.loads(artifact.file(FILE).read_text(encoding="utf-8"))
        statement, value = str(values["statement"]), values["threshold"]
        stored = None if value is None else threshold_from_json({**values, "value": value})
    if stored is None:
        raise UserError(f"threshold: {path}: {statement}")
    return stored


def threshold_to_json(threshold: StoredThreshold) -> dict[str, Any]:
    """Return a threshold as JSON; a bound that is unknown is left out."""
    values = {"score": threshold.score, "value": threshold.value, "gallery_products": threshold.gallery_products}
    bound = {"max_false_accept": threshold.max_false_accept, "confidence": threshold.confidence}
    values |= {key: value for key, value in bound.items() if value is not None}
    return {**values, "probability": probability_to_json(threshold.probability)}


def threshold_from_json(values: Mapping[str, Any]) -> StoredThreshold:
    """Return the threshold that :func:`threshold_to_json` stored.

    Raises:
        KeyError: A value is missing.
        ValueError: The score is unknown, or a number is not finite.
    """
    score, value = values["score"], float(values["value"])
    bound = [None if values.get(key) is None else float(values[key]) for key in ("max_false_accept", "confidence")]
    if score not in _SCORES or not all(np.isfinite(number) for number in (value, *filter(None, bound))):
        raise ValueError("unknown score or threshold")
    probability = probability_from_json(values["probability"])
    return StoredThreshold(score, value, probability, int(values["gallery_products"]), *bound)


def _measure(
    config: ThresholdConfig, embeddings: Embeddings, others: list[Embeddings], rows: SearchRows
) -> tuple[dict[str, Any], Queries, Division, Probability]:
    """Draw the products, search, and return all results as JSON with what they come from."""
    for path, other in zip(config.compare, others, strict=True):
        if not all(np.array_equal(getattr(other, key), getattr(embeddings, key)) for key in ("images", "products")):
            raise UserError(f"compare: {path} has other images than {config.embeddings}. Embed the same catalogue.")
    query_rows, names = rows.queries, embeddings.products
    division = divide_products(names[query_rows], names[rows.gallery], config.absent, config.fit, config.seed)
    rows = rows.keep(~np.isin(names[rows.gallery], division.all_absent))
    gallery_rows = rows.gallery
    queries = _search(embeddings, rows)
    probability = queries.fit(division)
    seen = count_seen(read_seen(embeddings.artifact), hash_products(np.unique(names[query_rows]).tolist()))
    if seen.learned:
        log.warning(f"{embeddings.model.name}: {seen.learned}. The bound does not hold for new products.")
    result: dict[str, Any] = {
        "score": config.score,
        "threshold": None,
        "max_false_accept": config.max_false_accept,
        "confidence": config.confidence,
        "absent_products": len(division.absent),
        "present_products": len(division.present),
        "gallery_products": len(np.unique(names[gallery_rows])),
        "gallery_images": len(gallery_rows),
        "needed_products": needed_products(config.max_false_accept, config.confidence),
        "probability": probability_to_json(probability),
        "seen": asdict(seen),
    }
    result["scores"] = [_confirm(name, queries, division, probability, config) for name in _SCORES]
    chosen = next(row for row in result["scores"] if row["score"] == config.score)
    result["threshold"] = chosen["threshold"]
    result["statement"] = _statement(result, chosen)
    result["compare"] = [
        {
            "model": other.model.name,
            **_compare(_search(other, rows), chosen["threshold"], division, probability, config),
        }
        for other in others
    ]
    return result, queries, division, probability


def _find_rows(config: ThresholdConfig, embeddings: Embeddings) -> SearchRows:
    """Return the rows of the queries of the split, and of all gallery images."""
    rows = embeddings.read_rows()
    splits = np.array([split or "" for split in rows.table["split"].to_pylist()], dtype=np.str_)
    available, names = set(splits[rows.roles == "query"].tolist()), set(splits.tolist())
    if not (config.split in available if config.split else available):
        problem = f"has no queries in split '{config.split}', but in: {', '.join(sorted(available)) or 'none'}"
        raise UserError(f"split: {config.embeddings} {problem}.")
    if "gallery" not in rows.roles:
        raise UserError(f"embeddings: {config.embeddings} has no gallery images. Embed a catalogue with both roles.")
    return find_search_rows(rows, {config.split} if config.split else names, names)


def _search(embeddings: Embeddings, rows: SearchRows) -> Queries:
    products, of_gallery = embeddings.products[rows.queries], embeddings.products[rows.gallery]
    vectors, gallery = embeddings.vectors[rows.queries], embeddings.vectors[rows.gallery]
    best = find_best_products(vectors, gallery, of_gallery, rows.own)
    return Queries(products, best, of_gallery[best.rows] == products)


def _confirm(
    score: ScoreName, queries: Queries, division: Division, probability: Probability, config: ThresholdConfig
) -> dict[str, Any]:
    """Return the threshold of a score and its error rates, all None if no threshold is confirmed."""
    scored = queries.confirming(score_queries(score, queries.best, probability), division)
    absent = scored.is_absent
    threshold = confirm_threshold(
        scored.scores[absent], scored.products[absent], config.max_false_accept, config.confidence
    )
    rates = dict.fromkeys(("false_accept", "false_reject", "false_reject_interval", "wrong"))
    if threshold is not None:
        rates = asdict(scored.error_rates(threshold, config.seed))
    return {"score": score, "threshold": threshold, **rates}


def _compare(
    queries: Queries, threshold: float | None, division: Division, probability: Probability, config: ThresholdConfig
) -> dict[str, Any]:
    """Return the threshold of other embeddings, how far it is away, and the errors of the first one's threshold.

    The probability is that of the first embeddings, so the thresholds are comparable.
    """
    row = _confirm(config.score, queries, division, probability, config)
    own = row["threshold"]
    if threshold is None or own is None:
        return {**row, "moved": None, "kept": None}
    scored = queries.confirming(score_queries(config.score, queries.best, probability), division)
    return {**row, "moved": own - threshold, "kept": asdict(scored.error_rates(threshold, config.seed))}


def _statement(result: dict[str, Any], chosen: dict[str, Any]) -> str:
    """State the bound, or what is missing to confirm one."""
    limit, count = result["max_false_accept"], result["absent_products"]
    level = f"with {100 * result['confidence']:g} % confidence"
    if chosen["threshold"] is None:
        smallest = smallest_confirmable(count, result["confidence"])
        return (
            f"no threshold confirmable: {count} absent products can confirm false accepts of {smallest:.3g} at best "
            f"{level}, and {limit:g} needs {result['needed_products']}. Add products, or raise --max-false-accept."
        )
    rejects = f"false rejects {chosen['false_reject']:.3f}"
    if interval := chosen["false_reject_interval"]:
        rejects += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"confirmed: false accepts at most {limit:g} {level} ({count} absent products); {rejects}"


_CURVE_COLUMNS = ("score", "threshold", "false_accept", "false_reject", "wrong")


def _curves(queries: Queries, division: Division, probability: Probability) -> Iterable[tuple[object, ...]]:
    for name in _SCORES:
        scored = queries.confirming(score_queries(name, queries.best, probability), division)
        for threshold, *errors in scored.curve(_CURVE_POINTS):
            yield (name, repr(threshold), *(f"{error:.6f}" for error in errors))


def _draws(division: Division) -> Iterable[tuple[str, str, str]]:
    for names, gallery, use in (
        (division.present, "present", "confirm"),
        (division.absent, "absent", "confirm"),
        (division.present_fit, "present", "fit"),
        (division.absent_fit, "absent", "fit"),
    ):
        yield from ((name, gallery, use) for name in names.tolist())


def _write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _log(result: dict[str, Any], config: ThresholdConfig) -> None:
    log.info(f"{config.output}: {result['gallery_images']} gallery images of {result['gallery_products']} products")
    confirmed = [row for row in result["scores"] if row["threshold"] is not None]
    if confirmed:
        log.info(f"  {'score':<12} threshold  false accepts  false rejects  wrong")
    for row in confirmed:
        mark = "  (used)" if row["score"] == config.score else ""
        rates = f"{row['false_accept']:>13.4f}  {row['false_reject']:>13.4f}  {row['wrong']:>5.3f}"
        log.info(f"  {row['score']:<12} {row['threshold']:>9.4f}  {rates}{mark}")
    if any(row["score"] == config.score and row["false_reject"] == 1 for row in confirmed):
        others = " or ".join(name for name in _SCORES if name != config.score)
        remedy = f"Train further, allow more false accepts, or use --score {others}"
        log.warning(f"{config.output}: this threshold rejects every query that has a match. {remedy}.")
    for row in (row for row in result["compare"] if row["moved"] is not None):
        kept = f"false accepts {row['kept']['false_accept']:.4f}, false rejects {row['kept']['false_reject']:.4f}"
        log.info(f"  {row['model']}: threshold {row['moved']:+.4f}; with the threshold above: {kept}")


def _finish(path: Path, result: dict[str, Any]) -> Path:
    """Log the statement and return the path; raise :class:`CheckFailed` if no threshold is confirmed."""
    if result["threshold"] is None:
        raise CheckFailed(f"{path}: {result['statement']}")
    log.info(f"  {result['statement']}")
    return path
