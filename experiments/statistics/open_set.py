"""Coverage of the bound of ``vpr gallery threshold`` on real embeddings, printed.

``python -m experiments.statistics.open_set --embeddings PATH``: the absent products of a draw are the population, so
the true rate of a threshold is known. Products that confirm are drawn from it with replacement. Separately, half of the
absent products confirm a threshold, and the rate is measured on the other half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.command import run_command
from vpr.common.errors import UserError
from vpr.retrieval.config import ScoreName
from vpr.retrieval.embeddings import load_embeddings
from vpr.retrieval.intervals import Ids
from vpr.retrieval.open_set import (
    Scores,
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
    """

    confirmed: float
    broken: float
    true_rate: float
    held_out_rate: float


def measure_coverage(
    scores: Scores, products: Ids, limit: float, confidence: float, draws: int, rng: np.random.Generator
) -> Coverage:
    """Measure the coverage where the (queries,) scores of absent ``products`` are the population."""
    codes = np.unique(products, return_inverse=True)[1]
    weights = product_weights(products) / (codes.max() + 1)
    rows_of = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    true_rates, held_out_rates = [], []
    for _ in range(draws):
        drawn = [rows_of[code] for code in rng.integers(0, len(rows_of), len(rows_of))]
        names = np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn]).astype(np.str_)
        threshold = confirm_threshold(scores[np.concatenate(drawn)], names, limit, confidence)
        if threshold is not None:
            true_rates.append(float(weights[scores >= threshold].sum()))
        is_half = np.isin(codes, rng.permutation(len(rows_of))[: len(rows_of) // 2])
        threshold = confirm_threshold(scores[is_half], products[is_half], limit, confidence)
        if threshold is not None:
            held_out = weights[~is_half] / weights[~is_half].sum()
            held_out_rates.append(float(held_out[scores[~is_half] >= threshold].sum()))
    broken = sum(rate > limit + 1e-9 for rate in true_rates) / draws
    means = [float(np.mean(rates)) if rates else float("nan") for rates in (true_rates, held_out_rates)]
    return Coverage(len(true_rates) / draws, broken, *means)


def measure(config: OpenSetConfig) -> list[Coverage]:
    """Divide the products ``divisions`` times and measure the coverage of each."""
    embeddings = load_embeddings(config.embeddings)
    names, vectors = embeddings.products, embeddings.vectors
    query, gallery = (np.flatnonzero(embeddings.roles == role) for role in ("query", "gallery"))
    if not len(query) or not len(gallery):
        raise UserError(f"embeddings: {config.embeddings} lacks query or gallery images. Embed both.")
    results = []
    for number in range(config.divisions):
        division = divide_products(names[query], names[gallery], _ABSENT, _FIT, config.seed + number)
        present = gallery[~np.isin(names[gallery], division.all_absent)]
        best = find_best_products(vectors[query], vectors[present], names[present])
        fit = np.isin(names[query], np.concatenate([division.present_fit, division.absent_fit]))
        right = names[present][best.rows] == names[query]
        probability = fit_probability(best.select(fit), right[fit], names[query][fit])
        absent = np.isin(names[query], division.absent)
        scores = score_queries(config.score, best, probability)[absent]
        rng = np.random.default_rng([config.seed, number])
        limits = config.max_false_accept, config.confidence
        results.append(measure_coverage(scores, names[query][absent], *limits, config.draws, rng))
    return results


def _print(config: OpenSetConfig) -> None:
    results = measure(config)
    for key in ("confirmed", "broken", "true_rate", "held_out_rate"):
        values = [value for result in results if np.isfinite(value := getattr(result, key))]
        largest = f"largest of {len(values)} divisions {max(values):.4f}" if values else "no threshold confirmed"
        print(f"{key:14} {np.mean(values) if values else np.nan:.4f}  {largest}")


if __name__ == "__main__":
    run_command("experiments.statistics.open_set", __doc__, OpenSetConfig, _print)
