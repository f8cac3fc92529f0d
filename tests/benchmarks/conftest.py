"""A report of small models, built once; its product and category names try to break out of a page."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vpr.data.catalog import Catalog

EVIL = "<script>alert(1)</script> $\\frac$ |"
CATEGORIES = ("Chairs & <b>tables</b>", "$x^{$")


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, texture_folder: Path) -> Path:
    """Catalogue of the textures as products of two images, with hostile product and category names."""
    from experiments.teacher.shuffled_split import build_shuffled_catalog

    table = texture_folder / "shop.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "product", "category"])
        for number, folder in enumerate(sorted(path for path in texture_folder.iterdir() if path.is_dir())):
            for view, image in enumerate(sorted(folder.iterdir())):
                product = f"{EVIL} {number}-{view // 2}"
                writer.writerow([f"{folder.name}/{image.name}", product, CATEGORIES[number % 2]])
    output = tmp_path_factory.mktemp("shop") / "catalog"
    try:
        return build_shuffled_catalog("csv", str(table), str(output), 0.25, 0.5, seed=1)
    finally:
        table.unlink()


@pytest.fixture(scope="session")
def shop_catalog(shop: Path) -> Catalog:
    from vpr.data.catalog import load_catalog

    return load_catalog(shop)


@pytest.fixture(scope="session")
def report_artifact(student_artifact: Path, shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of a student, its FP32 graph, and an INT8 graph within a recall budget."""
    from benchmarks.config import ReportConfig
    from benchmarks.latency.cold_start import ColdStart
    from benchmarks.report.build import build_report
    from calibration.calibrate import calibrate
    from calibration.config import CalibrateConfig
    from export.config import Int8Config, OnnxConfig
    from export.int8 import export_int8
    from export.to_onnx import export_onnx

    folder = tmp_path_factory.mktemp("report")
    fp32 = str(export_onnx(OnnxConfig(str(student_artifact), str(folder / "fp32"))))
    ranges = str(calibrate(CalibrateConfig(fp32, str(shop), str(folder / "ranges"), count=16)))
    budget = Int8Config(
        fp32, ranges, str(folder / "int8"), base="fp32", max_recall_drop=0.0, catalog=str(shop), seconds=0.01
    )
    models = (str(student_artifact), fp32, str(export_int8(budget)))
    config = ReportConfig(
        str(shop), models, str(folder / "report"), seconds=0.02, ranges=(ranges,), sheet_queries=3, drop=1.0
    )
    # Each of the seven starts is a process that imports everything; latency/test_measure.py has real ones.
    start = ColdStart(3000.0, 2000.0, 10.0, 1 << 29)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.latency.cold_start.start_once", lambda model, threads: start)
        return build_report(config)


@pytest.fixture
def report_values(report_artifact: Path) -> dict[str, Any]:
    return json.loads((report_artifact / "report.json").read_text(encoding="utf-8"))
