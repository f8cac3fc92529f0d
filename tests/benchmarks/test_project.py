"""A small project from images to an INT8 graph: it is moved, and its catalogue grows."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.config import RecallConfig
from benchmarks.recall.measure import measure_recall
from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from export.config import Int8Config, OnnxConfig
from export.int8 import export_int8
from export.to_onnx import export_onnx
from student.config import DimensionConfig, DistillConfig, QuantiseConfig, TargetsConfig
from student.distill import distill
from teacher.config import HeadConfig, SoupConfig, StageConfig, TowerConfig, TrainConfig
from teacher.soup import soup
from teacher.train import train
from tests.conftest import small_student
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig, LoaderConfig
from vpr.data.seen import count_seen, hash_catalog, read_seen
from vpr.retrieval.config import RerankConfig
from vpr.training.config import RunConfig

_STAGES = ("catalog", "teacher", "second", "soup", "student", "fp32", "ranges", "qat", "int8")
_RUN = RunConfig(precision="32-true")
_LOADER = LoaderConfig(batch_size=8, keep_in_memory=True)


@dataclass(frozen=True)
class Project:
    """Paths of a project, as its commands are given them."""

    folder: str

    def path(self, name: str) -> str:
        return f"{self.folder}/runs/{name}"

    def make(self) -> None:
        """Run all commands; the start of one teacher, QAT and a budget read earlier artifacts by their paths."""
        catalog = str(build_catalog(self.split()))
        stages = (StageConfig("all", 1, lr_head=1e-3, lr_tower=1e-3),)
        tower = TowerConfig("sample", "", 32)
        first = TrainConfig(
            catalog,
            self.path("teacher"),
            tower=tower,
            head=HeadConfig(scale=16.0),
            stages=stages,
            loader=_LOADER,
            run=_RUN,
        )
        train(first)
        second = {"output": self.path("second"), "tower": TowerConfig("sample", self.path("teacher"), 32)}
        train(TrainConfig(**{**vars(first), **second}))
        soup(SoupConfig((self.path("second"),), catalog, self.path("soup"), method="wise-ft", alphas=(0.5,)))
        student = DistillConfig(
            teacher=(self.path("soup"),),
            catalog=catalog,
            output=self.path("student"),
            model=replace(small_student("patch"), embedding_dim=8),
            targets=TargetsConfig(views=1),
            dimension=DimensionConfig("pca"),
            epochs=1,
            loader=_LOADER,
            run=_RUN,
        )
        distill(student)
        graph = str(export_onnx(OnnxConfig(self.path("student"), self.path("fp32"), catalog=catalog, images=8)))
        ranges = str(calibrate(CalibrateConfig(graph, catalog, self.path("ranges"), count=8)))
        qat = {"output": self.path("qat"), "start": self.path("student"), "quantise": QuantiseConfig(ranges)}
        distill(DistillConfig(**{**vars(student), **qat}))
        export_int8(
            Int8Config(
                graph, ranges, self.path("int8"), base="fp32", max_recall_drop=0.5, catalog=catalog, seconds=0.01
            )
        )

    def split(self, **changes: object) -> CatalogConfig:
        values = {"validation": 0.5, "test": 0.25, **changes}
        return CatalogConfig("folder", self.path("catalog"), f"{self.folder}/shop", **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, texture_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("made") / "project"
    for image in sorted(texture_folder.glob("*/*.jpg")):  # 64 products of two images
        product = folder / "shop" / f"{image.parent.name}-{int(image.stem) // 2}"
        product.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, product / image.name)
    Project(str(folder)).make()
    return folder


def _cards(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        name: (load_artifact(folder / "runs" / name).sha256, (folder / "runs" / name / "card.json").stat().st_mtime_ns)
        for name in (*_STAGES, "student-views", "qat-views")
    }


def _fail(*_: object) -> None:
    raise AssertionError("a model is trained again")


@pytest.mark.parametrize("is_relative", [False, True], ids=["absolute", "relative"])
def test_moved_project_is_up_to_date(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_relative: bool
) -> None:
    shutil.copytree(made, tmp_path / "moved")
    hidden = made.rename(made.with_name("gone"))  # nothing may be read at the old place
    try:
        before = _cards(tmp_path / "moved")
        for module in ("teacher.train", "student.distill"):
            monkeypatch.setattr(f"{module}.fit", _fail)
        monkeypatch.chdir(tmp_path)
        Project("moved" if is_relative else str(tmp_path / "moved")).make()
        assert _cards(tmp_path / "moved") == before
        catalog = load_catalog(tmp_path / "moved" / "runs" / "catalog")
        assert catalog.root == tmp_path / "moved" / "shop"
        assert not [name for name in os.listdir(tmp_path / "moved" / "runs") if ".run-" in name and "gone" in name]
    finally:
        hidden.rename(made)


def test_every_model_records_what_it_has_seen(made: Path) -> None:
    products = {split: _products(made / "runs" / "catalog", split) for split in ("train", "validation")}
    uses = {
        "teacher": ("training", "selection"),
        "soup": ("training", "selection"),
        "student": ("training", "distillation", "selection"),
        "ranges": ("training", "distillation", "calibration", "selection"),
        "qat": ("training", "distillation", "calibration", "selection"),
        "int8": ("training", "distillation", "calibration", "selection"),
    }
    everything = load_catalog(made / "runs" / "catalog")
    for name, expected in uses.items():
        counts = _counts(made / "runs" / name, everything)
        assert [use for use, count in counts.items() if count] == list(expected), name
        assert counts["training"] == len(products["train"])
        assert counts["selection"] == len(products["validation"])


def test_model_is_marked_when_its_catalogue_has_grown_and_was_split_again(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "shop", tmp_path / "shop")
    (tmp_path / "shop" / "a00").mkdir()
    for number, brightness in enumerate((40, 80)):
        Image.new("RGB", (48, 48), (brightness, 90, 160)).save(tmp_path / "shop" / "a00" / f"{number}.png")
    project = Project(str(tmp_path))
    catalog = build_catalog(project.split(seed=7))
    scored, trained = _products(catalog, "test"), _products(made / "runs" / "catalog", "train")
    selected = scored & _products(made / "runs" / "catalog", "validation")
    assert scored & trained, "choose a seed that moves training products into the test split"
    models = tuple(str(made / "runs" / name) for name in ("teacher", "int8"))
    config = RecallConfig(str(catalog), models, str(tmp_path / "recall"), rerank=RerankConfig())
    rows = json.loads((measure_recall(config) / "recall.json").read_text())
    mark = f"seen: {len(scored & trained)} of {len(scored)} products in training"
    for row in rows[2:]:
        assert row["seen"]["seen_products"]["training"] == len(scored & trained)
        assert row["seen"]["seen_products"]["selection"] == len(selected)
        assert row["seen"]["unknown"] == []
        assert mark in row["notes"]
    assert {row["seen"] and row["seen"]["learned"] for row in rows[:2]} == {None}
    warnings = [line for line in capsys.readouterr().err.splitlines() if mark in line]
    assert [name for line in warnings for name in ("teacher:", "int8:") if name in line] == ["teacher:", "int8:"]


def test_validation_is_marked_as_selected_on(made: Path, tmp_path: Path) -> None:
    models = (str(made / "runs" / "student"),)
    config = RecallConfig(str(made / "runs" / "catalog"), models, str(tmp_path / "r"), "validation", RerankConfig())
    row = json.loads((measure_recall(config) / "recall.json").read_text())[-1]
    count = len(_products(made / "runs" / "catalog", "validation"))
    assert row["seen"]["selected"] == f"selected on: {count} of {count} products"
    assert row["seen"]["learned"] == ""


def test_scored_model_without_a_record_is_unknown(made: Path, tmp_path: Path) -> None:
    """Models of earlier versions have no record; they are scored, and the row says so."""
    old = tmp_path / "old"
    shutil.copytree(made / "runs" / "student", old)
    card = json.loads((old / "card.json").read_text())
    del card["files"]["seen.parquet"]
    (old / "card.json").write_text(json.dumps(card))
    config = RecallConfig(str(made / "runs" / "catalog"), (str(old),), str(tmp_path / "r"), rerank=RerankConfig())
    row = json.loads((measure_recall(config) / "recall.json").read_text())[-1]
    assert row["seen"]["unknown"] == ["student"]
    assert row["notes"] == "seen products unknown: student has no record of them"


def test_decision_counts_what_the_graph_has_seen(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The budget is tested on products of another split, of which the student has learned some."""
    project = Project(str(tmp_path))
    catalog = build_catalog(CatalogConfig("folder", project.path("catalog"), str(made / "shop"), 0.5, 0.0, 7))
    scored = _products(catalog, "validation")
    shared = scored & _products(made / "runs" / "catalog", "train")
    assert shared
    graph, ranges = (str(made / "runs" / name) for name in ("fp32", "ranges"))
    config = Int8Config(
        graph, ranges, project.path("int8"), base="fp32", max_recall_drop=0.5, catalog=str(catalog), seconds=0.01
    )
    decision = json.loads((export_int8(config) / "decision.json").read_text())
    assert decision["seen"]["seen_products"]["distillation"] == len(shared)
    assert f"seen: {len(shared)} of {len(scored)} products in training" in capsys.readouterr().err


def test_missing_images_of_a_moved_project_are_an_error(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs" / "catalog", tmp_path / "alone")
    (tmp_path / "alone" / "location.json").write_text(json.dumps({"root": "/absent", "relative": "absent"}))
    models = (str(made / "runs" / "student"),)
    with pytest.raises(UserError, match="/absent/product"):
        measure_recall(RecallConfig(str(tmp_path / "alone"), models, str(tmp_path / "r")))


def _products(catalog: Path, split: str) -> set[str]:
    return set(load_catalog(catalog).select(split=split).products.tolist())


def _counts(model: Path, catalog: Catalog) -> dict[str, int]:
    counts = count_seen(read_seen(load_artifact(model)), hash_catalog(catalog))
    return {str(use): count for use, count in counts.seen_products.items()}
