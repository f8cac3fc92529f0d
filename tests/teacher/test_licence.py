from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teacher.config import StageConfig, TowerConfig, TrainConfig
from teacher.licence import start_parent, weights_licences
from teacher.registry import read_tower
from teacher.train import _artifact_inputs, train
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig


@pytest.mark.parametrize(
    ("name", "pretrained", "licence", "expected"),
    [
        ("timm/convnextv2_atto", "fcmae", "", ["cc-by-nc-4.0"]),
        ("timm/resnet50", "a1_in1k", "", ["apache-2.0"]),
        ("timm/resnet50", "a1_in1k", "bought", ["bought"]),
        ("timm/resnet50.a1_in1k", "", "", []),
        ("timm/resnet50.a1_in1k", "w.safetensors", "", []),
        ("timm/resnet50.a1_in1k", "w.safetensors", "mit", ["mit"]),
        ("ViT-B-32", "laion2b_s34b_b79k", "", []),
        ("sample", "", "", []),
    ],
)
def test_licence_of_weights(name: str, pretrained: str, licence: str, expected: list[str]) -> None:
    assert weights_licences(TowerConfig(name, pretrained, licence=licence), read_tower(name)) == expected


@pytest.mark.parametrize("licence", ["x" * 101, " mit", "a\nb"])
def test_wrong_licence_is_rejected(licence: str) -> None:
    with pytest.raises(UserError, match=r"tower\.licence: expected an SPDX identifier"):
        TowerConfig(licence=licence)


def test_given_licence_replaces_only_an_unknown_one(tmp_path: Path) -> None:
    for name, licences in {"unknown": [], "bound": ["cc-by-nc-4.0"]}.items():
        with write_artifact(tmp_path / name, "teacher", {}) as draft:
            draft.licences = licences
    config = TowerConfig(licence="mit")
    assert start_parent(load_artifact(tmp_path / "unknown"), config).licences == ["mit"]
    assert start_parent(load_artifact(tmp_path / "bound"), config).licences == ["cc-by-nc-4.0"]
    assert start_parent(load_artifact(tmp_path / "unknown"), TowerConfig()).licences == ["unknown"]


def test_fine_tuned_teacher_inherits(catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    common: dict[str, Any] = {"stages": (StageConfig("all", 1),), "loader": LoaderConfig(batch_size=16)}
    first = TrainConfig(
        str(catalog.artifact.path), str(tmp_path / "a"), tower=TowerConfig("sample-vit", "", licence="mit"), **common
    )
    train(first)
    second = TrainConfig(
        str(catalog.artifact.path), str(tmp_path / "b"), tower=TowerConfig("sample-vit", str(tmp_path / "a")), **common
    )
    train(second)
    assert [load_artifact(tmp_path / name).card.licences for name in "ab"] == [["mit"], ["mit"]]


def test_empty_licence_is_no_part_of_the_configuration(catalog: Catalog) -> None:
    """Teachers of earlier versions stay up to date."""
    config = TrainConfig("c", "o", tower=TowerConfig("sample", ""))
    values, _ = _artifact_inputs(config, catalog, read_tower("sample"), "")
    assert "licence" not in values["tower"]
    assert "licence" not in values["network"]
