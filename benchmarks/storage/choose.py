"""Choice of the cheapest storage setting within a recall budget, and its confirmation on other products.

The procedure is that of ``vpr export int8``: settings are chosen on a third of the products of the validation split,
and tested on the others in an order that is fixed before, from the safest to the cheapest one, until one fails
(:mod:`calibration.confirmation` gives the source).
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.config import StorageConfig
from benchmarks.report.storage_schema import StorageDecision, TestedSetting
from benchmarks.storage.measure import Exact, Hits, Measured
from calibration.confirmation import Confirmation, confirm_sequence, split_products
from vpr.retrieval.config import IndexKind
from vpr.retrieval.drop_test import DropTest, change_correlation, drop_test, state_result
from vpr.retrieval.intervals import Ids

_STEP = 0.8  # a setting is tested only if it takes less than this share of the bytes of the one before
_HOPELESS = 2  # times the budget: no setting that loses more in a smaller gallery is measured in a larger one
# Only their time is proportional to the size: a short list takes as long to rescore in a small gallery.
_SCANS: tuple[IndexKind, ...] = ("flat",)


def order_candidates(measured: Sequence[Measured], drops: Sequence[float], kept: Sequence[float]) -> list[int]:
    """Return the indexes of the settings to test, from the safest to the cheapest.

    A setting is a candidate if no cheaper one keeps more exact neighbours in the search (``kept``), and if it takes
    clearly less than the candidate before. ``drops`` are those of the search; the caller has left out those above the
    budget.
    """
    order = sorted(range(len(measured)), key=lambda i: (-kept[i], measured[i].row.bytes_per_vector or 0, drops[i]))
    candidates: list[int] = []
    for index in order:
        bytes_now = measured[index].row.bytes_per_vector or 0
        if not candidates or bytes_now < _STEP * (measured[candidates[-1]].row.bytes_per_vector or 0):
            candidates.append(index)
    return candidates


def choose_setting(
    measured: Sequence[Measured], exact: Exact, products: Ids, is_choice: Hits, config: StorageConfig
) -> StorageDecision:
    """Choose on a third of the products of the validation queries, and confirm on the others.

    Args:
        measured: Settings of one gallery, one or more.
        exact: Exact search in that gallery.
        products: (q,) product ids of the queries.
        is_choice: (q,) bool, whether a query is of the validation split.
        config: Budget, confidence, limit of time and seed; a budget is set.

    Raises:
        UserError: There are fewer than 15 products.
    """
    assert config.max_recall_drop is not None
    max_drop, confidence, max_ms = config.max_recall_drop, config.confidence, config.max_ms
    search_names, confirm_names = split_products(products[is_choice], config.seed)
    searched, confirming = (is_choice & np.isin(products, names) for names in (search_names, confirm_names))
    fast = [one for one in measured if max_ms is None or (one.row.single_ms or 0) <= max_ms]
    drops = [float(exact.hits[searched].mean() - one.hits[searched].mean()) for one in fast]
    within = [index for index, drop in enumerate(drops) if drop <= max_drop]
    used = [fast[index] for index in within]
    kept = [float(one.neighbours[searched].mean()) for one in used]
    order = order_candidates(used, [drops[index] for index in within], kept)
    correlations = [change_correlation(exact.hits[searched], one.hits[searched], products[searched]) for one in used]
    correlation = max((value for value in correlations if value is not None), default=None)

    def test(index: int) -> DropTest:
        return drop_test(exact.hits[confirming], used[index].hits[confirming], products[confirming], correlation)

    steps = confirm_sequence(order, test, max_drop, confidence) if order else []
    confirmed = [step for step in steps if step.confirmed]
    last = confirmed[-1] if confirmed else None
    return StorageDecision(
        size=measured[0].row.size,
        max_recall_drop=max_drop,
        confidence=confidence,
        max_ms=max_ms,
        chosen=used[last.candidate].row.name if last else None,
        outcome=_state(steps, used, max_drop, confidence, max_ms),
        drop_upper_bound=last.upper_bound if last else None,
        smallest_confirmable_drop=steps[0].test.smallest_confirmable(confidence) if steps else None,
        search_products=len(search_names),
        confirmation_products=len(confirm_names),
        sequence=[_record(step, used[step.candidate], drops[within[step.candidate]]) for step in steps],
        untested=len(order) - len(steps),
    )


def rule_out(
    measured: Sequence[Measured],
    exact: Exact,
    products: Ids,
    is_choice: Hits,
    config: StorageConfig,
    growth: float,
) -> dict[str, str]:
    """Return the settings that a larger gallery can do without, by name, with the reason.

    Only the products of the search decide, so the confirmation is as valid as without. Recall falls faster for coarse
    vectors the more a gallery holds; a setting that loses twice the budget is not expected to recover.

    Args:
        measured: Settings of the smaller gallery.
        exact: Exact search in that gallery.
        products: (q,) product ids of the queries.
        is_choice: (q,) bool, whether a query is of the validation split.
        config: Budget, limit of time and seed; a budget is set.
        growth: Size of the larger gallery over that of the smaller one.
    """
    assert config.max_recall_drop is not None
    names, _ = split_products(products[is_choice], config.seed)
    searched = is_choice & np.isin(products, names)
    reasons = {}
    for one in measured:
        drop = float(exact.hits[searched].mean() - one.hits[searched].mean())
        expected = (one.row.single_ms or 0) * (growth if one.setting.index in _SCANS else 1)
        if drop > _HOPELESS * config.max_recall_drop:
            reasons[one.row.name] = f"not measured: drop {drop:+.4f} in the search at {one.row.size:,} vectors"
        elif config.max_ms is not None and expected > config.max_ms:
            reasons[one.row.name] = f"not measured: expected {expected:.0f} ms from {one.row.size:,} vectors"
    return reasons


def _state(
    steps: Sequence[Confirmation[int]],
    used: Sequence[Measured],
    max_drop: float,
    confidence: float,
    max_ms: float | None,
) -> str:
    if not steps:
        limit = "" if max_ms is None else f" and {max_ms:g} ms"
        return f"no setting within a drop of {max_drop:g}{limit} in the search. Raise the budget or add settings."
    confirmed = [step for step in steps if step.confirmed]
    step = (confirmed or steps)[-1]
    row = used[step.candidate].row
    name = f"{row.name}, {row.bytes_per_vector:.1f} bytes per vector, p50 {row.single_ms:.2f} ms"
    return f"{name}: {state_result(step.test, max_drop, confidence, step.upper_bound)}"


def _record(step: Confirmation[int], measured: Measured, search_drop: float) -> TestedSetting:
    return TestedSetting(
        name=measured.row.name,
        bytes_per_vector=measured.row.bytes_per_vector or 0.0,
        search_drop=search_drop,
        drop=step.test.drop,
        p_value=step.p_value,
        upper_bound=step.upper_bound,
        confirmed=step.confirmed,
    )
