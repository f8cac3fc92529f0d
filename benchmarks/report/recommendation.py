"""Recommendation: the model to deploy by a stated rule, and its evidence, from ``report.json`` alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report.schema import LEAK_NOTE, Interval, Report, Row

_AS_FAST = 1.05


@dataclass(frozen=True)
class Verdict:
    """First screen of the report."""

    headline: str  # model to deploy, in a few words
    facts: list[tuple[str, str, str]]  # name, value and remark of each number that the choice rests on
    rule: str  # rule of the choice
    caveats: list[str]  # limits of the choice


def timed_batches(rows: Sequence[Row]) -> list[str]:
    """Return the batch sizes that any row was timed with, smallest first."""
    return sorted({batch for row in rows for batch in row.latency_ms or {}}, key=int)


def recommend(report: Report) -> Row | None:
    """Return the fastest row whose recall drop is within the budget, None without one.

    Speed is p50 at the smallest batch. The drop of recall@1 is paired with the FP32 student's. Rows without recall or
    latency on this machine are left out, and so is the teacher, which the student replaces.
    """
    candidates = _within_budget(report)
    return min(candidates, key=lambda candidate: candidate[1])[0] if candidates else None


def build_verdict(report: Report) -> Verdict:
    """Return the model to deploy on this machine, its evidence and its caveats."""
    limit = f"recall@1 is at most {report.drop:g} below the FP32 student's, on the same queries"
    rule = f"Rule: the fastest model on this machine whose {limit}."
    chosen = recommend(report)
    if chosen is None:
        reason = "no model within the budget was timed on this machine"
        if report.reference is None:
            reason = "the drop needs an FP32 student, and --models has none"
        return Verdict(f"No recommendation: {reason}.", [], rule, _not_run(report))
    headline = f"Deploy {chosen.title} ({chosen.precision})"
    return Verdict(headline, _facts(report, chosen), rule, _caveats(report, chosen) + _not_run(report))


def describe_conditions(report: Report) -> str:
    """Return the data set, the machine and the statistics that the numbers hold for."""
    catalog = report.catalog
    queries, gallery = next(((row.queries, row.gallery) for row in report.rows if row.queries), (0, 0))
    gpus = ", ".join(gpu["name"] for gpu in report.environment.gpus) or "no GPU"
    return (
        f"{queries} queries against {gallery} gallery images of {catalog.products[catalog.split]} products "
        f"({catalog.split} split of {', '.join(catalog.sources)}). Intervals: 95 %, bootstrap over queries. "
        f"Latency: p50 on {report.environment.cpu['model']}, {report.threads} threads, {gpus}."
    )


def collect_notes(rows: Sequence[Row]) -> list[str]:
    """Return the reasons for missing and doubtful values; rows with the same note are listed together."""
    titles: dict[str, list[str]] = {}
    for row in rows:
        if row.notes and row.stage != "baseline":
            titles.setdefault(row.notes, []).append(row.title)
        for batch, reason in row.instabilities.items():
            titles.setdefault(f"unstable latency at batch {batch}: {reason}", []).append(row.title)
    return [f"{', '.join(names)}: {note}" for note, names in titles.items()]


def format_signed(value: float) -> str:
    """Format a difference of recall with its sign."""
    return f"{value + 0.0:+.3f}"


def _within_budget(report: Report) -> list[tuple[Row, float]]:
    """Return the rows that may be recommended, with their p50 at the smallest batch."""
    candidates = []
    for batch in timed_batches(report.rows)[:1]:
        for row in report.rows:
            time = row.milliseconds(batch)
            if row.stage not in ("student", "onnx", "engine") or row.recall_drop is None or time is None:
                continue
            if row.recall_drop <= report.drop:
                candidates.append((row, time))
    return candidates


def _facts(report: Report, chosen: Row) -> list[tuple[str, str, str]]:
    student = report.reference if report.reference is not chosen else None
    batch = timed_batches(report.rows)[0]
    time, times = chosen.milliseconds(batch), chosen.milliseconds_ci95(batch)
    assert time is not None
    assert chosen.recall_at_1 is not None
    assert chosen.recall_drop is not None
    before = student.milliseconds(batch) if student else None
    timing = [f"95 % interval {times[0]:.2f} to {times[1]:.2f}"] if times else []
    timing += [f"{before / time:.1f} times as fast as {student.title}"] if student and before and time else []
    recall = f"95 % interval {chosen.ci95[0]:.3f} to {chosen.ci95[1]:.3f}" if chosen.ci95 else ""
    facts = [
        ("recall@1", f"{chosen.recall_at_1:.3f}", recall),
        ("drop to the FP32 student", format_signed(chosen.recall_drop), _signed_interval(chosen.recall_drop_ci95)),
        (f"p50, batch {batch}", f"{time:.2f} ms", "; ".join(timing)),
    ]
    if chosen.size_bytes is not None:
        share = chosen.size_bytes / student.size_bytes if student and student.size_bytes else None
        remark = "" if share is None else f"{share:.0%} of the FP32 student's"
        facts.append(("size", f"{chosen.size_bytes / 1e6:.1f} MB", remark))
    return facts


def _caveats(report: Report, chosen: Row) -> list[str]:
    caveats = []
    high = chosen.recall_drop_ci95[1] if chosen.recall_drop_ci95 else None
    if high is not None and high > report.drop:
        caveats.append(f"The interval of the drop ends at {format_signed(high)}, beyond the budget. Use more queries.")
    if chosen.notes.startswith(LEAK_NOTE):
        caveats.append("The model was trained with a leak allowed, so its recall is overestimated.")
    unstable = chosen.instabilities.items()
    caveats += [f"Its latency at batch {batch} is unstable: {reason}." for batch, reason in unstable]
    candidates = _within_budget(report)
    limit = _AS_FAST * min(time for _, time in candidates)
    if near := [row.title for row, time in candidates if row is not chosen and time <= limit]:
        caveats.append(f"As fast within {_AS_FAST - 1:.0%}: {', '.join(near)}.")
    return caveats


def _not_run(report: Report) -> list[str]:
    absent = [row.title for row in report.rows if row.stage != "baseline" and row.latency_ms is None]
    return [f"Not considered, because they cannot run on this machine: {', '.join(absent)}."] if absent else []


def _signed_interval(interval: Interval | None) -> str:
    return f"95 % interval {format_signed(interval[0])} to {format_signed(interval[1])}" if interval else ""
