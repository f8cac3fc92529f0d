"""Confirmation of a recall budget on products that the search for layers has not seen.

Learn then Test (Angelopoulos et al., "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control",
arXiv 2110.01052) with fixed-sequence testing (section 5.1): the candidates are ordered before the confirmation products
are looked at, from the safest to the one that quantises most, and tested in this order at the full level until one
fails. The chance that any confirmed candidate exceeds the budget is then at most 1 minus the confidence.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibration.sensitivity import Decision, Layers
from vpr.common.errors import UserError
from vpr.retrieval.drop_test import DropTest
from vpr.retrieval.intervals import MIN_PRODUCTS

# Confirmation needs more products than the search: it bounds a drop, the search only ranks sets of layers.
_SEARCH_SHARE = 1 / 3
_MIN_SEARCH_PRODUCTS = 5
MIN_SPLIT_PRODUCTS = MIN_PRODUCTS + _MIN_SEARCH_PRODUCTS
_SET_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1)

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Confirmation(Generic[Candidate]):
    """A tested candidate: a set of layers, or a row of a report."""

    candidate: Candidate
    test: DropTest  # its changes on the confirmation products
    p_value: float  # p-value of the hypothesis that its true drop exceeds the budget
    upper_bound: float  # upper bound of its true drop, valid for all candidates together (Bonferroni)
    confirmed: bool  # whether its drop and that of all candidates before it are within the budget


def split_products(products: NDArray[np.str_], seed: int) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Split the different ids among (n,) products at random into those of the search and those of the confirmation.

    Raises:
        UserError: There are fewer than 15 products.
    """
    names = np.unique(products)
    if len(names) < MIN_SPLIT_PRODUCTS:
        raise UserError(
            f"max_recall_drop: the validation split has queries of {len(names)} products, and a search and a "
            f"confirmation need {MIN_SPLIT_PRODUCTS}. Add products, or raise --validation of `vpr catalog`."
        )
    names = np.random.default_rng(seed).permutation(names)
    count = max(_MIN_SEARCH_PRODUCTS, round(_SEARCH_SHARE * len(names)))
    count = min(count, len(names) - MIN_PRODUCTS)
    return np.sort(names[:count]), np.sort(names[count:])


def order_candidates(decision: Decision, reduced_sets: Sequence[Collection[str]] = ()) -> list[Layers]:
    """Return subsets of the chosen set by size, then the set itself: least harmful layers first.

    The chosen set reduced to each kind of layers in ``reduced_sets`` is a candidate too: a smaller set may be faster.
    """
    harmful = [layer for trial in decision.single_layer_trials for layer in trial.quantised]
    ranked = [layer for layer in harmful if layer in decision.chosen.quantised]
    sizes = {max(1, round(len(ranked) * share)) for share in _SET_SHARES}
    candidates = {frozenset(ranked[len(ranked) - size :]) for size in sizes}
    candidates |= {decision.chosen.quantised & frozenset(kind) for kind in reduced_sets}
    harm = {layer: rank for rank, layer in enumerate(reversed(harmful))}
    return sorted(
        candidates - {frozenset[str]()}, key=lambda layers: (len(layers), sorted(map(harm.__getitem__, layers)))
    )


def confirm_sequence(
    candidates: Sequence[Candidate], test: Callable[[Candidate], DropTest], max_drop: float, confidence: float
) -> list[Confirmation[Candidate]]:
    """Test one or more candidates in order until one fails; the failed one is the last of the result.

    ``test`` compares a candidate with the float model on the confirmation products. A sequence needs no correction for
    the number of candidates to confirm the budget. The bounds need one, as the candidate to report is chosen by them.
    """
    level = 1 - (1 - confidence) / len(candidates)
    confirmations: list[Confirmation[Candidate]] = []
    for candidate in candidates:
        result = test(candidate)
        p_value = result.p_value(max_drop)
        confirmed = p_value <= 1 - confidence
        confirmations.append(Confirmation(candidate, result, p_value, result.upper_bound(level), confirmed))
        if not confirmed:
            break
    return confirmations
