"""Marks of rows whose model has seen what is scored: on screen, in the row and in its notes."""

from dataclasses import asdict

from benchmarks.report import schema
from vpr.common.log import get_logger
from vpr.data.seen import SeenCounts, describe_unrecorded

log = get_logger(__name__)

LEARNED_REASON = "the model has learned from these products, so its recall is overestimated"
SELECTED_REASON = "the epoch, weights or layers were chosen on these products, so recall may be overestimated"


def log_seen(name: str, seen: SeenCounts) -> None:
    """Warn if a model has learned from what is scored; log if it was selected on it, or if nothing is known."""
    if seen.learned:
        log.warning(f"{name}: {seen.learned}. Its recall is overestimated.")
    for mark in filter(None, (seen.selected, seen.unrecorded)):
        log.info(f"{name}: {mark}")


def to_counts(seen: SeenCounts) -> schema.SeenCounts:
    """Return the counts and their marks as reports store them."""
    return schema.SeenCounts(**asdict(seen), learned=seen.learned, selected=seen.selected)


def seen_notes(seen: schema.SeenCounts | None) -> list[str]:
    """Return each mark with the reason for it; empty if the model has seen nothing, or if no counts are stored."""
    if seen is None:
        return []
    marks = ((seen.learned, LEARNED_REASON), (seen.selected, SELECTED_REASON))
    notes = [f"{mark}: {reason}" for mark, reason in marks if mark]
    return [*notes, *filter(None, [describe_unrecorded(seen.unknown)])]


def add_seen(row: schema.Row, seen: SeenCounts) -> None:
    """Add the counts to a row, and each mark to its notes with the reason for it."""
    row.seen = to_counts(seen)
    if row.recall_at_1 is None:
        return
    for note in seen_notes(row.seen):
        row.add_note(note)
