"""Values of configurations in cards: new keys and new meanings make only those artifacts stale that they change."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from benchmarks.config import RecallConfig, ReportConfig
from export.config import OnnxConfig
from student.config import LAYER_KEYS, DistillConfig, LossConfig, StudentConfig
from teacher.config import HeadConfig, StageConfig, TowerConfig, TrainConfig
from vpr.common.config_values import config_values
from vpr.retrieval.config import EmbedConfig

DISTILL = DistillConfig(teacher=("t",), catalog="c", output="o")
TRAIN = TrainConfig("c", "o", tower=TowerConfig("sample", "", 32, embedding_dim=8))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (StudentConfig(), {"qkv_bias": True, "norm_eps": 1e-6, "activation": "quick-gelu", "pooled_norm": True}),
        (DISTILL, {"layer_decay": 0.9, "unlabelled_cosine": 0.8}),
        (RecallConfig("c", ("m",), "o"), {"leave_one_out": True, "skip_unmatched": True, "dimensions": 8}),
        (ReportConfig("c", ("m",), "o"), {"skip_unmatched": True}),
        (LossConfig(), {"nested": (8, 16), "token_similarity": 1.0, "token_feature": 1.0, "token_temperature": 0.1}),
        (HeadConfig(), {"nested": (8, 16)}),
        (EmbedConfig("m", "c", "o"), {"dimensions": 8}),
        (OnnxConfig("m", "o"), {"dimensions": 8}),
    ],
)
def test_later_keys_are_recorded_where_they_differ(config: Any, changes: dict[str, Any]) -> None:
    names = {field.name for field in fields(config)}
    later = set(config.later_keys())
    assert set(changes) <= later <= names
    assert config_values(config).keys() == names - later
    for key, value in changes.items():
        changed = config_values(replace(config, **{key: value}))
        assert changed[key] == value
        assert changed.keys() == (names - later) | {key}


def test_layers_of_a_student_are_recorded_inside_a_distillation() -> None:
    model = StudentConfig(preset="auto", pool="auto", layer_scale=True)
    values = config_values(replace(DISTILL, start="timm/vit_tiny_patch16_224", model=model))
    assert [key for key in LAYER_KEYS if key in values["model"]] == ["layer_scale"]


def test_students_of_unlabelled_images_are_made_again() -> None:
    """Near-duplicates by their hash were left out before, images of scored products now."""
    assert "unlabelled_by" not in config_values(DISTILL)
    assert config_values(replace(DISTILL, unlabelled=("more",)))["unlabelled_by"] == "embedding"


@pytest.mark.parametrize(
    ("stage", "dropout", "is_changed"),
    [
        (StageConfig("tower", 1), 0.2, True),
        (StageConfig("tower", 1, dropout=0.2), 0.0, True),
        (StageConfig("tower", 1, dropout=0.0), 0.2, False),
        (StageConfig("tower", 1), 0.0, False),
        (StageConfig("all", 1), 0.2, False),
        (StageConfig("head", 1), 0.2, False),
        (StageConfig("last", 1, last_blocks=1), 0.2, False),
    ],
)
def test_dropout_of_stages_of_the_tower_makes_a_teacher_stale(
    stage: StageConfig, dropout: float, is_changed: bool
) -> None:
    """The dropout after the tower was off where the tower alone is trained; other trainings are the same as before."""
    stages = (StageConfig("head", 1), stage)
    values = config_values(replace(TRAIN, tower=replace(TRAIN.tower, dropout=dropout), stages=stages))
    assert ("dropout" in values) == is_changed
