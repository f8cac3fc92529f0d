from __future__ import annotations

from benchmarks.recall.seen_marks import LEARNED_REASON, SELECTED_REASON, add_seen, seen_notes, to_counts
from benchmarks.report.schema import Row
from vpr.data.seen import USES, SeenCounts


def test_notes_of_a_table_are_those_of_a_row() -> None:
    seen = SeenCounts(8, 20, dict(zip(USES, (3, 0, 1, 5), strict=True)), dict.fromkeys(USES, 0), ("old",))
    notes = seen_notes(to_counts(seen))
    assert notes == [
        f"seen: 3 of 8 products in training, 1 of 8 products in calibration: {LEARNED_REASON}",
        f"selected on: 5 of 8 products: {SELECTED_REASON}",
        "seen products unknown: old has no record of them",
    ]
    row = Row.empty("model", "student", None, None)
    row.recall_at_1 = 0.5
    add_seen(row, seen)
    assert all(note in row.notes for note in notes)
    assert row.seen == to_counts(seen)


def test_files_without_counts_have_no_notes() -> None:
    assert seen_notes(None) == []
    none = dict.fromkeys(USES, 0)
    assert seen_notes(to_counts(SeenCounts(1, 1, none, none, ()))) == []
