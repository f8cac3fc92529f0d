"""``vpr bench compare``: changes from one report to another, their significance, and the budgets they break."""

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.config import CompareConfig
from benchmarks.recall.paired_bootstrap import compute_recall_drop
from benchmarks.report.recommendation import format_signed, recommend, timed_batches
from benchmarks.report.schema import Interval, Report, Row, read_report
from vpr.common.errors import BudgetExceeded, UserError
from vpr.common.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Change:
    """Change of one model on one backend."""

    name: str  # model and backend
    drop: float  # recall@1 lost on the same queries
    interval: Interval  # 95 % interval of the drop, paired bootstrap
    ratios: dict[str, float]  # p50 after divided by p50 before, by batch
    significant_batches: tuple[str, ...]  # batches whose p50 moved beyond noise
    untimed: tuple[str, ...]  # batches that only the first report timed
    size: float | None  # bytes after divided by bytes before; None if one size is unknown
    instability: str  # reason not to rely on a latency; empty if there is none

    @property
    def is_recall_significant(self) -> bool:
        """Whether the interval of the drop excludes 0."""
        return not self.interval[0] <= 0 <= self.interval[1]


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
    changes = [_compare_rows(title, old[title], new[title], config) for title in old if title in new]
    _print(changes, after)
    if machine:
        log.warning(f"latencies are not comparable: {machine}")
    removed, added = [title for title in old if title not in new], [title for title in new if title not in old]
    for titles, report in ((removed, "before"), (added, "after")):
        if titles:
            log.info(f"only in the report {report}: {', '.join(titles)}")
    _log_recommended(before, after)
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
    if old.hits is None or new.hits is None or len(old.hits) != len(new.hits):
        raise UserError(f"after: the numbers of queries of '{title}' differ. Rerun `vpr bench report`.")
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
    return Change(title, drop.mean, drop.ci95, ratios, significant, untimed, size, instability)


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
        low, high = map(format_signed, change.interval)
        star = " *" if change.is_recall_significant else ""
        ratios, significant = change.ratios, change.significant_batches
        cells = [_format_ratio(ratios.get(batch)) + (" *" if batch in significant else "") for batch in batches]
        mark = " (unstable latency)" if change.instability else ""
        drop = f"{format_signed(change.drop)} [{low}, {high}]{star}"
        table.add_row(escape(change.name + mark), escape(drop), *cells, _format_ratio(change.size))
    Console(width=max(110, Console().width)).print(table)
    count = sum(change.is_recall_significant or bool(change.significant_batches) for change in changes)
    queries = next((row.queries for row in after.rows if row.queries), 0)
    log.info(f"{len(changes)} models on {queries} queries, {count} changed beyond noise (*)")


def _format_ratio(value: float | None) -> str:
    return "–" if value is None else f"x {value:.3f}"


def _log_recommended(before: Report, after: Report) -> None:
    first, second = (row.title if row else "nothing" for row in (recommend(before), recommend(after)))
    log.info(f"recommended: {second}" + ("" if first == second else f", before: {first}"))
