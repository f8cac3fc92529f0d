from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.figures import ROOT, Figure, documents, draw_tables, figure_rows, measure, record, record_unmeasured
from experiments.views import select_view
from vpr.common.errors import UserError


def test_headline_joins_seeds_with_costs() -> None:
    run = {"model": "m", "backend": "b", "recall@1 [95 %]": "one seed", "ms, batch 1": "2", "MB": "3", "other": "4"}
    seed = {"model": "m", "backend": "b", "recall@1 [95 %]": "three seeds", "retention [95 %]": "5", "more": "6"}
    rows = select_view("demo.result", {"tables": {"demo": [run], "seeds": [seed]}, "figures": []})
    expected = {"recall@1 [95 %]": "three seeds", "retention [95 %]": "5", "ms, batch 1": "2", "MB": "3"}
    assert rows == [{"model": "m", "backend": "b"} | expected]
    assert select_view("demo.result", {"tables": {"demo": [run]}, "figures": []}) is None


@pytest.mark.parametrize(
    ("value", "goal", "comparison", "met"),
    [
        (2.0, 2.0, ">=", True),
        (1.9, 2.0, ">=", False),
        (1.9, 2.0, "<=", True),
        (2.1, 2.0, "<=", False),
        (None, 2.0, "<=", None),
        (2.0, None, "<=", None),
    ],
)
def test_met_compares_value_with_goal(value: float | None, goal: float | None, comparison: str, met: bool) -> None:
    assert Figure("f", value, "s", goal, comparison, "make").met is met


def test_record_replaces_by_name(tmp_path: Path) -> None:
    record("demo", [Figure("a", 1, "s", 2, "<=", "make"), Figure("b", 1, "s", 2, "<=", "make")], {"t": []}, tmp_path)
    path = record("demo", [Figure("a", 3, "s", 2, "<=", "make")], {"u": []}, tmp_path)
    content = json.loads(path.read_text())
    assert {row["name"]: row["met"] for row in content["figures"]} == {"b": True, "a": False}
    assert set(content["tables"]) == {"t", "u"}
    assert content["environment"]["packages"]["torch"]
    assert not list(tmp_path.glob("*.partial"))


def test_unmeasured_figures_keep_other_measurements(tmp_path: Path) -> None:
    def recorded() -> dict[str, float | None]:
        rows = json.loads((tmp_path / "gpu.json").read_text())["figures"]
        return {row["name"]: row["value"] for row in rows}

    step = [Figure("step", None, "images/s", None, ">=", "python -m step")]
    record("gpu", [Figure("engine", 3.0, "ms", None, "<=", "python -m engines")], {}, tmp_path)
    record_unmeasured(step, "step", tmp_path)
    assert recorded() == {"engine": 3.0, "step": None}
    record("gpu", [Figure("step", 5.0, "images/s", None, ">=", "python -m step --steps 9")], {}, tmp_path)
    record_unmeasured(step, "step", tmp_path)
    record_unmeasured([Figure("other", None, "ms", None, "<=", "python -m engines")], "engine", tmp_path)
    assert recorded() == {"engine": 3.0, "step": 5.0}


def test_tables_are_drawn_into_blocks(tmp_path: Path) -> None:
    record("demo", [Figure("a", 0.5, "", 0.4, ">=", "make", (0.4, 0.6))], {"t": [{"x": 1, "y": "a|b"}]}, tmp_path)
    text = "before\n<!-- table:demo.t -->\nold\n<!-- /table -->\n<!-- table:demo.figures -->\n<!-- /table -->\nafter\n"
    drawn = draw_tables(text, tmp_path)
    assert "| 1 | a\\|b |" in drawn
    assert "| a | 0.5 [0.4, 0.6] | >= 0.4 | yes |" in drawn
    assert "old" not in drawn
    assert draw_tables(drawn, tmp_path) == drawn
    with pytest.raises(UserError, match=r"table 'demo\.z': it is not recorded. Run `make figures TOPIC=demo`"):
        draw_tables("<!-- table:demo.z -->\n<!-- /table -->", tmp_path)


def test_missed_goal_is_shown() -> None:
    (row,) = figure_rows(
        [{"name": "a", "value": 1, "unit": "s", "interval": None, "goal": 2, "comparison": ">=", "met": False}]
    )
    assert row["met"] == "**no**"


def test_unmeasured_figures_share_a_row() -> None:
    unmeasured = {"name": "a", "value": None, "unit": "s", "interval": None, "goal": 2, "comparison": ">=", "met": None}
    (row,) = figure_rows([unmeasured, unmeasured])
    assert (row["figure"], row["measured"]) == ("2 more", "could not be measured")


def test_named_parts_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    measured: list[str] = []

    def fail() -> None:
        raise UserError("b: it is broken. Fix it.")

    parts = {"a": lambda: measured.append("a"), "b": fail, "c": lambda: measured.append("c")}
    measure(parts, ["c"])
    assert measured == ["c"]
    with pytest.raises(SystemExit, match=r"^error: b: it is broken\. Fix it\.$"):
        measure(parts, [])
    assert measured == ["c", "a"]
    with pytest.raises(SystemExit, match=r"^error: no part 'd'\. Choose from a, b, c\.$"):
        measure(parts, ["d"])


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_tables_equal_recorded_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert draw_tables(text) == text, "make docs"
