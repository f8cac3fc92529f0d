from __future__ import annotations

from dataclasses import replace
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
        ("timm/resnet50", "a1_in1k", "bought", ["apache-2.0", "bought"]),
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


@pytest.mark.parametrize("licence", ["unknown", "None"])
def test_words_for_no_licence_are_rejected(licence: str) -> None:
    with pytest.raises(UserError, match=rf"tower\.licence: '{licence}' is no licence"):
        TowerConfig(licence=licence)


def test_required_licence_is_checked_before_training(catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    tower = TowerConfig("sample-vit", "")
    config = TrainConfig(
        str(catalog.artifact.path), str(tmp_path / "a"), tower=tower, require_licence=True, dry_run=True,
        stages=(StageConfig("all", 1),), loader=LoaderConfig(batch_size=16),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"tower\.licence: the licence of the initial weights is not known\. Set it\."):
        train(config)
    assert train(replace(config, tower=replace(tower, licence="mit"))) is None
    finished = replace(config, require_licence=False, dry_run=False)
    train(finished)
    with pytest.raises(UserError, match=r"tower\.licence: .* not known"):  # also for a teacher that is up to date
        train(replace(finished, require_licence=True))
    for name, licences in {"unknown": ["unknown", "mit"], "bound": ["cc-by-nc-4.0"]}.items():
        with write_artifact(tmp_path / name, "teacher", {}) as draft:
            draft.licences = licences
    load_artifact(tmp_path / "bound").require_licence()
    with pytest.raises(UserError, match="comes from has no recorded licence"):
        load_artifact(tmp_path / "unknown").require_licence()


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
