"""``vpr bench compare``: changes from one report to another, their significance, and the budgets they break."""

from dataclasses import dataclass, replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.config import CompareConfig
from benchmarks.recall.paired_drop import compute_recall_drop
from benchmarks.report.recommendation import format_signed, recommend, timed_batches
from benchmarks.report.schema import Interval, Report, Row, read_report
from vpr.common.errors import BudgetExceeded, UserError
from vpr.common.log import get_logger
from vpr.retrieval.intervals import MIN_PRODUCTS, adjust_p_values

log = get_logger(__name__)

_ERROR_RATE = 0.05


@dataclass(frozen=True)
class Change:
    """Change of one model on one backend."""

    name: str  # model and backend
    drop: float  # recall@1 lost on the same queries
    interval: Interval | None  # 95 % interval of the drop, paired, by product; None with fewer than 10 products
    upper_bound: float | None  # one-sided 95 % upper bound of the drop
    p_value: float | None  # of no change of recall@1, adjusted for the number of models (Holm)
    ratios: dict[str, float]  # p50 after divided by p50 before, by batch
    significant_batches: tuple[str, ...]  # batches whose p50 moved beyond noise
    untimed: tuple[str, ...]  # batches that only the first report timed
    size: float | None  # bytes after divided by bytes before; None if one size is unknown
    instability: str  # reason not to rely on a latency; empty if there is none

    @property
    def is_recall_significant(self) -> bool:
        """Whether recall@1 changed, with an error rate of 5 % over all models of the comparison."""
        return self.p_value is not None and self.p_value <= _ERROR_RATE


def compare_reports(config: CompareConfig) -> list[Change]:
    """Print and return the changes.

    :class:`UserError` if a report is missing, the queries differ, or a latency budget is set for two machines.
    :class:`BudgetExceeded` if a budget is; a model that is missing from the second report exceeds every budget.
    """
    before, after = read_report(config.before), read_report(config.after)
    first, second = ((report.catalog.sha256, report.catalog.split) for report in (before, after))
    if first != second:
        raise UserError("after: the reports are of different catalogues or splits. Score both on the same queries.")
    machine = _machine_difference(before, after)
    if machine and config.max_latency_ratio is not None:
        remedy = "Measure both on one machine, or leave out --max-latency-ratio."
        raise UserError(f"max_latency_ratio: the reports are of different machines: {machine}. {remedy}")
    old, new = _rows_by_title(before, config.before), _rows_by_title(after, config.after)
    changes = _adjust([_compare_rows(title, old[title], new[title], config) for title in old if title in new])
    _print(changes, after)
    if machine:
        log.warning(f"latencies are not comparable: {machine}")
    removed, added = [title for title in old if title not in new], [title for title in new if title not in old]
    for titles, report in ((removed, "before"), (added, "after")):
        if titles:
            log.info(f"only in the report {report}: {', '.join(titles)}")
    _warn_seen(before, after)
    _log_recommended(before, after)
    _warn_unconfirmed(changes, config)
    exceeded = [message for change in changes for message in _exceeded_budgets(change, config)]
    if (config.max_recall_drop, config.max_latency_ratio, config.max_size_ratio) != (None, None, None):
        exceeded += [f"{title}: missing from the report after" for title in removed]
    if exceeded:
        raise BudgetExceeded("budget exceeded: " + "; ".join(exceeded))
    return changes


def _machine_difference(before: Report, after: Report) -> str:
    """Return the differences between the machines or their use; empty if there are none."""
    machines = ((report.environment, report.threads) for report in (before, after))
    first, second = ((m.cpu.get("model"), [gpu.get("name") for gpu in m.gpus], threads) for m, threads in machines)
    values = zip(("processors", "GPUs", "threads"), first, second, strict=True)
    return ", ".join(f"different {name} ({a} and {b})" for name, a, b in values if a != b)


def _rows_by_title(report: Report, path: str) -> dict[str, Row]:
    """Return the rows with recall by model and backend."""
    rows: dict[str, Row] = {}
    for row in report.rows:
        if row.hits is None:
            continue
        if row.title in rows:
            raise UserError(f"{path}: two rows are named '{row.title}'. Rerun `vpr bench report`.")
        rows[row.title] = row
    return rows


def _compare_rows(title: str, old: Row, new: Row, config: CompareConfig) -> Change:
    assert old.hits is not None
    assert new.hits is not None
    drop = compute_recall_drop(old.hits, new.hits, config.seed)
    ratios = {}
    for batch in timed_batches([old]):
        first, second = old.milliseconds(batch), new.milliseconds(batch)
        if first is not None and second is not None:
            ratios[batch] = second / first
    noise = config.latency_noise
    significant = tuple(batch for batch, ratio in ratios.items() if _is_significant(old, new, batch, ratio, noise))
    untimed = tuple(batch for batch in old.latency_ms or {} if batch not in ratios)
    size = new.size_bytes / old.size_bytes if old.size_bytes and new.size_bytes else None
    instability = "; ".join(dict.fromkeys([*old.instabilities.values(), *new.instabilities.values()]))
    evidence = (drop.mean, drop.ci95, drop.upper_bound, drop.p_value)
    return Change(title, *evidence, ratios, significant, untimed, size, instability)


def _adjust(changes: list[Change]) -> list[Change]:
    """Adjust the p-values for the number of models that could be marked."""
    tested = [change for change in changes if change.p_value is not None]
    adjusted = iter(adjust_p_values([change.p_value for change in tested if change.p_value is not None]))
    return [change if change.p_value is None else replace(change, p_value=next(adjusted)) for change in changes]


def _warn_unconfirmed(changes: list[Change], config: CompareConfig) -> None:
    """Warn of drops within the budget whose upper bound is beyond it."""
    limit = config.max_recall_drop
    for change in changes if limit is not None else ():
        if limit is None or change.drop > limit:
            continue
        if change.upper_bound is None:
            log.warning(
                f"{change.name}: the drop is within the budget, but {MIN_PRODUCTS} products are needed for a bound"
            )
        elif change.upper_bound > limit:
            bound = f"its 95 % upper bound is {change.upper_bound:.4f}"
            log.warning(f"{change.name}: the drop is within the budget, but {bound}. Use more products.")


def _warn_seen(before: Report, after: Report) -> None:
    """Warn of rows whose model has learned from what is scored."""
    for report, which in ((before, "before"), (after, "after")):
        for row in report.rows:
            if row.recall_at_1 is not None and row.seen and row.seen.learned:
                log.warning(f"{row.title} ({which}): {row.seen.learned}. Its recall is overestimated.")


def _is_significant(old: Row, new: Row, batch: str, ratio: float, noise: float) -> bool:
    """Return whether p50 moved by more than the noise and its intervals, if known, do not overlap."""
    first, second = old.milliseconds_ci95(batch), new.milliseconds_ci95(batch)
    overlap = first is not None and second is not None and first[0] <= second[1] and second[0] <= first[1]
    return abs(ratio - 1) > noise and not overlap


def _exceeded_budgets(change: Change, config: CompareConfig) -> list[str]:
    messages, name = [], change.name
    if config.max_recall_drop is not None and change.drop > config.max_recall_drop:
        messages.append(f"{name}: recall@1 drops by {change.drop:.4f}, budget {config.max_recall_drop:g}")
    if config.max_latency_ratio is not None:
        unstable = f" (unstable: {change.instability})" if change.instability else ""
        budget = f"budget {config.max_latency_ratio:g}{unstable}"
        messages += [
            f"{name}: p50 at batch {batch} is {ratio:.3f} times the p50 before, {budget}"
            for batch, ratio in change.ratios.items()
            if ratio > config.max_latency_ratio
        ]
        messages += [f"{name}: p50 at batch {batch} is missing from the report after" for batch in change.untimed]
    if config.max_size_ratio is not None and change.size is not None and change.size > config.max_size_ratio:
        messages.append(f"{name}: {change.size:.3f} times the bytes before, budget {config.max_size_ratio:g}")
    return messages


def _print(changes: list[Change], after: Report) -> None:
    """Print a table; a star marks a change beyond noise."""
    batches = sorted({batch for change in changes for batch in change.ratios}, key=int)
    table = Table("model", "drop of recall@1 [95 %]", *[f"p50, batch {batch}" for batch in batches], "bytes", box=None)
    for change in changes:
        star = " *" if change.is_recall_significant else ""
        ratios, significant = change.ratios, change.significant_batches
        cells = [_format_ratio(ratios.get(batch)) + (" *" if batch in significant else "") for batch in batches]
        mark = " (unstable latency)" if change.instability else ""
        interval = f" [{', '.join(map(format_signed, change.interval))}]" if change.interval else ""
        drop = f"{format_signed(change.drop)}{interval}{star}"
        table.add_row(escape(change.name + mark), escape(drop), *cells, _format_ratio(change.size))
    Console(width=max(110, Console().width)).print(table)
    count = sum(change.is_recall_significant or bool(change.significant_batches) for change in changes)
    row = next((row for row in after.rows if row.queries), None)
    queries = f"{row.queries} queries of {row.query_products} products" if row else "no queries"
    correction = f"recall@1: 5 % error rate over {len(changes)} models, Holm's correction"
    log.info(f"{len(changes)} models on {queries}, {count} changed beyond noise (*; {correction})")
    if row and (row.query_products or 0) < MIN_PRODUCTS:
        log.warning(f"recall@1 is not tested: fewer than {MIN_PRODUCTS} products")


def _format_ratio(value: float | None) -> str:
    return "–" if value is None else f"x {value:.3f}"


def _log_recommended(before: Report, after: Report) -> None:
    first, second = (row.title if row else "nothing" for row in (recommend(before), recommend(after)))
    log.info(f"recommended: {second}" + ("" if first == second else f", before: {first}"))
