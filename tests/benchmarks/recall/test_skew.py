from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.config import RecallConfig, SkewConfig
from benchmarks.recall.measure import measure_recall
from benchmarks.recall.seen_marks import LEARNED_REASON
from benchmarks.recall.skew import measure_skew
from benchmarks.report.build import read_skew
from benchmarks.report.render import draw_html, draw_markdown
from benchmarks.report.schema import Skew, parse_report
from student.model import load_student
from vpr.artifacts.store import load_artifact
from vpr.cli import main
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.seen import seen_in
from vpr.imaging.pipelines import client_pipelines
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.config import RerankConfig


def read_rows(folder: Path) -> dict[str, dict]:
    return {row["pipeline"]: row for row in json.loads((folder / "skew.json").read_text(encoding="utf-8"))["rows"]}


@pytest.fixture(scope="module")
def rows(shop: Path, student_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    output = tmp_path_factory.mktemp("skew") / "skew"
    return read_rows(measure_skew(SkewConfig(str(shop), str(student_artifact), str(output))))


def test_every_known_pipeline_is_scored(rows: dict[str, dict]) -> None:
    assert list(rows) == list(client_pipelines(Preprocess(size=32)))
    assert all(row["description"] for row in rows.values())
    assert [name for name, row in rows.items() if row["agrees"]] == ["card", "decoder.full", "resize.tensor"]


def test_card_row_is_the_recall_of_the_model(
    rows: dict[str, dict], shop: Path, student_artifact: Path, tmp_path: Path
) -> None:
    config = RecallConfig(str(shop), (str(student_artifact),), str(tmp_path / "recall"), rerank=RerankConfig())
    recall = json.loads((measure_recall(config) / "recall.json").read_text(encoding="utf-8"))[-1]
    assert (rows["card"]["recall_at_1"], rows["card"]["ci95"]) == (recall["recall_at_1"], recall["ci95"])
    assert (rows["card"]["drop"], rows["card"]["cosine_mean"]) == (0, pytest.approx(1, abs=1e-6))
    assert (rows["card"]["drop_ci95"], rows["card"]["inputs_changed"]) == (None, 0)


def test_bgr_row_is_that_of_exchanged_channels(
    rows: dict[str, dict], shop_catalog: Catalog, student_artifact: Path
) -> None:
    """Recomputed with Pillow and PyTorch alone; the JPEGs of 48 pixels are decoded at full size."""
    model, artifact = load_student(student_artifact)
    preprocess = artifact.card.preprocess
    assert preprocess is not None
    part = shop_catalog.select(split="test")

    def embed(rows: np.ndarray, order: list[int]) -> np.ndarray:
        images = [Image.open(part.path(row)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC) for row in rows]
        pixels = np.stack([np.asarray(image)[:, :, order] for image in images]) / 255
        inputs = ((pixels - preprocess.mean) / preprocess.std).transpose(0, 3, 1, 2).astype(np.float32)
        with torch.inference_mode():
            return model(torch.from_numpy(inputs)).numpy()

    queries, gallery = np.flatnonzero(part.roles == "query"), np.flatnonzero(part.roles == "gallery")
    right, wrong, images = embed(queries, [0, 1, 2]), embed(queries, [2, 1, 0]), embed(gallery, [0, 1, 2])
    found = part.products[gallery][(wrong @ images.T).argmax(axis=1)]
    row = rows["colour.bgr"]
    assert row["recall_at_1"] == pytest.approx((found == part.products[queries]).mean(), abs=2 / len(queries))
    assert row["cosine_mean"] == pytest.approx((right * wrong).sum(axis=1).mean(), abs=1e-4)
    assert row["inputs_changed"] == 1
    assert row["drop"] == pytest.approx(rows["card"]["recall_at_1"] - row["recall_at_1"])
    assert row["drop_ci95"][0] <= row["drop"] <= row["drop_ci95"][1]
    assert 0 < row["p_value"] <= 1


def test_steps_without_effect_change_no_query(rows: dict[str, dict]) -> None:
    """The images are upright JPEGs without transparency, too small to be decoded at a reduced scale."""
    for name in (
        "orientation.ignored",
        "transparency.black",
        "transparency.dropped",
        "decoder.full",
        "decoder.reduced",
    ):
        assert (rows[name]["inputs_changed"], rows[name]["drop"]) == (0, 0), name
        assert rows[name]["cosine_mean"] == pytest.approx(1, abs=1e-6)


def test_command_prints_the_chosen_pipelines(
    shop: Path, student_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "skew", "--catalog", str(shop), "--model", str(student_artifact)]
    arguments += ["--output", str(tmp_path / "s"), "--pipelines", "colour.bgr", "resize.nearest", "--leave-one-out"]
    main(arguments)
    printed = capsys.readouterr()
    lines = [line.split()[0] for line in printed.out.splitlines() if re.match(r" ?(card|colour|resize)", line)]
    assert lines == ["card", "colour.bgr", "resize.nearest"]
    assert list(read_rows(tmp_path / "s")) == lines
    svg = (tmp_path / "s" / "skew.svg").read_text(encoding="utf-8")
    assert all(name in svg for name in lines)
    main(arguments)
    assert "up to date" in capsys.readouterr().err


def test_seen_products_are_marked_with_the_table(
    shop: Path,
    shop_catalog: Catalog,
    student_artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = shop_catalog.select(split="test")
    monkeypatch.setattr("benchmarks.recall.skew.read_seen", lambda artifact: seen_in(part, "training"))
    config = SkewConfig(str(shop), str(student_artifact), str(tmp_path / "s"), pipelines=("colour.bgr",))
    skew = read_skew(load_artifact(measure_skew(config)))
    count = len(np.unique(part.products))
    assert skew.seen is not None
    assert (skew.seen.products, skew.seen.seen_products["training"]) == (count, count)
    assert f"seen: {count} of {count} products in training: {LEARNED_REASON}" in capsys.readouterr().out
    older = skew.to_json()
    del older["seen"]
    assert Skew.model_validate(older).seen is None


def test_unknown_pipeline_is_rejected(shop: Path, student_artifact: Path, tmp_path: Path) -> None:
    config = SkewConfig(str(shop), str(student_artifact), str(tmp_path / "s"), pipelines=("color.bgr",))
    with pytest.raises(UserError, match=r"pipelines: unknown pipeline 'color.bgr' .* The nearest are 'colour.bgr'"):
        measure_skew(config)
    with pytest.raises(UserError, match="has no gallery images"):
        measure_skew(SkewConfig(str(shop), str(student_artifact), str(tmp_path / "s"), split="train"))
    assert not list(tmp_path.iterdir())


def test_report_draws_the_table(
    shop: Path, student_artifact: Path, report_artifact: Path, report_values: dict[str, Any], tmp_path: Path
) -> None:
    config = SkewConfig(str(shop), str(student_artifact), str(tmp_path / "skew"), pipelines=("layout.reshaped",))
    skew = read_skew(load_artifact(measure_skew(config)))
    assert [row.pipeline for row in skew.rows] == ["card", "layout.reshaped"]
    skew.rows[1].pipeline = "<script>alert(1)</script>"
    assert skew.seen is not None
    skew.seen.learned, skew.seen.unknown = "seen: 9 of 9 products in training", ["<script>alert(1)</script>"]
    report = parse_report({**report_values, "skews": [skew.to_json()]}, "report.json")
    page, text = draw_html(report), draw_markdown(report)
    title = f"Queries of student (torch) by other preprocessing: {skew.queries} of {skew.products} products"
    assert title in page
    assert f"## {title}" in text
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page + text
    assert f"{skew.rows[0].recall_at_1:.3f}" in text
    assert all(f"seen: 9 of 9 products in training: {LEARNED_REASON}" in drawn for drawn in (page, text))
    with pytest.raises(UserError, match=r"report: .*the artifact has no file 'skew.json'"):
        read_skew(load_artifact(report_artifact))
