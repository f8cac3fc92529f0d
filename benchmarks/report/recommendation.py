"""Which engine to deploy, by a rule that is stated, and what that rests on. Drawn from ``report.json`` alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
_AS_FAST = 1.05


@dataclass(frozen=True)
class Verdict:
    """What the first screen says.

    Attributes:
        headline: what to deploy, in a few words.
        facts: name, value and remark of each number that the choice rests on.
        rule: how it was chosen.
        caveats: what else should be known before acting on it.
    """

    headline: str
    facts: list[tuple[str, str, str]]
    rule: str
    caveats: list[str]


def title(row: Row) -> str:
    """A model and what runs it."""
    return f"{row['name']} on {row['backend']}" if row["backend"] else str(row["name"])


def batches(rows: list[Row]) -> list[str]:
    """Images per call that any row was timed with, smallest first."""
    return sorted({batch for row in rows for batch in row["latency_ms"] or {}}, key=int)


def milliseconds(row: Row, batch: str, quantile: str = "p50") -> float | None:
    """A quantile of a row's latency at a batch size, or None."""
    found = (row["latency_ms"] or {}).get(batch)
    return None if found is None else float(found[quantile])


def milliseconds_ci95(row: Row, batch: str) -> list[float] | None:
    """The 95 % interval of a row's p50, where the calls sufficed for one."""
    ends = ((row["latency_ms"] or {}).get(batch) or {}).get("ci95", {}).get("p50")
    return None if ends is None or None in ends else list(ends)


def unstable(row: Row) -> dict[str, str]:
    """By batch, why a latency is not to be relied on."""
    return {batch: one["unstable"] for batch, one in (row["latency_ms"] or {}).items() if one.get("unstable")}


def reference(report: Row) -> Row | None:
    """The FP32 student's row."""
    return next((row for row in report["rows"] if row["reference"]), None)


def recommend(report: Row) -> Row | None:
    """The fastest row, at the smallest batch, whose paired drop of recall@1 to the FP32 student is within the budget.

    Only what was measured here can be recommended: rows without recall or latency are passed over, and
    so is the teacher, which the student replaces.
    """
    return min(_usable(report), key=_speed(report), default=None)


def verdict(report: Row) -> Verdict:
    """Which model to deploy on this machine, on what evidence, and what is doubtful about it."""
    rule = (
        "Rule: the fastest model measured here whose recall@1, on the same queries, is no more than "
        f"{report['drop']:g} below the FP32 student's."
    )
    chosen, student = recommend(report), reference(report)
    if chosen is None:
        return Verdict(f"Nothing can be recommended: {_why_none(report)}.", [], rule, _not_run(report))
    batch = batches(report["rows"])[0]
    time = milliseconds(chosen, batch)
    low, high = chosen["ci95"]
    assert time is not None
    ends = milliseconds_ci95(chosen, batch)
    timed = [f"95 % interval {ends[0]:.2f} to {ends[1]:.2f}"] if ends else []
    timed += [_speed_up(student, chosen, batch)] if student is not None and student is not chosen else []
    facts = [
        ("recall@1", f"{chosen['recall_at_1']:.3f}", f"95 % interval {low:.3f} to {high:.3f}"),
        ("drop to the FP32 student", signed(chosen["recall_drop"]), _interval(chosen["recall_drop_ci95"])),
        (f"p50, batch {batch}", f"{time:.2f} ms", "; ".join(filter(None, timed))),
    ]
    if chosen["size_bytes"] is not None:
        facts.append(("size", f"{chosen['size_bytes'] / 1e6:.1f} MB", _smaller(student, chosen)))
    headline = f"Deploy {title(chosen)} ({chosen['precision']})"
    return Verdict(headline, facts, rule, _caveats(report, chosen) + _not_run(report))


def conditions(report: Row) -> str:
    """What the numbers hold for."""
    environment, catalog = report["environment"], report["catalog"]
    row = next((row for row in report["rows"] if row["queries"]), {"queries": 0, "gallery": 0})
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"]) or "no GPU"
    products = catalog["products"][catalog["split"]]
    return (
        f"{row['queries']} queries against {row['gallery']} gallery images of {products} products "
        f"({catalog['split']} split of {', '.join(catalog['sources'])}). Intervals: 95 %, bootstrap over queries. "
        f"Latency: p50 on {environment['cpu']['model']}, {report['threads']} threads, {gpus}."
    )


def notes_of(report: Row) -> list[str]:
    """Why something was not measured or is not to be trusted; rows with the same note stand together."""
    found: dict[str, list[str]] = {}
    for row in report["rows"]:
        if row["notes"] and row["stage"] != "baseline":
            found.setdefault(row["notes"], []).append(title(row))
        for batch, reason in unstable(row).items():
            found.setdefault(f"latency at batch {batch} not stable: {reason}", []).append(title(row))
    return [f"{', '.join(names)}: {note}" for note, names in found.items()]


def signed(value: float) -> str:
    """A difference of recall, with its sign."""
    return f"{value + 0.0:+.3f}"


def _usable(report: Row) -> list[Row]:
    found = batches(report["rows"])
    return [
        row
        for row in report["rows"]
        if row["stage"] in ("student", "onnx", "engine")
        and row["recall_drop"] is not None
        and row["recall_drop"] <= report["drop"]
        and found
        and milliseconds(row, found[0]) is not None
    ]


def _speed(report: Row) -> Callable[[Row], float]:
    batch = batches(report["rows"])[:1]
    return lambda row: milliseconds(row, batch[0]) or 0.0


def _why_none(report: Row) -> str:
    if reference(report) is None:
        return "no student is among the models, so there is nothing that a drop could be taken to; add it to --models"
    return "no model within the budget was timed here"


def _caveats(report: Row, chosen: Row) -> list[str]:
    found = []
    high = chosen["recall_drop_ci95"][1]
    if high > report["drop"]:
        found.append(f"The interval of the drop reaches {signed(high)}, past the budget: more queries would settle it.")
    if chosen["notes"].startswith("trained with a leak"):
        found.append("It was trained with a leak allowed: its recall is not honest.")
    found += [f"Its latency at batch {batch} was not stable: {reason}." for batch, reason in unstable(chosen).items()]
    speed = _speed(report)
    near = [title(row) for row in _usable(report) if row is not chosen and speed(row) <= _AS_FAST * speed(chosen)]
    if near:
        found.append(f"As fast within {_AS_FAST - 1:.0%}: {', '.join(near)}.")
    return found


def _not_run(report: Row) -> list[str]:
    absent = [title(row) for row in report["rows"] if row["stage"] != "baseline" and row["latency_ms"] is None]
    return [f"Not run here, so not considered: {', '.join(absent)}."] if absent else []


def _interval(ends: list[float]) -> str:
    return f"95 % interval {signed(ends[0])} to {signed(ends[1])}"


def _speed_up(student: Row, chosen: Row, batch: str) -> str:
    before, after = milliseconds(student, batch), milliseconds(chosen, batch)
    return f"{before / after:.1f} times as fast as {title(student)}" if before and after else ""


def _smaller(student: Row | None, chosen: Row) -> str:
    if student is None or student is chosen or not student["size_bytes"]:
        return ""
    return f"{chosen['size_bytes'] / student['size_bytes']:.0%} of the FP32 student's"
