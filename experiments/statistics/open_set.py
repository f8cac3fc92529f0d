"""Coverage of the bound of ``vpr gallery threshold`` on real embeddings, printed.

``python -m experiments.statistics.open_set --embeddings PATH``: the absent products of a draw are the population, so
the true rate of a threshold is known. Products that confirm are drawn from it with replacement. Separately, half of the
absent products confirm a threshold, and the rate is measured on the other half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.command import run_command
from experiments.figures import Row
from vpr.common.errors import UserError
from vpr.retrieval.config import ScoreName
from vpr.retrieval.embeddings import load_embeddings
from vpr.retrieval.intervals import Ids
from vpr.retrieval.open_set import (
    Scores,
    Vectors,
    divide_products,
    find_best_products,
    fit_probability,
    product_weights,
    score_queries,
)
from vpr.retrieval.threshold import confirm_threshold

_ABSENT = 0.5
_FIT = 0.2


@dataclass(frozen=True)
class OpenSetConfig:
    """Settings of the experiment.

    Attributes:
        embeddings: Embeddings artifact with query and gallery images; all splits are used.
        max_false_accept: Largest rate of false accepts.
        confidence: Confidence of the bound.
        score: Score that is compared with the threshold.
        divisions: Divisions into present and absent products.
        draws: Draws of products that confirm, for each division.
        seed: Seed.
    """

    embeddings: str
    max_false_accept: float = 0.1
    confidence: float = 0.95
    score: ScoreName = "probability"
    divisions: int = 10
    draws: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Coverage:
    """Result of a population of absent products.

    Attributes:
        confirmed: Share of draws that confirm a threshold.
        broken: Share of draws with a threshold whose true rate exceeds the limit.
        true_rate: Mean true rate of the confirmed thresholds; NaN without one.
        held_out_rate: Mean rate on held-out products of thresholds that the other half confirms; NaN without one.
        false_reject: Mean share of present products' queries below the confirmed thresholds; NaN without one.
        products: Absent products that confirm.
    """

    confirmed: float
    broken: float
    true_rate: float
    held_out_rate: float
    false_reject: float
    products: int


def measure_coverage(
    scores: Scores,
    products: Ids,
    present: Scores,
    present_products: Ids,
    limit: float,
    confidence: float,
    draws: int,
    rng: np.random.Generator,
) -> Coverage:
    """Measure the coverage where the (queries,) scores of absent ``products`` are the population.

    The scores of queries whose product is ``present`` show what the thresholds reject.
    """
    codes = np.unique(products, return_inverse=True)[1]
    weights = product_weights(products) / (codes.max() + 1)
    rows_of = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    present_weights = product_weights(present_products) / len(np.unique(present_products))
    true_rates, held_out_rates, rejects = [], [], []
    for _ in range(draws):
        drawn = [rows_of[code] for code in rng.integers(0, len(rows_of), len(rows_of))]
        names = np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn]).astype(np.str_)
        threshold = confirm_threshold(scores[np.concatenate(drawn)], names, limit, confidence)
        if threshold is not None:
            true_rates.append(float(weights[scores >= threshold].sum()))
            rejects.append(float(present_weights[present < threshold].sum()))
        is_half = np.isin(codes, rng.permutation(len(rows_of))[: len(rows_of) // 2])
        threshold = confirm_threshold(scores[is_half], products[is_half], limit, confidence)
        if threshold is not None:
            held_out = weights[~is_half] / weights[~is_half].sum()
            held_out_rates.append(float(held_out[scores[~is_half] >= threshold].sum()))
    broken = sum(rate > limit + 1e-9 for rate in true_rates) / draws
    true, held_out, rejected = (
        float(np.mean(rates)) if rates else float("nan") for rates in (true_rates, held_out_rates, rejects)
    )
    return Coverage(len(true_rates) / draws, broken, true, held_out, rejected, len(rows_of))


def measure_divisions(
    names: Ids, vectors: Vectors, is_query: NDArray[np.bool_], config: OpenSetConfig
) -> list[Coverage]:
    """Divide the products of (images,) ``names`` and (images, dim) ``vectors``; measure each division's coverage."""
    query, gallery = np.flatnonzero(is_query), np.flatnonzero(~is_query)
    results = []
    for number in range(config.divisions):
        division = divide_products(names[query], names[gallery], _ABSENT, _FIT, config.seed + number)
        present = gallery[~np.isin(names[gallery], division.all_absent)]
        best = find_best_products(vectors[query], vectors[present], names[present])
        fit = np.isin(names[query], np.concatenate([division.present_fit, division.absent_fit]))
        right = names[present][best.rows] == names[query]
        probability = fit_probability(best.select(fit), right[fit], names[query][fit])
        scores = score_queries(config.score, best, probability)
        absent, in_gallery = (np.isin(names[query], part) for part in (division.absent, division.present))
        results.append(
            measure_coverage(
                scores[absent],
                names[query][absent],
                scores[in_gallery],
                names[query][in_gallery],
                config.max_false_accept,
                config.confidence,
                config.draws,
                np.random.default_rng([config.seed, number]),
            )
        )
    return results


def coverage_row(name: str, limit: float, results: list[Coverage]) -> Row:
    """Return the means over the divisions; the share of broken bounds also of the worst division."""

    def mean(key: str) -> str:
        values = [value for result in results if np.isfinite(value := getattr(result, key))]
        return f"{np.mean(values):.4f}" if values else "–"

    broken = [result.broken for result in results]
    return {
        "embeddings": name,
        "false accepts at most": f"{limit:g}",
        "absent products that confirm": f"{results[0].products:,}",
        "draws with a threshold": f"{np.mean([result.confirmed for result in results]):.3f}",
        "draws within the bound (worst division)": f"{1 - np.mean(broken):.3f} ({1 - max(broken):.3f})",
        "false accepts of all absent products": mean("true_rate"),
        "false accepts of held-out products": mean("held_out_rate"),
        "false rejects": mean("false_reject"),
    }


def measure(config: OpenSetConfig) -> list[Coverage]:
    """Measure the coverage of ``divisions`` divisions of the embeddings' products."""
    embeddings = load_embeddings(config.embeddings)
    used = np.isin(embeddings.roles, ("query", "gallery"))
    is_query = embeddings.roles[used] == "query"
    if is_query.all() or not is_query.any():
        raise UserError(f"embeddings: {config.embeddings} lacks query or gallery images. Embed both.")
    return measure_divisions(embeddings.products[used], embeddings.vectors[used], is_query, config)


def _print(config: OpenSetConfig) -> None:
    results = measure(config)
    for key in ("confirmed", "broken", "true_rate", "held_out_rate", "false_reject"):
        values = [value for result in results if np.isfinite(value := getattr(result, key))]
        largest = f"largest of {len(values)} divisions {max(values):.4f}" if values else "no threshold confirmed"
        print(f"{key:14} {np.mean(values) if values else np.nan:.4f}  {largest}")


if __name__ == "__main__":
    run_command("experiments.statistics.open_set", __doc__, OpenSetConfig, _print)
