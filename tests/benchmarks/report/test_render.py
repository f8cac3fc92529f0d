from __future__ import annotations

import base64
import hashlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recall.measure import empty_row
from benchmarks.report.recommendation import notes_of, recommend, verdict
from benchmarks.report.render import draw_html, draw_markdown


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attributes if name == "id"]
        if dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"] or ""

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.get_starttag_text() == "<script>":
            self.scripts.append(data)
        self.text += data


def _page(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    return page


def test_the_page_needs_no_network_and_shows_the_sheets(made: Path, measured: dict[str, Any]) -> None:
    page = _page((made / "report.html").read_text(encoding="utf-8"))
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    changed = len((measured["changed_sheet"] or {"sheet": []})["sheet"])
    assert page.tags.count("section") == 3 + changed
    assert page.tags.count("svg") == 6  # two trade-offs, categories, trials, layers alone, ranges
    assert len(page.ids) == len(set(page.ids))


def test_only_the_page_s_own_script_may_run(made: Path) -> None:
    page = _page((made / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in page.policy
    assert page.policy.endswith(f"script-src 'sha256-{digest}'")


def test_names_from_the_data_are_shown_as_text(made: Path, measured: dict[str, Any]) -> None:
    """Products and categories are evil already (see conftest); names of models and notes are made so here."""
    html = (made / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $\\frac$ |" in html
    assert "Chairs &amp; &lt;b&gt;tables&lt;/b&gt;" in html  # in the chart
    evil = "<script>alert(2)</script>"
    measured["rows"][2]["name"] = measured["rows"][3]["notes"] = measured["calibrations"][0]["name"] = evil
    measured["decisions"][0]["name"] = measured["command"] = measured["rows"][4]["load_state"] = evil
    measured["environment"]["cpu"]["model"] = evil
    assert evil not in draw_html(measured)
    assert evil not in draw_markdown(measured).replace(f"    {evil}", "")  # the command is an indented code block


def test_what_is_not_known_or_not_measured_is_drawn_all_the_same(measured: dict[str, Any]) -> None:
    row = measured["rows"][3]
    row |= {"load_ms": 12.345, "of_ceiling": {"1": 0.5, "8": None}, "ceiling": {"flops": 1.0}}
    row["latency_ms"]["1"] |= {"ci95": {"p50": [0.5, None]}, "unstable": "rounds' medians -30% to +10% around theirs"}
    text = draw_markdown(measured)
    lines = text.split("Also recorded")[1].strip().splitlines()
    line = next(line for line in lines if "12.35" in line)
    cells = dict(zip(*([cell.strip() for cell in one.split("|")] for one in (lines[0], line)), strict=True))
    assert (cells["load ms"], cells["of ceiling, batch 1"], cells["of ceiling, batch 8"]) == ("12.35", "0.5", "–")
    assert "latency at batch 1 not stable: rounds' medians -30%" in text
    for one in measured["rows"]:
        one |= {"latency_ms": None, "throughput": None, "by_category": None, "size_bytes": None}
    measured |= {"calibrations": [], "decisions": [], "changed_sheet": None, "sheet": []}
    page = _page(draw_html(measured))
    assert "Nothing can be recommended" in page.text
    assert "svg" not in page.tags


def _row(name: str, stage: str, drop: float | None, p50: float | None, recall: float = 0.5) -> dict[str, Any]:
    latency = None if p50 is None else {"1": {"p50": p50, "p90": p50, "p99": p50}}
    row = empty_row(name, stage, "torch", "fp32")
    if drop is not None:
        row |= {"recall_at_1": recall - drop, "recall_drop": drop, "recall_drop_ci95": [drop - 0.01, drop + 0.01]}
        row |= {"ci95": [0, 1]}
    return {**row, "latency_ms": latency, "reference": stage == "student"}


def _rows() -> list[dict[str, Any]]:
    return [
        _row("teacher", "teacher", -0.4, 0.1),
        _row("student", "student", 0.0, 5.0),
        _row("fp16", "onnx", 0.01, 3.0),
        _row("int8", "onnx", 0.03, 1.0),
        _row("engine", "engine", None, None),
    ]


@pytest.mark.parametrize(("drop", "name"), [(0.02, "fp16"), (0.04, "int8"), (0.0, "student")])
def test_the_fastest_within_the_allowed_drop_is_recommended(drop: float, name: str) -> None:
    chosen = recommend({"rows": _rows(), "drop": drop})
    assert chosen is not None
    assert chosen["name"] == name


def test_the_verdict_tells_what_is_doubtful() -> None:
    rows = _rows()
    rows[2]["latency_ms"]["1"]["unstable"] = "drift"
    rows.append(_row("fp16-b", "onnx", 0.0, 3.1))
    said = verdict({"rows": rows, "drop": 0.015})
    assert said.headline == "Deploy fp16 on torch (fp32)"
    assert said.facts[1] == ("drop to the FP32 student", "+0.010", "95 % interval +0.000 to +0.020")
    assert said.facts[2] == ("p50, batch 1", "3.00 ms", "1.7 times as fast as student on torch")
    assert said.caveats == [
        "The interval of the drop reaches +0.020, past the budget: more queries would settle it.",
        "Its latency at batch 1 was not stable: drift.",
        "As fast within 5%: fp16-b on torch.",
        "Not run here, so not considered: engine on torch.",
    ]
    assert "no more than 0.015 below the FP32 student's" in said.rule


def test_without_a_student_or_a_latency_nothing_is_recommended() -> None:
    assert recommend({"rows": _rows()[-1:], "drop": 0.0}) is None
    assert "no student is among the models" in verdict({"rows": _rows()[-1:], "drop": 0.0}).headline
    assert "no model within the budget was timed" in verdict({"rows": _rows()[1:2], "drop": -0.5}).headline


def test_rows_with_the_same_note_stand_together() -> None:
    rows = _rows()
    rows[0]["notes"] = rows[1]["notes"] = "peak memory: not measured"
    assert notes_of({"rows": rows}) == ["teacher on torch, student on torch: peak memory: not measured"]
