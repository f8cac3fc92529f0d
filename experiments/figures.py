"""Recorded figures: ``docs/results/<topic>.json``, and the Markdown tables drawn from these files.

``python -m experiments.figures`` (``make docs``) draws the tables of README.md and docs/*.md.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.views import select_view
from vpr.cli import silence_libraries
from vpr.common.errors import UserError
from vpr.common.hardware import environment
from vpr.common.log import configure_logging, get_logger

log = get_logger(__name__)

SCHEMA = 1
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
_MARKER = "<!-- table:"
_BLOCK = re.compile(rf"({_MARKER}(\w+)\.([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A stated number.

    Attributes:
        name: Measured quantity.
        value: Measurement; None if it could not be made (``command`` is then the attempt).
        unit: Unit of the value.
        goal: Goal; None for a number without one.
        comparison: Comparison of the value with the goal.
        command: Command that repeats the measurement.
        interval: 95 % interval, if there is one.
        seeds: Seeds of the measurement.
    """

    name: str
    value: float | None
    unit: str
    goal: float | None
    comparison: Literal[">=", "<="]
    command: str
    interval: tuple[float, float] | None = None
    seeds: tuple[int, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether the value meets the goal; None without a value or a goal."""
        if self.value is None or self.goal is None:
            return None
        return self.value >= self.goal if self.comparison == ">=" else self.value <= self.goal

    @property
    def row(self) -> Row:
        """Recorded form of the figure."""
        return {**asdict(self), "met": self.met}


def record(topic: str, figures: list[Figure], tables: Mapping[str, list[Row]], folder: Path = RESULTS) -> Path:
    """Write figures and tables of a topic; they replace those of the same name, all others stay."""
    path = folder / f"{topic}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"figures": [], "tables": {}}
    names = {figure.name for figure in figures}
    rows = [row for row in old["figures"] if row["name"] not in names]
    rows += [figure.row for figure in figures]
    content = {
        "schema": SCHEMA,
        "environment": environment(),
        "figures": rows,
        "tables": {**old["tables"], **tables},
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def record_unmeasured(figures: list[Figure], title: str, folder: Path = RESULTS) -> None:
    """Record that figures of topic ``gpu`` could not be measured here; measurements of another machine stay.

    Args:
        figures: Figures without values.
        title: Name of the measurement, for the log.
        folder: Folder of the results.
    """
    path = folder / "gpu.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else []
    names, commands = ({getattr(figure, key) for figure in figures} for key in ("name", "command"))
    # Engines are named after their artifact, and a step may have been measured with other flags.
    same = [row for row in recorded if row["name"] in names or row["command"] in commands]
    if any(row["value"] is not None for row in same):
        log.info(f"{title}: no GPU here, the recorded figures of another machine stay")
        return
    record("gpu", figures, {}, folder)
    log.info(f"{title}: no GPU here, recorded as not measured")


def print_figures(figures: list[Figure], table: list[Row]) -> None:
    """Print figures that are not recorded, and their table."""
    print(f"{markdown(figure_rows([figure.row for figure in figures]))}\n\n{markdown(table)}")


def command_of(topic: str, part: str) -> str:
    """Return the command that repeats the measurement of a part."""
    return f'make figures TOPIC={topic} PARTS="{part}"'


def measure(parts: Mapping[str, Callable[[], None]], names: Sequence[str]) -> None:
    """Measure the named parts of a topic, or all; a ``UserError`` ends the process with one line."""
    os.chdir(ROOT)
    silence_libraries()
    configure_logging()
    if unknown := [name for name in names if name not in parts]:
        raise SystemExit(f"error: no part '{unknown[0]}'. Choose from {', '.join(parts)}.")
    for name in names or parts:
        log.info(f"measuring {name}")
        try:
            parts[name]()
        except UserError as error:
            raise SystemExit(f"error: {error}") from None


def documents() -> list[Path]:
    """Return README.md and the pages of docs/ that have tables of results."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in pages if _MARKER in page.read_text(encoding="utf-8")]


def draw_tables(text: str, folder: Path = RESULTS) -> str:
    """Return ``text`` with every ``<!-- table:TOPIC.NAME -->`` block drawn from the results.

    The name ``figures`` draws the topic's figures.

    Raises:
        UserError: A block names a topic or table that is not recorded.
    """

    def draw(match: re.Match[str]) -> str:
        opening, topic, name, _, closing = match.groups()
        path = folder / f"{topic}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"tables": {}}
        rows = figure_rows(content["figures"]) if name == "figures" and path.is_file() else content["tables"].get(name)
        rows = select_view(f"{topic}.{name}", content) if rows is None else rows
        if rows is None:
            raise UserError(f"table '{topic}.{name}': it is not recorded. Run `make figures TOPIC={topic}`.")
        return f"{opening}{markdown(rows)}\n{closing}"

    return _BLOCK.sub(draw, text)


def figure_rows(figures: list[Row]) -> list[Row]:
    """Return figures as rows of a table; those without a value share the last row."""
    rows = [
        {
            "figure": figure["name"],
            "measured": _value_text(figure),
            "goal": "" if figure["goal"] is None else f"{figure['comparison']} {figure['goal']:g}",
            "met": {True: "yes", False: "**no**", None: ""}[figure["met"]],
        }
        for figure in figures
        if figure["value"] is not None
    ]
    if unmeasured := len(figures) - len(rows):
        rows.append({"figure": f"{unmeasured} more", "measured": "could not be measured", "goal": "", "met": ""})
    return rows


def markdown(rows: list[Row]) -> str:
    """Return a Markdown table with the columns of the first row."""
    if not rows:
        return "(empty)"
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row[name]).replace("|", "\\|") for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _value_text(figure: Row) -> str:
    value = f"{figure['value']:.4g} {figure['unit']}".strip()
    if figure["interval"] is None:
        return value
    low, high = figure["interval"]
    return f"{value} [{low:.4g}, {high:.4g}]"


def main() -> None:
    """Draw the tables of the documents."""
    configure_logging()
    for path in documents():
        text = path.read_text(encoding="utf-8")
        try:
            new = draw_tables(text)
        except UserError as error:
            sys.exit(f"experiments.figures: {path.name}: {error}")
        if new != text:
            path.write_text(new, encoding="utf-8")
        log.info(f"{path.relative_to(ROOT)}: {'tables are up to date' if new == text else 'tables drawn'}")


if __name__ == "__main__":
    main()
