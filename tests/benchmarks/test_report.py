from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from benchmarks.baselines import colour_histogram, histogram, raw_pixels
from benchmarks.page import draw_html, draw_markdown, recommend
from benchmarks.recall import RecallConfig, empty_row, recall
from benchmarks.report import ReportConfig, report
from export.onnx_graph import OnnxConfig, export_onnx
from vpr.catalog import Catalog
from vpr.errors import UserError

FIELDS = {
    *("name", "stage", "backend", "precision", "params", "size_bytes", "recall_at_1", "recall_at_5", "recall_at_10"),
    *("map", "map_at_1000", "queries", "gallery", "ci95", "retention", "cosine_mean", "cosine_min", "top10_overlap"),
    *("latency_ms", "throughput", "cold_start_ms", "peak_memory_bytes", "notes"),
}


@pytest.fixture(scope="module")
def made(student_artifact: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    fp32 = export_onnx(OnnxConfig(str(student_artifact), str(folder / "fp32")))
    assert catalog.artifact is not None
    models = (str(student_artifact), str(fp32))
    return report(
        ReportConfig(str(catalog.artifact.path), models, str(folder / "report"), seconds=0.02, sheet_queries=3)
    )


@pytest.fixture
def measured(made: Path) -> dict[str, object]:
    return json.loads((made / "report.json").read_text())


def test_rows_have_the_fields_of_the_design(measured: dict[str, object]) -> None:
    assert measured["schema"] == 1
    assert all(set(row) >= FIELDS for row in measured["rows"])
    assert [row["name"] for row in measured["rows"]] == ["raw-pixels", "colour-histogram", "student", "fp32", "fp32"]
    for row in measured["rows"]:
        assert row["queries"] == row["gallery"] == 16
        assert row["ci95"][0] <= row["recall_at_1"] <= row["ci95"][1]
    exported = measured["rows"][3]
    assert exported["cosine_min"] > 0.99999
    assert exported["top10_overlap"] > 0.99
    assert exported["recall_at_1"] == measured["rows"][2]["recall_at_1"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]


def test_the_page_needs_no_network_and_shows_the_sheet(made: Path) -> None:
    page = _Page()
    page.feed((made / "report.html").read_text(encoding="utf-8"))
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "script" not in page.tags
    assert "svg" in page.tags
    assert page.tags.count("section") == 3
    assert page.tags.count("figure") == 3 * 5  # the student's top five; no teacher and no INT8 were given


def test_pages_are_drawn_from_the_json_alone(made: Path, measured: dict[str, object]) -> None:
    assert draw_markdown(measured) == (made / "report.md").read_text(encoding="utf-8")
    assert draw_html(measured) == (made / "report.html").read_text(encoding="utf-8")


def test_html_in_names_is_shown_as_text(measured: dict[str, object]) -> None:
    evil = "<script>alert(1)</script>"
    measured["sheet"][0]["product"] = evil
    measured["rows"][2]["name"] = evil
    assert evil not in draw_html(measured)
    assert evil not in draw_markdown(measured)


def _row(name: str, stage: str, recall_at_1: float | None, p50: float | None) -> dict[str, object]:
    latency = None if p50 is None else {"1": {"p50": p50}}
    row = empty_row(name, stage, "torch", "fp32")
    return {**row, "recall_at_1": recall_at_1, "ci95": [0, 1], "latency_ms": latency}


def test_the_fastest_within_the_allowed_drop_is_recommended() -> None:
    rows = [
        _row("teacher", "teacher", 0.9, 0.1),
        _row("student", "student", 0.50, 5.0),
        _row("fp16", "onnx", 0.49, 3.0),
        _row("int8", "onnx", 0.47, 1.0),
        _row("engine", "engine", None, None),
    ]
    assert recommend({"rows": rows, "drop": 0.02})["name"] == "fp16"
    assert recommend({"rows": rows, "drop": 0.04})["name"] == "int8"
    assert recommend({"rows": rows, "drop": 0.0})["name"] == "student"
    assert recommend({"rows": rows[-1:], "drop": 0.0}) is None


def test_histogram_equals_a_loop() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 7, 5), dtype=np.uint8)
    counts = np.zeros((8, 8, 8))
    for y in range(7):
        for x in range(5):
            red, green, blue = (int(v) * 8 // 256 for v in pixels[:, y, x])
            counts[red, green, blue] += 1
    np.testing.assert_allclose(histogram(pixels), np.sqrt(counts.ravel()))


def test_baselines_are_unit_vectors_in_order(catalog: Catalog) -> None:
    part = catalog.select(split="test")
    for vectors in (raw_pixels(part), colour_histogram(part)):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = Catalog(part.table.slice(5, 1), part.root)
    np.testing.assert_allclose(raw_pixels(alone)[0], raw_pixels(part)[5], atol=1e-7)


def test_recall_alone_and_a_split_without_queries(student_artifact: Path, catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    path, models = str(catalog.artifact.path), (str(student_artifact),)
    made = recall(RecallConfig(path, models, str(tmp_path / "recall")))
    rows = json.loads((made / "recall.json").read_text())
    assert [row["stage"] for row in rows] == ["baseline", "baseline", "student"]
    with pytest.raises(UserError, match="has no gallery pictures"):
        recall(RecallConfig(path, models, str(tmp_path / "again"), split="train"))
