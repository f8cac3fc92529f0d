"""Which layers INT8 hurts, and how many of them it may have within a budget of recall."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.retrieval.metrics import bootstrap_interval

Layers = frozenset[str]


@dataclass(frozen=True)
class LayerSetScore:
    """What a set of quantised layers does to the embeddings.

    Attributes:
        hits: (queries,) bool, whether the first result is right.
        cosine: mean cosine to the float model's embeddings.
    """

    hits: NDArray[np.bool_]
    cosine: float


@dataclass(frozen=True)
class Trial:
    """A set of layers that was tried.

    Attributes:
        quantised: the layers.
        recall: recall@1.
        drop: of recall@1 from the float model's.
        interval: 95 % of the drop, paired over the queries.
        cosine: mean, to the float model.
    """

    quantised: Layers
    recall: float
    drop: float
    interval: tuple[float, float]
    cosine: float


@dataclass(frozen=True)
class Decision:
    """What to quantise, and the evidence.

    Attributes:
        chosen: the trial taken.
        met: whether its drop is within the budget.
        single_layer_trials: each layer quantised alone, the most harmful first.
        trials: every set that was tried, in order.
        reasons: by layer, why it is what it is.
    """

    chosen: Trial
    within_budget: bool
    single_layer_trials: list[Trial]
    trials: list[Trial]
    reasons: dict[str, str]


def search_quantised_layers(
    layers: Sequence[str],
    evaluate: Callable[[Layers], LayerSetScore],
    budget: float,
    reduced_sets: Sequence[Collection[str]] = (),
) -> Decision:
    """The largest set of quantised layers found whose recall@1 drops by no more than the budget.

    All layers are tried first. Where that costs too much, each is tried alone, and the fewest of the most
    harmful (by cosine alone, ties by recall) are kept that bring the rest within the budget, found by
    bisection; then each kept layer is given back that the budget bears, the least harmful first. When no set
    is within the budget, the one of least drop is chosen and ``met`` is False.

    Args:
        layers: that may be quantised, one or more.
        evaluate: scores a set of quantised layers; the empty set is the float model.
        budget: of recall@1, such as 0.005.
        reduced_sets: kinds of layers; what is chosen is tried cut down to each too, for a caller who asks what is faster.
    """
    floats = evaluate(frozenset())
    tried = {frozenset[str](): _trial(frozenset(), floats, floats)}

    def attempt(quantised: Layers) -> Trial:
        if quantised not in tried:
            tried[quantised] = _trial(quantised, evaluate(quantised), floats)
        return tried[quantised]

    whole = attempt(frozenset(layers))
    if whole.drop <= budget:
        for kind in reduced_sets:
            attempt(whole.quantised & frozenset(kind))
        reasons = dict.fromkeys(layers, "quantised: all layers together are within the budget")
        return Decision(whole, True, [], list(tried.values()), reasons)
    single_layer_trials = sorted(
        (attempt(frozenset([layer])) for layer in layers), key=lambda trial: (trial.cosine, -trial.drop)
    )
    harmful = [next(iter(trial.quantised)) for trial in single_layer_trials]
    kept = _fewest_kept(harmful, lambda quantised: attempt(quantised).drop <= budget)
    chosen = attempt(frozenset(harmful[kept:]))
    for layer in reversed(harmful[:kept]):
        more = attempt(chosen.quantised | {layer})
        if more.drop <= budget:
            chosen = more
    if not chosen.quantised:
        chosen = min(tried.values(), key=lambda trial: (not trial.quantised, trial.drop, -len(trial.quantised)))
    for kind in reduced_sets:
        attempt(chosen.quantised & frozenset(kind))
    return Decision(
        chosen,
        chosen.drop <= budget,
        single_layer_trials,
        list(tried.values()),
        _reasons(chosen, single_layer_trials, budget),
    )


def _fewest_kept(harmful: list[str], within: Callable[[Layers], bool]) -> int:
    """How many of the most harmful layers must stay for the rest to be within the budget, by bisection."""
    low, high = 1, len(harmful)  # with all of them nothing is quantised, which is always within the budget
    while low < high:
        middle = (low + high) // 2
        if within(frozenset(harmful[middle:])):
            high = middle
        else:
            low = middle + 1
    return high


def _trial(quantised: Layers, score: LayerSetScore, floats: LayerSetScore) -> Trial:
    lost = floats.hits.astype(np.float64) - score.hits
    return Trial(quantised, float(score.hits.mean()), float(lost.mean()), bootstrap_interval(lost), score.cosine)


def _reasons(chosen: Trial, single_layer_trials: list[Trial], budget: float) -> dict[str, str]:
    found = {}
    for place, trial in enumerate(single_layer_trials, 1):
        layer = next(iter(trial.quantised))
        what = f"alone it costs {trial.drop:+.4f} recall@1 and {1 - trial.cosine:.1e} cosine, number {place} in harm"
        if layer in chosen.quantised:
            found[layer] = f"quantised: {what}"
        else:
            found[layer] = f"kept: {what}; with it the drop passes {budget:g}"
    return found
