"""The stated figures: ``docs/results/<topic>.json``, and the tables drawn from them.

``python -m experiments.figures`` draws the tables of ``DOCUMENTS`` (``make readme``).
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
DOCUMENTS = ("README.md", "docs/results.md", "docs/reliability.md")
_BLOCK = re.compile(r"(<!-- table:(\w+)\.([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One stated number.

    Attributes:
        name: what is measured.
        value: the measurement; None if it could not be made (then ``command`` says what was tried).
        unit: of the value.
        goal: what was aimed at; None for a number that is only stated.
        comparison: the value meets the goal if it is ``>=`` or ``<=``.
        command: makes the measurement again.
        interval: 95 % interval, where there is one.
        seeds: that it rests on.
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
        """Whether the goal is met; None without a value or a goal."""
        if self.value is None or self.goal is None:
            return None
        return self.value >= self.goal if self.comparison == ">=" else self.value <= self.goal

    @property
    def row(self) -> Row:
        """As it is recorded."""
        return {**asdict(self), "met": self.met}


def record(topic: str, figures: list[Figure], tables: Mapping[str, list[Row]], folder: Path = RESULTS) -> Path:
    """Write figures and tables of a topic; those of the same name are replaced, others stay."""
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


def record_unmeasured(figures: list[Figure], what: str, folder: Path = RESULTS) -> None:
    """Record that figures of topic ``gpu`` could not be measured here; those that were measured elsewhere stay.

    Args:
        figures: without values.
        what: is not measured, for people.
        folder: of the results.
    """
    path = folder / "gpu.json"
    known = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else []
    names, commands = ({getattr(figure, key) for figure in figures} for key in ("name", "command"))
    # Engines are named after their artifact, and a step may have been measured with other flags.
    ours = [row for row in known if row["name"] in names or row["command"] in commands]
    if any(row["value"] is not None for row in ours):
        log.info("no GPU here: the figures of another machine stay")
        return
    record("gpu", figures, {}, folder)
    log.info(f"no GPU here: {what} recorded as not measured")


def show(figures: list[Figure], table: list[Row]) -> None:
    """Print figures that are not recorded, and the table behind them."""
    print(f"{markdown(figure_rows([figure.row for figure in figures]))}\n\n{markdown(table)}")


def command_of(topic: str, part: str) -> str:
    """The command that measures a part again."""
    return f'make figures TOPIC={topic} PARTS="{part}"'


def measure(parts: Mapping[str, Callable[[], None]], chosen: Sequence[str]) -> None:
    """Measure the ``chosen`` parts of a topic, all of them if none is; ends the process with one line on a fault."""
    os.chdir(ROOT)
    silence_libraries()
    configure_logging()
    if unknown := [part for part in chosen if part not in parts]:
        raise SystemExit(f"error: no part '{unknown[0]}': choose from {', '.join(parts)}")
    for part in chosen or parts:
        log.info(f"measuring {part}")
        try:
            parts[part]()
        except UserError as error:
            raise SystemExit(f"error: {error}") from None


def drawn(text: str, folder: Path = RESULTS) -> str:
    """``text`` with every ``<!-- table:TOPIC.NAME -->`` block drawn from the results.

    ``figures`` as a name draws the topic's figures themselves.

    Raises:
        UserError: a block names a topic or table that is not recorded.
    """

    def draw(match: re.Match[str]) -> str:
        opening, topic, name, _, closing = match.groups()
        path = folder / f"{topic}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"tables": {}}
        rows = figure_rows(content["figures"]) if name == "figures" and path.is_file() else content["tables"].get(name)
        rows = select_view(f"{topic}.{name}", content) if rows is None else rows
        if rows is None:
            raise UserError(f"README: table '{topic}.{name}' is not recorded: make figures TOPIC={topic}")
        return f"{opening}{markdown(rows)}\n{closing}"

    return _BLOCK.sub(draw, text)


def figure_rows(figures: list[Row]) -> list[Row]:
    """Figures as rows of a table for people; those that could not be measured share the last one."""
    rows = [
        {
            "figure": figure["name"],
            "measured": _value(figure),
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
    """A Markdown table; the columns are those of the first row."""
    if not rows:
        return "(empty)"
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row[name]).replace("|", "\\|") for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _value(figure: Row) -> str:
    value = f"{figure['value']:.4g} {figure['unit']}".strip()
    if figure["interval"] is None:
        return value
    low, high = figure["interval"]
    return f"{value} [{low:.4g}, {high:.4g}]"


def main() -> None:
    """Draw the tables of the documents."""
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        try:
            new = drawn(text)
        except UserError as error:
            sys.exit(f"experiments.figures: {error}")
        if new == text:
            log.info(f"{name}: its tables are as recorded")
            continue
        path.write_text(new, encoding="utf-8")
        log.info(f"{name}: tables drawn from docs/results")


if __name__ == "__main__":
    main()
