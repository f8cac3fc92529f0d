"""Commands that faults happen to, and the comparison of their results with an uninterrupted run."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

from tests.reliability.commands import BY_OUTPUT, Command
from vpr.artifacts.store import load_artifact

# Each stage reads earlier ones.
STAGES: tuple[Command, ...] = tuple(
    BY_OUTPUT[name]
    for name in (
        *("catalog", "shards", "teacher", "student", "embeddings", "shard-embeddings"),
        *("fp32", "ranges", "int8", "engine", "uint8", "teacher-fp32", "graph-embeddings", "threshold", "serving"),
        "report",
    )
)
# Logs have times in them, and one folder for each start.
_LOGS = ("metrics*.csv", "*/csv-*", "*/tb/*")
_TIMES = ("seconds", "build_seconds")
# Files of latencies; their deterministic columns are compared instead.
_TIMED_FILES = {"report": ("report.json", "report.md", "report.html")}
_MEASURED = ("name", "backend", "precision", "params", "size_bytes", "recall_at_1", "recall_at_5", "map", "ci95")


def differences(stage: Command, expected: Path, actual: Path) -> list[str]:
    """Return the names of card entries and files that differ between two artifacts of a stage.

    Files are compared bit for bit, except logs and times.
    """
    first, second = (_content(stage, path) for path in (expected, actual))
    return [name for name in first | second if first.get(name) != second.get(name)]


def _content(stage: Command, path: Path) -> dict[str, Any]:
    card = load_artifact(path).card
    content = card.model_dump(exclude={"created", "environment", "files", "metrics"})
    content["metrics"] = {key: value for key, value in card.metrics.items() if key not in _TIMES}
    timed = _TIMED_FILES.get(stage.output, ())
    content |= {name: entry for name, entry in card.files.items() if not _matches(name, (*_LOGS, *timed))}
    if timed:
        rows = json.loads((path / "report.json").read_text(encoding="utf-8"))["rows"]
        content["rows"] = [{key: row[key] for key in _MEASURED} for row in rows]
    return content


def leftovers(expected: Path, actual: Path) -> list[str]:
    """Return the files below ``actual`` that are not below ``expected``, logs aside."""
    return sorted(_files(actual) - _files(expected))


def _files(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not _matches(name, ("*/metrics*.csv", *_LOGS))}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
