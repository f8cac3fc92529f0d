from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import numpy as np
import pytest

from benchmarks.config import ReportConfig
from benchmarks.recall.baselines import colour_histogram, histogram, raw_pixels
from benchmarks.recall.measure import ScoredModel
from benchmarks.report.build import choose_row, format_command
from benchmarks.report.render import draw_html, draw_markdown
from benchmarks.report.schema import Report, parse_report, read_report
from vpr.cli import read_config
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.config import RerankConfig

FIELDS = {
    *("name", "stage", "backend", "precision", "params", "size_bytes", "recall_at_1", "recall_at_5", "recall_at_10"),
    *("map", "map_at_1000", "queries", "gallery", "ci95", "retention", "cosine_mean", "cosine_min", "top10_overlap"),
    *("latency_ms", "throughput", "cold_start_ms", "peak_memory_bytes", "notes"),
}


def test_rows_have_the_documented_keys(report_values: dict[str, Any]) -> None:
    assert report_values["schema"] == 2
    assert all(set(row) >= FIELDS for row in report_values["rows"])
    names = ["raw-pixels", "colour-histogram", "student", "fp32", "fp32", "int8", "int8"]
    assert [row["name"] for row in report_values["rows"]] == names
    for row in report_values["rows"]:
        assert row["queries"] == row["query_products"] == row["gallery"] == len(row["hits"]) == 32
        assert row["ci95"][0] <= row["recall_at_1"] <= row["ci95"][1]
        assert row["recall_at_1"] == "".join(row["hits"].values()).count("1") / 32
    student, exported = report_values["rows"][2:4]
    assert student["reference"]
    assert (student["recall_drop"], student["recall_drop_ci95"], student["recall_drop_upper_bound"]) == (0, None, None)
    assert exported["cosine_min"] > 0.99999
    assert exported["top10_overlap"] > 0.99
    # No query changed of 32 products: (1 - p)^32 is 2.5 % on each side, and 5 % on one side.
    assert exported["recall_drop"] == 0
    assert exported["recall_drop_ci95"] == pytest.approx([-(1 - 0.025 ** (1 / 32)), 1 - 0.025 ** (1 / 32)])
    assert exported["recall_drop_upper_bound"] == pytest.approx(1 - 0.05 ** (1 / 32))


def test_recommendation_is_chosen_on_validation_products(report_values: dict[str, Any]) -> None:
    """The 5 products that the search for layers used are left out of the 16."""
    selection, (decision,) = report_values["selection"], report_values["decisions"]
    assert (selection["split"], selection["products"]) == ("validation", 16 - len(decision["search_products"]))
    titles = [candidate["title"] for candidate in selection["sequence"]]
    assert titles[0] == "student on torch"
    assert selection["chosen"] in titles
    assert selection["confirmed"]  # the report allows any drop


def test_nothing_is_chosen_on_products_that_the_search_for_layers_used(
    report_artifact: Path, shop_catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search may have used a larger catalogue with the same products."""
    report = read_report(report_artifact)
    every = [str(product) for product in np.unique(shop_catalog.products)]
    decision = report.decisions[0].model_copy(update={"search_products": every})
    monkeypatch.setattr("benchmarks.report.build.read_decision", lambda _: decision)
    model = SimpleNamespace(artifact=SimpleNamespace(card=SimpleNamespace(files={"decision.json": None})))
    scored = [ScoredModel(row, model=cast(Any, model)) for row in report.rows if row.stage != "baseline"]
    config = ReportConfig(str(shop_catalog), ("student",), "report", drop=1.0)
    assert choose_row(shop_catalog, scored, config) is None


def test_jsonschema_accepts_reports_and_rejects_broken_ones(report_artifact: Path) -> None:
    schema = json.loads((report_artifact / "report.schema.json").read_text(encoding="utf-8"))
    assert schema == Report.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    report_values = json.loads((report_artifact / "report.json").read_text(encoding="utf-8"))
    validator.validate(report_values)
    report_values["rows"][2]["load_ms"] = 12.0  # a key of a later version
    validator.validate(report_values)
    for key, value in (
        ("recall_at_1", 1.5),
        ("stage", "model"),
        ("latency_ms", {"1": {"p50": 3.0}}),
        ("hits", {"a": "012"}),
    ):
        broken = json.loads(json.dumps(report_values))
        broken["rows"][2][key] = value
        assert not validator.is_valid(broken), key
        with pytest.raises(UserError, match=rf"key 'rows\.2\.{key}.*Rerun"):
            parse_report(broken, "report.json")


def test_report_is_read_from_its_folder_or_its_file(
    report_artifact: Path, report_values: dict[str, Any], tmp_path: Path
) -> None:
    report = read_report(report_artifact)
    assert report == read_report(report_artifact / "report.json")
    assert json.loads(json.dumps(report.to_json())) == report_values
    file = tmp_path / "report.json"
    for content, message in (
        ("{", "not JSON"),
        ("[]", "key 'report'"),
        ('{"schema": 3}', "expected schema 2, got 3. Upgrade this package"),
        ('{"schema": 1}', "expected schema 2, got 1. Rerun `vpr bench report`"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_report(file)
    with pytest.raises(UserError, match="found no report"):
        read_report(tmp_path / "absent.json")


def test_pages_are_drawn_from_the_json_alone(report_artifact: Path, report_values: dict[str, Any]) -> None:
    report = Report.model_validate(report_values)
    assert draw_markdown(report) == (report_artifact / "report.md").read_text(encoding="utf-8")
    assert draw_html(report) == (report_artifact / "report.html").read_text(encoding="utf-8")


def test_changed_csv_has_the_counted_queries(report_artifact: Path, report_values: dict[str, Any]) -> None:
    with (report_artifact / "changed.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    for row in report_values["rows"][2:]:
        changed = [line for line in lines if (line["model"], line["backend"]) == (row["name"], row["backend"])]
        assert len(changed) == row["first_changed"]["queries"]
        right, wrong = (
            sum(line["right_before"] != flag and line["right_after"] == flag for line in changed) for flag in "10"
        )
        assert (right, wrong) == (row["first_changed"]["right"], row["first_changed"]["wrong"])
        assert row["recall_drop"] == pytest.approx((wrong - right) / 32)


def test_report_has_the_decision_and_the_ranges(report_values: dict[str, Any]) -> None:
    (decision,), (calibration,) = report_values["decisions"], report_values["calibrations"]
    assert decision["name"] == "int8"
    assert len(decision["single_layer_trials"]) == len(decision["layers"])
    assert calibration["name"] == "ranges"
    assert all(tensor["thresholds"][tensor["method"]] == tensor["threshold"] for tensor in calibration["tensors"])


def test_command_gives_the_same_configuration() -> None:
    config = ReportConfig(
        "runs/a catalog", ("a", "it's"), "out", batches=(1, 4), drop=0.01, rerank=RerankConfig(qe=3), seed=2
    )
    import shlex

    words = shlex.split(format_command(config))
    assert words[:3] == ["vpr", "bench", "report"]
    assert read_config(ReportConfig, "bench report", words[3:]) == config


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
    single = Catalog(part.table.slice(5, 1), part.root)
    np.testing.assert_allclose(raw_pixels(single)[0], raw_pixels(part)[5], atol=1e-7)
