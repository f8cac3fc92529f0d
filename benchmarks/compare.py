"""``vpr bench compare``: what changed from one report to another, what is beyond noise, which budgets are broken."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.config import CompareConfig
from benchmarks.recall.paired_bootstrap import recall_drop
from benchmarks.report.recommendation import (
    Row,
    batches,
    milliseconds,
    milliseconds_ci95,
    recommend,
    signed,
    title,
    unstable,
)
from benchmarks.report.schema import read_report
from vpr.common.errors import BudgetExceeded, UserError
from vpr.common.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Change:
    """What changed of one model on one backend.

    Attributes:
        name: model and backend.
        drop: of recall@1 on the same queries.
        interval: 95 %, of the paired bootstrap.
        ratios: p50 after over before, by batch.
        apart: batches whose p50 moved beyond noise.
        untimed: batches timed before, not now.
        size: bytes after over before; None where one is not known.
        doubt: why a latency is not to be relied on; empty if there is no reason.
    """

    name: str
    drop: float
    interval: tuple[float, float]
    ratios: dict[str, float]
    apart: tuple[str, ...]
    untimed: tuple[str, ...]
    size: float | None
    doubt: str

    @property
    def recall_beyond_noise(self) -> bool:
        """Whether the interval of the drop leaves out 0."""
        return not self.interval[0] <= 0 <= self.interval[1]


def compare_reports(config: CompareConfig) -> list[Change]:
    """Print what changed, and return it.

    Raises:
        UserError: no report, reports of other queries, or a latency budget for two machines.
        BudgetExceeded: a budget is broken. A model that was measured before and is not now breaks every budget.
    """
    before, after = read_report(config.before), read_report(config.after)
    _check_same_queries(before, after)
    machine = _other_machine(before, after)
    if machine and config.max_latency_ratio is not None:
        raise UserError(f"max_latency_ratio: {machine}: measure both on one machine, or leave this budget out")
    old, new = _scored(before, config.before), _scored(after, config.after)
    changes = [_change(name, old[name], new[name], config) for name in old if name in new]
    _print(changes, after)
    if machine:
        log.info(f"latencies are not comparable: {machine}")
    gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
    for names, where in ((gone, "before"), (added, "after")):
        if names:
            log.info(f"measured only {where}: {', '.join(names)}")
    _say_recommended(before, after)
    broken = [line for change in changes for line in _broken(change, config)]
    if (config.max_recall_drop, config.max_latency_ratio, config.max_size_ratio) != (None, None, None):
        broken += [f"{name}: measured before, not now" for name in gone]
    if broken:
        raise BudgetExceeded("budget broken: " + "; ".join(broken))
    return changes


def _check_same_queries(before: Row, after: Row) -> None:
    first, second = ((one["catalog"]["sha256"], one["catalog"]["split"]) for one in (before, after))
    if first != second:
        raise UserError("compare: the reports are of other catalogues or splits: score both on the same queries")


def _other_machine(before: Row, after: Row) -> str:
    """How the machines or their use differ; empty if they do not."""
    first, second = (
        (
            one["environment"]["cpu"].get("model"),
            [gpu.get("name") for gpu in one["environment"]["gpus"]],
            one["threads"],
        )
        for one in (before, after)
    )
    found = zip(("processors", "GPUs", "threads"), first, second, strict=True)
    return ", ".join(f"other {what} ({a} and {b})" for what, a, b in found if a != b)


def _scored(report: Row, path: str) -> dict[str, Row]:
    """Rows with recall, by model and backend."""
    found: dict[str, Row] = {}
    for row in report["rows"]:
        if row["hits"] is None:
            continue
        if title(row) in found:
            raise UserError(f"{path}: two rows are named '{title(row)}': make the report with one name for each model")
        found[title(row)] = row
    return found


def _change(name: str, old: Row, new: Row, config: CompareConfig) -> Change:
    if len(old["hits"]) != len(new["hits"]):
        raise UserError(f"compare: '{name}' has {len(old['hits'])} and {len(new['hits'])} queries: make both again")
    found = recall_drop(old["hits"], new["hits"], config.seed)
    ratios = {}
    for batch in batches([old, new]):
        first, second = milliseconds(old, batch), milliseconds(new, batch)
        if first is not None and second is not None:
            ratios[batch] = second / first
    low, high = found["recall_drop_ci95"]
    return Change(
        name,
        found["recall_drop"],
        (low, high),
        ratios,
        tuple(batch for batch, ratio in ratios.items() if _apart(old, new, batch, ratio, config.latency_noise)),
        tuple(batch for batch in old["latency_ms"] or {} if batch not in ratios),
        new["size_bytes"] / old["size_bytes"] if old["size_bytes"] and new["size_bytes"] else None,
        "; ".join(dict.fromkeys([*unstable(old).values(), *unstable(new).values()])),
    )


def _apart(old: Row, new: Row, batch: str, ratio: float, noise: float) -> bool:
    """Whether p50 moved by more than the stated noise, and its intervals (where there are any) do not overlap."""
    first, second = milliseconds_ci95(old, batch), milliseconds_ci95(new, batch)
    overlap = first is not None and second is not None and first[0] <= second[1] and second[0] <= first[1]
    return abs(ratio - 1) > noise and not overlap


def _broken(change: Change, config: CompareConfig) -> list[str]:
    found = []
    if config.max_recall_drop is not None and change.drop > config.max_recall_drop:
        found.append(f"{change.name}: recall@1 drops by {change.drop:.4f}, allowed {config.max_recall_drop:g}")
    if config.max_latency_ratio is not None:
        slow = {batch: ratio for batch, ratio in change.ratios.items() if ratio > config.max_latency_ratio}
        found += [
            f"{change.name}: p50 at batch {batch} is {ratio:.3f} times that before, allowed "
            f"{config.max_latency_ratio:g}{' (not stable: ' + change.doubt + ')' if change.doubt else ''}"
            for batch, ratio in slow.items()
        ]
        found += [f"{change.name}: p50 at batch {batch} measured before, not now" for batch in change.untimed]
    if config.max_size_ratio is not None and change.size is not None and change.size > config.max_size_ratio:
        found.append(f"{change.name}: {change.size:.3f} times the bytes before, allowed {config.max_size_ratio:g}")
    return found


def _print(changes: list[Change], after: Row) -> None:
    """A table; a star marks what is beyond noise."""
    sizes = sorted({batch for change in changes for batch in change.ratios}, key=int)
    table = Table("model", "drop of recall@1 [95 %]", *[f"p50, batch {size}" for size in sizes], "bytes", box=None)
    for change in changes:
        low, high = change.interval
        drop = f"{signed(change.drop)} [{signed(low)}, {signed(high)}]" + (" *" if change.recall_beyond_noise else "")
        cells = [_ratio(change.ratios.get(size)) + (" *" if size in change.apart else "") for size in sizes]
        mark = " (latency not stable)" if change.doubt else ""
        table.add_row(escape(change.name + mark), escape(drop), *cells, _ratio(change.size))
    console = Console()
    console.width = max(110, console.width)
    console.print(table)
    beyond = sum(change.recall_beyond_noise or bool(change.apart) for change in changes)
    queries = next((row["queries"] for row in after["rows"] if row["queries"]), 0)
    log.info(f"{len(changes)} models on {queries} queries, {beyond} changed beyond noise (*)")


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"x {value:.3f}"


def _say_recommended(before: Row, after: Row) -> None:
    first, second = (title(row) if row else "nothing" for row in (recommend(before), recommend(after)))
    log.info(f"recommended: {second}" + ("" if first == second else f", before: {first}"))
