"""Search for the largest set of quantised layers within a recall budget."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Layers = frozenset[str]


@dataclass(frozen=True)
class LayerSetScore:
    """Score of the embeddings that a set of quantised layers gives."""

    hits: NDArray[np.bool_]  # (queries,) bool, whether the first result is correct
    cosine: float  # mean cosine to the float model's embeddings
    # correlation of changed hits within a product; None if too few products change to measure it
    correlation: float | None = None


@dataclass(frozen=True)
class Trial:
    """A set of layers that was quantised and scored on the search's products.

    Its drop steers the search and is no estimate of the true drop: a search picks sets that were lucky.
    """

    quantised: Layers  # names of the quantised layers
    recall: float  # recall@1
    drop: float  # drop of recall@1 from the float model's
    cosine: float  # mean cosine to the float model's embeddings
    correlation: float | None = None  # correlation of changed hits within a product, if it could be measured


@dataclass(frozen=True)
class Decision:
    """The chosen set of layers, and the evidence."""

    chosen: Trial  # trial of the chosen set
    within_budget: bool  # whether its drop is within the budget
    single_layer_trials: list[Trial]  # trials of each layer alone, most harmful first
    trials: list[Trial]  # trials of every scored set, in order
    reasons: dict[str, str]  # reason for each layer's precision, by layer

    @property
    def correlation(self) -> float | None:
        """Largest correlation of changed hits within a product of any trial; None if none could be measured."""
        return max((trial.correlation for trial in self.trials if trial.correlation is not None), default=None)


def search_quantised_layers(
    layers: Sequence[str],
    evaluate: Callable[[Layers], LayerSetScore],
    budget: float,
    reduced_sets: Sequence[Collection[str]] = (),
) -> Decision:
    """Find the largest set of quantised layers whose recall@1 drops by no more than the budget.

    The search tries each layer alone and ranks the layers by harm (cosine, ties by recall), and it tries all layers
    together. If they cost too much, bisection finds the fewest most harmful layers to leave in float. Then each of
    these layers is quantised after all if the budget allows it, least harmful first. If no set is within the budget,
    the set with the smallest drop is chosen and ``within_budget`` is False.

    ``evaluate`` scores a set out of one or more layers; the empty set is the float model. The chosen set is also tried
    reduced to each kind of layers in ``reduced_sets``, because a smaller set may be faster.
    """
    float_score = evaluate(frozenset())
    tried = {frozenset[str](): _trial(frozenset(), float_score, float_score)}

    def attempt(quantised: Layers) -> Trial:
        if quantised not in tried:
            tried[quantised] = _trial(quantised, evaluate(quantised), float_score)
        return tried[quantised]

    def is_within_budget(quantised: Layers) -> bool:
        return attempt(quantised).drop <= budget

    alone = [attempt(frozenset([layer])) for layer in layers]
    single_layer_trials = sorted(alone, key=lambda trial: (trial.cosine, -trial.drop))
    harmful = [next(iter(trial.quantised)) for trial in single_layer_trials]
    every_layer = attempt(frozenset(layers))
    if every_layer.drop <= budget:
        for kind in reduced_sets:
            attempt(every_layer.quantised & frozenset(kind))
        reasons = dict.fromkeys(layers, "quantised: all layers together are within the budget")
        return Decision(every_layer, True, single_layer_trials, list(tried.values()), reasons)
    excluded = _count_excluded(harmful, is_within_budget)
    chosen = attempt(frozenset(harmful[excluded:]))
    for layer in reversed(harmful[:excluded]):
        extended = chosen.quantised | {layer}
        if is_within_budget(extended):
            chosen = attempt(extended)
    if not chosen.quantised:
        chosen = min(tried.values(), key=lambda trial: (not trial.quantised, trial.drop, -len(trial.quantised)))
    for kind in reduced_sets:
        attempt(chosen.quantised & frozenset(kind))
    reasons = _explain_layers(chosen, single_layer_trials, budget)
    return Decision(chosen, chosen.drop <= budget, single_layer_trials, list(tried.values()), reasons)


def _count_excluded(harmful: list[str], is_within_budget: Callable[[Layers], bool]) -> int:
    """Return by bisection how many of the most harmful layers must stay in float."""
    low, high = 1, len(harmful)  # excluding all layers quantises nothing, which is within every budget
    while low < high:
        middle = (low + high) // 2
        if is_within_budget(frozenset(harmful[middle:])):
            high = middle
        else:
            low = middle + 1
    return high


def _trial(quantised: Layers, score: LayerSetScore, float_score: LayerSetScore) -> Trial:
    lost = float_score.hits.astype(np.float64) - score.hits
    return Trial(quantised, float(score.hits.mean()), float(lost.mean()), score.cosine, score.correlation)


def _explain_layers(chosen: Trial, single_layer_trials: list[Trial], budget: float) -> dict[str, str]:
    reasons = {}
    for rank, trial in enumerate(single_layer_trials, 1):
        layer = next(iter(trial.quantised))
        cost = f"alone it costs {trial.drop:+.4f} recall@1 and {1 - trial.cosine:.1e} cosine (harm rank {rank})"
        if layer in chosen.quantised:
            reasons[layer] = f"quantised: {cost}"
        else:
            reasons[layer] = f"not quantised: {cost}; with it the drop exceeds {budget:g}"
    return reasons
