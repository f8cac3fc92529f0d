"""Recommendation: the model to deploy by a stated rule, and its evidence, from ``report.json`` alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.recall.paired_drop import compute_recall_drop
from benchmarks.report.rivals import compare_rivals
from benchmarks.report.schema import LEAK_NOTE, Report, Row, Selection

DEPLOYABLE = ("student", "onnx", "engine")
SELECTION_SPLIT = "validation"
_AS_FAST = 1.05
_FEW_PRODUCTS = 30


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
    """Return the row that was chosen on the validation split, None without one.

    Nothing is recommended where a baseline that needs no model is as good on the scored split.
    """
    chosen = _chosen(report)
    return None if chosen is None or _baseline_as_good(report, chosen) else chosen


def build_verdict(report: Report) -> Verdict:
    """Return the model to deploy on this machine, its evidence and its caveats."""
    limit = f"recall@1 is at most {report.drop:g} below the FP32 student's"
    rule = f"Rule: the fastest model on this machine whose {limit}, chosen on the validation split, scored on another."
    selection, chosen = report.selection, _chosen(report)
    if selection is None or chosen is None:
        return Verdict(f"No recommendation: {_reason_without_choice(report)}", [], rule, _not_run(report))
    if baseline := _baseline_as_good(report, chosen):
        headline = f"No recommendation: {baseline.title}, which needs no model, is as good as {chosen.title}"
        remedy = "Train the models longer, or start the teacher from pretrained weights."
        return Verdict(headline, _facts(report, chosen), rule, [remedy, *_not_run(report)])
    doubts = _doubts(report, selection, chosen)
    headline = f"{'Preliminary' if doubts else 'Deploy'}{':' if doubts else ''} {chosen.title} ({chosen.precision})"
    return Verdict(headline, _facts(report, chosen), rule, doubts + _caveats(report, chosen) + _not_run(report))


def describe_conditions(report: Report) -> str:
    """Return the data set, the machine and the statistics that the numbers hold for."""
    catalog = report.catalog
    scored = next((row for row in report.rows if row.queries), None)
    queries, products, gallery = (scored.queries, scored.query_products, scored.gallery) if scored else (0, 0, 0)
    gpus = ", ".join(gpu["name"] for gpu in report.environment.gpus) or "no GPU"
    return (
        f"{queries} queries of {products} products against {gallery} gallery images "
        f"({catalog.split} split of {', '.join(catalog.sources)}). Intervals: 95 %, by product. "
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


def _chosen(report: Report) -> Row | None:
    if report.selection is None:
        return None
    return next((row for row in report.rows if row.title == report.selection.chosen and row.latency_ms), None)


def _reason_without_choice(report: Report) -> str:
    if report.reference is None:
        return "the drop needs an FP32 student, and --models has none"
    if not timed_batches(report.rows):
        return "no model was timed on this machine"
    if report.reference.latency_ms is None:
        return "the FP32 student was not timed on this machine"
    if report.catalog.split == SELECTION_SPLIT:
        return f"the report scores the {SELECTION_SPLIT} split, which the choice needs"
    return "the catalogue has no validation split with queries and a gallery that no search for layers has used"


def _baseline_as_good(report: Report, chosen: Row) -> Row | None:
    """Return the best baseline if it is not clearly worse than a row on the scored split."""
    baselines = [row for row in report.rows if row.stage == "baseline" and row.hits and chosen.hits]
    if not baselines:
        return None
    best = max(baselines, key=lambda row: row.recall_at_1 or 0.0)
    loss = compute_recall_drop(chosen.hits or {}, best.hits or {}, seed=0)
    return best if (loss.ci95[0] if loss.ci95 else loss.mean) <= 0 else None


def _doubts(report: Report, selection: Selection, chosen: Row) -> list[str]:
    """Return the reasons not to rely on the recommendation."""
    doubts = []
    if not selection.confirmed:
        doubts.append(f"The drop is not confirmed: {selection.reason}.")
    if selection.products < _FEW_PRODUCTS:
        doubts.append(f"It was chosen on {selection.products} products, fewer than {_FEW_PRODUCTS}.")
    if chosen.seen and chosen.seen.learned:
        doubts.append(f"The model has learned from what is scored ({chosen.seen.learned}): recall is overestimated.")
    doubts += [result.warning for result in compare_rivals(report) if result.warning]
    unstable = chosen.instabilities.items()
    return doubts + [f"Its latency at batch {batch} is unstable: {reason}." for batch, reason in unstable]


def _facts(report: Report, chosen: Row) -> list[tuple[str, str, str]]:
    student = report.reference if report.reference is not chosen else None
    batch = timed_batches(report.rows)[0]
    time, times = chosen.milliseconds(batch), chosen.milliseconds_ci95(batch)
    assert time is not None
    assert chosen.recall_at_1 is not None
    assert chosen.recall_drop is not None
    before = student.milliseconds(batch) if student else None
    timing = [f"95 % interval {times[0]:.2f} to {times[1]:.2f}"] if times else []
    if student and before and time:
        unstable = [row.title for row in (chosen, student) if batch in row.instabilities]
        factor = f"{before / time:.1f} times as fast as {student.title}"
        timing.append(f"no factor: the latency of {' and '.join(unstable)} is unstable" if unstable else factor)
    recall = f"95 % interval {chosen.ci95[0]:.3f} to {chosen.ci95[1]:.3f}" if chosen.ci95 else ""
    facts = [
        ("recall@1", f"{chosen.recall_at_1:.3f}", recall),
        ("drop to the FP32 student", format_signed(chosen.recall_drop), _drop_remark(report, chosen)),
        (f"p50, batch {batch}", f"{time:.2f} ms", "; ".join(timing)),
    ]
    if chosen.size_bytes is not None:
        share = chosen.size_bytes / student.size_bytes if student and student.size_bytes else None
        remark = "" if share is None else f"{share:.0%} of the FP32 student's"
        facts.append(("size", f"{chosen.size_bytes / 1e6:.1f} MB", remark))
    return facts


def _drop_remark(report: Report, chosen: Row) -> str:
    """Return the evidence on the drop: by test on the validation split, and on the scored split."""
    selection, bound, interval = report.selection, chosen.recall_drop_upper_bound, chosen.recall_drop_ci95
    remarks = [f"validation: {selection.reason}"] if selection and selection.confirmed else []
    if bound is not None and interval is not None and not chosen.reference:
        ends = f"{format_signed(interval[0])} to {format_signed(interval[1])}"
        remarks.append(f"this split: 95 % interval {ends}, upper bound {format_signed(bound)}")
    return "; ".join(remarks)


def _caveats(report: Report, chosen: Row) -> list[str]:
    caveats, bound = [], chosen.recall_drop_upper_bound
    if bound is not None and bound > report.drop and not chosen.reference:
        where = f"On the products of this report, the 95 % upper bound of the drop is {format_signed(bound)}"
        caveats.append(f"{where}, beyond the budget. Use more products.")
    if chosen.notes.startswith(LEAK_NOTE):
        caveats.append("The model was trained with a leak allowed, so its recall is overestimated.")
    batch = timed_batches(report.rows)[0]
    limit = _AS_FAST * (chosen.milliseconds(batch) or 0.0)
    near = [
        row.title
        for row in report.rows
        if row is not chosen and row.recall_drop is not None and row.recall_drop <= report.drop
        if row.stage in DEPLOYABLE and not row.rival and (row.milliseconds(batch) or limit + 1) <= limit
    ]
    return caveats + ([f"As fast within {_AS_FAST - 1:.0%}: {', '.join(near)}."] if near else [])


def _not_run(report: Report) -> list[str]:
    absent = [row.title for row in report.rows if row.stage != "baseline" and row.latency_ms is None]
    return [f"Not considered, because they cannot run on this machine: {', '.join(absent)}."] if absent else []
