from __future__ import annotations

import base64
import hashlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import storage_schema
from benchmarks.report.recommendation import build_verdict, collect_notes, recommend
from benchmarks.report.render import draw_html, draw_markdown
from benchmarks.report.schema import Latency, Report, Row, ScoredCatalog, Selection
from benchmarks.report.storage_schema import Storage, StorageDecision, StorageRow, StoredGallery


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


def test_page_needs_no_network_and_has_the_examples(report_artifact: Path, report_values: dict[str, Any]) -> None:
    page = _page((report_artifact / "report.html").read_text(encoding="utf-8"))
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    changed = len((report_values["changed_sheet"] or {"sheet": []})["sheet"])
    assert page.tags.count("section") == 3 + changed
    assert page.tags.count("svg") == 6  # two trade-offs, categories, trials, sensitivity, ranges
    assert len(page.ids) == len(set(page.ids))


def test_model_that_has_learned_from_the_scored_products_is_marked(report_values: dict[str, Any]) -> None:
    """In the table, in the notes, and by a recommendation that is preliminary."""
    report = Report.model_validate(report_values)
    assert "seen products" not in draw_markdown(report)
    chosen = recommend(report)
    mark = "seen: 3 of 32 products in training"
    counts = {"products": 32, "images": 64, "seen_products": {"training": 3}, "seen_images": {}, "unknown": []}
    for row in report_values["rows"][2:]:
        row |= {"seen": {**counts, "learned": mark, "selected": ""}, "notes": f"{mark}: recall is overestimated"}
    marked = Report.model_validate(report_values)
    assert "| 3 of 32 products in training |" in draw_markdown(marked)
    assert f"{mark}: recall is overestimated" in draw_html(marked)
    assert "seen products: scored products that training" in draw_html(marked)
    if chosen is not None:
        assert build_verdict(marked).headline.startswith("Preliminary")


def test_policy_allows_only_the_page_script(report_artifact: Path) -> None:
    page = _page((report_artifact / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in page.policy
    assert page.policy.endswith(f"script-src 'sha256-{digest}'")


def test_names_from_the_data_are_escaped(report_artifact: Path, report_values: dict[str, Any]) -> None:
    """conftest.py sets hostile products and categories; this test sets hostile names of models and notes."""
    html = (report_artifact / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $\\frac$ |" in html
    assert "Chairs &amp; &lt;b&gt;tables&lt;/b&gt;" in html  # in the chart
    evil = "<script>alert(2)</script>"
    report_values["rows"][2]["name"] = report_values["rows"][3]["notes"] = report_values["calibrations"][0]["name"] = (
        evil
    )
    report_values["decisions"][0]["name"] = report_values["command"] = report_values["rows"][4]["load_state"] = evil
    report_values["environment"]["cpu"]["model"] = evil
    report = Report.model_validate(report_values)
    assert evil not in draw_html(report)
    assert evil not in draw_markdown(report).replace(f"    {evil}", "")  # the command is an indented code block


def test_licences_are_drawn(report_values: dict[str, Any]) -> None:
    evil = "<script>alert(3)</script>"
    models = [row for row in report_values["rows"] if row["stage"] != "baseline"]
    assert all(row["licences"] == [] for row in models)  # the small models come from random weights
    assert all(row["licences"] is None for row in report_values["rows"] if row["stage"] == "baseline")
    models[0]["licences"] = ["cc-by-nc-4.0", evil]
    models[1].pop("licences")  # a report of an earlier version
    report = Report.model_validate(report_values)
    page, markdown = draw_html(report), draw_markdown(report)
    for text in (page, markdown):
        assert "cc-by-nc-4.0, &lt;script" in text
        assert evil not in text
        assert "licences" in text
    headings, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown.split("## Details")[1].splitlines()
        if line.startswith("|") and "---" not in line
    ]
    cells = [line[headings.index("licences")] for line in lines[: len(report.rows)]]
    assert [cell for cell, row in zip(cells, report.rows, strict=True) if row.stage == "baseline"] == ["–", "–"]
    assert cells.count("unknown") == len(models) - 2


def test_unknown_keys_and_missing_values_are_drawn(report_values: dict[str, Any]) -> None:
    row = report_values["rows"][3]
    row |= {"load_ms": 12.345, "of_ceiling": {"1": 0.5, "8": None}, "ceiling": {"flops": 1.0}}
    row["latency_ms"]["1"] |= {
        "ci95": {"p50": [0.5, None]},
        "unstable": "medians of the rounds -30% to +10% around their median",
    }
    text = draw_markdown(Report.model_validate(report_values))
    lines = text.split("Other measurements")[1].strip().splitlines()
    line = next(line for line in lines if "12.35" in line)
    cells = dict(zip(*([cell.strip() for cell in text.split("|")] for text in (lines[0], line)), strict=True))
    assert (cells["load ms"], cells["of ceiling, batch 1"], cells["of ceiling, batch 8"]) == ("12.35", "0.5", "–")
    assert "unstable latency at batch 1: medians of the rounds -30%" in text
    for row in report_values["rows"]:
        row |= {"latency_ms": None, "throughput": None, "by_category": None, "size_bytes": None}
    report_values |= {"calibrations": [], "decisions": [], "changed_sheet": None, "sheet": []}
    page = _page(draw_html(Report.model_validate(report_values)))
    assert "No recommendation" in page.text
    assert "svg" not in page.tags


PRODUCTS = 100


def _hits(recall: float) -> dict[str, str]:
    """Return the hits of one query of each product."""
    return {f"{number:03}": "01"[number < round(recall * PRODUCTS)] for number in range(PRODUCTS)}


def _row(name: str, stage: str, drop: float | None, p50: float | None, recall: float = 0.5) -> Row:
    row = Row.empty(name, stage, "torch", "fp32")
    row.reference = stage == "student"
    row.latency_ms = None if p50 is None else {"1": Latency(p50=p50, p90=p50, p99=p50)}
    if drop is not None:
        row.recall_at_1, row.ci95, row.hits = recall - drop, (0, 1), _hits(recall - drop)
        row.recall_drop, row.recall_drop_ci95 = drop, (drop - 0.01, drop + 0.01)
        row.recall_drop_upper_bound = drop + 0.009
    return row


def _report(rows: list[Row], drop: float, selection: Selection | None = None) -> Report:
    """Return a report that has rows, a budget, a split and a choice only."""
    catalog = ScoredCatalog(sha256="", split="test", sources=[], products={})
    return Report.model_construct(rows=rows, drop=drop, selection=selection, catalog=catalog)


def _rows() -> list[Row]:
    return [
        _row("colours", "baseline", 0.4, None),
        _row("student", "student", 0.0, 5.0),
        _row("fp16", "onnx", 0.01, 3.0),
        _row("int8", "onnx", 0.03, 1.0),
        _row("engine", "engine", None, None),
    ]


def _selection(chosen: str, confirmed: bool = True, products: int = 200) -> Selection:
    return Selection(
        split="validation",
        products=products,
        queries=products,
        confidence=0.95,
        sequence=[],
        chosen=f"{chosen} on torch",
        confirmed=confirmed,
        reason="confirmed: drop at most 0.02" if confirmed else "not confirmable: about 600 products are needed",
    )


def test_confirmed_choice_is_recommended_with_its_evidence() -> None:
    report = _report(_rows(), 0.02, _selection("fp16"))
    chosen, verdict = recommend(report), build_verdict(report)
    assert chosen is not None
    assert chosen.name == "fp16"
    assert verdict.headline == "Deploy fp16 on torch (fp32)"
    evidence = (
        "validation: confirmed: drop at most 0.02; this split: 95 % interval +0.000 to +0.020, upper bound +0.019"
    )
    assert verdict.facts[1] == ("drop to the FP32 student", "+0.010", evidence)
    assert verdict.facts[2] == ("p50, batch 1", "3.00 ms", "1.7 times as fast as student on torch")
    assert verdict.caveats == ["Not considered, because they cannot run on this machine: engine on torch."]
    assert "at most 0.02 below the FP32 student's" in verdict.rule


def test_doubtful_choice_is_called_preliminary() -> None:
    rows = _rows()
    rows[2].latency_ms["1"].unstable = "drift"
    rows.append(_row("fp16-b", "onnx", 0.0, 3.1))
    verdict = build_verdict(_report(rows, 0.015, _selection("fp16", confirmed=False, products=12)))
    assert verdict.headline == "Preliminary: fp16 on torch (fp32)"
    assert verdict.caveats == [
        "The drop is not confirmed: not confirmable: about 600 products are needed.",
        "It was chosen on 12 products, fewer than 30.",
        "Its latency at batch 1 is unstable: drift.",
        "On the products of this report, the 95 % upper bound of the drop is +0.019, beyond the budget. "
        "Use more products.",
        "As fast within 5%: fp16-b on torch.",
        "Not considered, because they cannot run on this machine: engine on torch.",
    ]


@pytest.mark.parametrize("unstable", ["student", "fp16"])
def test_unstable_latency_gives_no_factor(unstable: str) -> None:
    rows = _rows()
    next(row for row in rows if row.name == unstable).latency_ms["1"].unstable = "drift"
    remark = build_verdict(_report(rows, 0.02, _selection("fp16"))).facts[2][2]
    assert remark == f"no factor: the latency of {unstable} on torch is unstable"


def test_nothing_is_recommended_where_a_baseline_is_as_good() -> None:
    rows = _rows()
    rows[0] = _row("colours", "baseline", 0.02, None)
    report = _report(rows, 0.02, _selection("fp16"))
    assert recommend(report) is None
    headline = "No recommendation: colours on torch, which needs no model, is as good as fp16 on torch"
    assert build_verdict(report).headline == headline
    assert build_verdict(report).caveats[0].startswith("Train the models longer")


def test_no_recommendation_without_student_latency_or_validation() -> None:
    assert recommend(_report(_rows()[-1:], 0.0)) is None
    assert build_verdict(_report(_rows()[-1:], 0.0)).headline.endswith("needs an FP32 student, and --models has none")
    assert "has no validation split" in build_verdict(_report(_rows()[1:2], 0.0)).headline
    scored = _report(_rows()[1:2], 0.0)
    scored.catalog.split = "validation"
    assert "scores the validation split" in build_verdict(scored).headline
    untimed = _row("student", "student", 0.0, None)
    assert "the FP32 student was not timed" in build_verdict(_report([untimed, *_rows()[2:3]], 0.0)).headline
    assert "no model was timed" in build_verdict(_report([untimed], 0.0)).headline


def test_rows_with_the_same_note_are_grouped() -> None:
    rows = _rows()
    rows[1].notes = rows[2].notes = "peak memory: not measured"
    assert collect_notes(rows) == ["student on torch, fp16 on torch: peak memory: not measured"]


def test_storage_is_drawn_with_its_statement_and_a_chart_for_each_size(report_values: dict[str, Any]) -> None:
    """A setting that was not built has its reason in the table and no point in the chart."""
    setting: dict[str, Any] = {"dims": 8, "reduction": "pca", "format": "int8", "index": "flat", "rescoring": None}
    measured: dict[str, Any] = {"bytes_per_vector": 8.5, "single_ms": 0.5, "recall_at_1": 0.7, "ci95": (0.6, 0.8)}
    rows = [StorageRow(size=size, name="8 int8", **setting, **measured, drop=0.01, neighbours=0.9) for size in (20, 40)]
    rows.append(StorageRow(size=40, name="8 hnsw", **{**setting, "index": "hnsw"}, notes="not built: too <slow>"))
    step = storage_schema.TestedSetting(
        name="8 int8", bytes_per_vector=8.5, search_drop=0.0, drop=0.0, p_value=0.01, upper_bound=0.02, confirmed=True
    )
    decision = StorageDecision(
        size=40, max_recall_drop=0.05, confidence=0.95, max_ms=None, chosen="8 int8", outcome="confirmed: <b>",
        drop_upper_bound=0.02, smallest_confirmable_drop=0.01, search_products=20, confirmation_products=40,
        sequence=[step], untested=0,
    )  # fmt: skip
    galleries = [
        StoredGallery(size=size, real_images=10, real_distractors=0, synthetic_distractors=size - 10)
        for size in (20, 40)
    ]
    storage = Storage(
        name="s", model="student", reference="teacher", split="test", queries=9, products=3, threads=2,
        galleries=galleries, rows=rows, decisions=[decision],
    )  # fmt: skip
    plain, stored = (Report.model_validate({**report_values, "storages": drawn}) for drawn in ([], [storage.to_json()]))
    page, text = draw_html(stored), draw_markdown(stored)
    assert page.count("<svg") == draw_html(plain).count("<svg") + 2
    for part in (page, text):
        assert "Storage of student, against teacher: 9 queries of 3 products" in part
        assert "40 vectors: confirmed: &lt;b" in part
        assert "0.700 [0.600, 0.800]" in part
        assert "not built: too &lt;slow" in part
    assert storage.chosen(40) is rows[1]
    assert storage.chosen(20) is None
