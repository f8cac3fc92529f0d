"""Was distilling worth it? The FP32 student against models that need no distillation, from ``report.json`` alone."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.recall.paired_drop import compute_recall_drop
from benchmarks.report.schema import Interval, Report, Row


@dataclass(frozen=True)
class RivalResult:
    """Paired difference of the FP32 student and one rival on the same queries."""

    title: str  # name of the rival and its backend
    recall: float  # recall@1 of the rival
    gain: float  # recall@1 of the student minus the rival's
    interval: Interval | None  # 95 % interval of the gain, by product; None with fewer than 10 products
    time_share: float | None  # p50 of the student over the rival's, at the smallest batch that both were timed with

    @property
    def outcome(self) -> Literal["ahead", "worse", "no difference shown", "too few products"]:
        """What the interval shows."""
        if self.interval is None:
            return "too few products"
        return "ahead" if self.interval[0] > 0 else "worse" if self.interval[1] < 0 else "no difference shown"

    @property
    def text(self) -> str:
        """One sentence for the report."""
        ends = "" if self.interval is None else f" [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"
        time = "" if self.time_share is None else f", at {self.time_share:.2f} times its p50"
        word = {"ahead": "ahead of", "worse": "worse than"}.get(self.outcome, f"{self.outcome} against")
        return f"{word} {self.title}: recall@1 {self.gain + 0.0:+.3f}{ends}{time}"

    @property
    def warning(self) -> str:
        """Reason to doubt the student; empty if there is none."""
        if self.outcome == "worse":
            return f"Distilling did not pay: {self.title} has a higher recall without it."
        if self.outcome == "no difference shown" and self.time_share is not None and self.time_share >= 1:
            return f"Distilling is not shown to pay: {self.title} is as fast, and not shown to be worse."
        return ""


def compare_rivals(report: Report) -> list[RivalResult]:
    """Compare the FP32 student with every scored rival; none without a student."""
    student = report.reference
    if student is None or student.hits is None:
        return []
    return [_compare(student, row) for row in report.rows if row.rival and row.hits]


def _compare(student: Row, rival: Row) -> RivalResult:
    loss = compute_recall_drop(rival.hits or {}, student.hits or {}, seed=0)
    batches = sorted(set(student.latency_ms or {}) & set(rival.latency_ms or {}), key=int)
    times = [row.milliseconds(batches[0]) for row in (student, rival)] if batches else [None, None]
    # compute_recall_drop takes the rival as the model before: what the student loses against it has the other sign.
    return RivalResult(
        rival.title,
        rival.recall_at_1 or 0.0,
        -loss.mean,
        None if loss.ci95 is None else (-loss.ci95[1], -loss.ci95[0]),
        times[0] / times[1] if times[0] and times[1] else None,
    )
