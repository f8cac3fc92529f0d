"""Numbers of the recipes against those of their sources, read from the released code and written here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import teacher
from teacher.config import StageConfig, TrainConfig
from teacher.schedule import rate_factor
from vpr.cli import read_config
from vpr.imaging.config import ViewConfig

FOLDER = Path(teacher.__file__).parent / "recipes"
_HEAD_SGD = {"optimizer": "sgd", "momentum": 0, "weight_decay": 1e-4, "decay_vectors": True, "warmup": 0}
_HEAD_SGD |= {"schedule": "steps", "gamma": 0.1}
_ALL_DATA, _PRODUCTS = 0.55, 0.65  # margins


def _sgd(part: str, size: int, margin: float, stride: int = 0) -> dict[str, Any]:
    """Return a stage of the winner of GUIE: heads 6 epochs at 0.02, towers 3 epochs at 0.02 / 80."""
    common = {"train": part, "image_size": size, "margin": margin, "patch_stride": stride, **_HEAD_SGD}
    if part in ("tower", "all"):
        rates = {"lr_tower": 0.02 / 80} | ({"lr_head": 0.02 / 80} if part == "all" else {})
        return common | {"epochs": 3, "batch_size": 32, "milestones": (1,), **rates}
    return common | {"epochs": 6, "batch_size": 256, "milestones": (2, 4), "lr_head": 0.02}


_GUIE_STAGES = [
    _sgd("head", 0, _ALL_DATA),
    _sgd("tower", 0, _ALL_DATA),
    *(_sgd(part, 0, _PRODUCTS) for part in ("classes", "projection", "tower")),
    _sgd("all", 280, _ALL_DATA),
    *(_sgd(part, 280, _PRODUCTS) for part in ("classes", "projection", "tower")),
    _sgd("all", 290, _ALL_DATA, 12),
    *(_sgd(part, 290, _PRODUCTS, 12) for part in ("classes", "projection", "tower")),
]
_STREKALOV = {"decay_vectors": True, "weight_decay": 0.001569550092429341, "schedule": "steps", "gamma": 0.2}
_MELGOR = {"optimizer": "adamw", "weight_decay": 0.1, "decay_vectors": False, "schedule": "cosine"}

SOURCES: dict[str, dict[str, Any]] = {
    "seed": {
        "tower": {"name": "ViT-H-14", "keep_projection": True, "interpolation": "bilinear", "embedding_dim": 0},
        "head": {"loss": "arcface", "scale": 30, "margin": 0.3, "margin_step": 0.05, "margin_end": 0.8},
        "views": {"hue": 0.3, "contrast": 0.1, "saturation": 0.1, "brightness": 0, "jitter": 0.3, "flip": 0.5},
        "loader": {"batch_size": 32, "min_per_product": 20},
        "run": {"clip": 0, "ema": 0},
        "stages": [
            {"train": "all", "epochs": 10, "lr_head": 3e-4, "lr_tower": 3e-7, "weight_decay": 1e-2, "warmup": 0.1}
        ],
    },
    "guie-1st": {
        "tower": {
            "name": "ViT-H-14",
            "pretrained": "laion2b_s32b_b79k",
            "embedding_dim": 64,
            "projection_bias": True,
            "keep_projection": True,
            "dropout": 0.2,
        },
        "head": {"loss": "cosface", "scale": 30, "sub_centres": 1},
        "views": {"translate": 0.2, "scale": (0.8, 1.2), "rotate": 10, "affine": 0.7, "border": "black", "jitter": 0}
        | {"cutout": 0.5, "cutout_size": 0.4, "cutout_fill": 0, "cutout_min_size": 0, "flip": 0.5, "stretch": 0},
        "loader": {"max_per_product": 0, "min_per_product": 0},
        "run": {"clip": 0, "ema": 0},
        "stages": _GUIE_STAGES,
    },
    "guie-2nd": {
        "tower": {
            "name": "ViT-H-14",
            "pretrained": "laion2b_s32b_b79k",
            "embedding_dim": 64,
            "projection_bias": True,
            "keep_projection": False,
            "dropout": 0.2,
        },
        "head": {
            "loss": "arcface",
            "scale": 30,
            "margin": 0.3,
            "margin_step": 0.1,
            "margin_end": 0.8,
            "sub_centres": 1,
        },
        "views": {"translate": 0, "scale": (0.8, 1.2), "rotate": 10, "affine": 0.5, "border": "black", "flip": 0.5}
        | {"brightness": 0.1, "contrast": 0.1, "saturation": 0, "tint": 0, "jitter": 0.5, "stretch": 0}
        | {"cutout": 0.5, "cutout_size": 0.2, "cutout_min_size": 0.1, "cutout_fill": 0},
        "loader": {"batch_size": 32, "max_per_product": 100, "min_per_product": 20},
        "run": {"clip": 0, "ema": 0},
        "stages": [
            {"train": "all", "epochs": 10, "optimizer": "adamw", "lr_head": 1e-4, "lr_tower": 1e-4 * 1e-3}
            | {"weight_decay": 1e-5, "decay_vectors": True, "warmup": 1 / 10, "schedule": "epoch-cosine"}
        ],
    },
    "aicrowd-1st": {
        "tower": {"embedding_dim": 2048, "image_size": 256, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        | {"name": "convnext_xxlarge", "pretrained": "laion2b_s34b_b82k_augreg_rewind", "dropout": 0},
        "proxy": {"loss": "soft-triple", "centres": 12, "scale": 35, "gamma": 0.2636902056372232, "weight": 1}
        | {"margin": 0.49235800624558853, "lr": 0.001907224423048435, "weight_decay": 0.001496287235815297},
        "run": {"clip": 0.1, "clip_by": "value"},
        "stages": [
            {"batch_size": size, "images_per_product": group, "lr_tower": rate, "lr_head": rate, **_STREKALOV}
            | {"pair": {"positive_margin": 0.9, "negative_margin": 0.5, "positives": positives, "negatives": "hard"}}
            for size, group, rate, positives in (
                (80, 2, 6.091622019007595e-06, "semihard"),
                (60, 2, 6.091622019007595e-06, "semihard"),
                (108, 6, 1.091622019007595e-07, "hard"),  # configured as 112, no multiple of 6
            )
        ],
    },
    "melgor": {
        "tower": {"name": "convnext_xxlarge", "pretrained": "laion2b_s34b_b82k_augreg_soup", "embedding_dim": 0}
        | {"keep_projection": True},
        # The margin of the smallest class is m + m_min = 0.45 + 0.05, that of the largest m_min.
        "head": {"loss": "arcface", "scale": 30, "sub_centres": 3, "margin": 0.5, "margin_end": 0.5},
        "run": {"clip": 5},
        "loader": {"batch_size": 32},
        "stages": [
            {"epochs": epochs, "lr_head": rate, "lr_tower": 0.01 * rate, "warmup_steps": steps, **_MELGOR}
            | {"image_size": size, "batch": batch, "accumulate": accumulate, "dropout_of_stage": dropout}
            for epochs, rate, steps, size, batch, accumulate, dropout in (
                (3, 3e-4, 4500, 224, 48, 1, 0.2),
                (5, 3e-4, 4500, 256, 32, 1, 0.2),
                (3, 1e-4, 1000, 256, 32, 1, 0.0),
                (3, 1e-5, 1500, 256, 32, 4, 0.0),
                (3, 6e-6, 1500, 256, 32, 4, 0.0),
            )
        ],
    },
}


def _read(name: str) -> TrainConfig:
    arguments = ["--recipe", str(FOLDER / f"{name}.yaml"), "--catalog", "c", "--output", "o"]
    config = read_config(TrainConfig, "teacher train", arguments)
    assert isinstance(config, TrainConfig)
    return config


def _compare(found: Any, expected: dict[str, Any], where: str) -> None:
    for key, value in expected.items():
        actual = getattr(found, key)
        if isinstance(value, dict):
            _compare(actual, value, f"{where}.{key}")
        elif isinstance(value, float | int) and not isinstance(value, bool):
            assert actual == pytest.approx(value, rel=1e-4), f"{where}.{key}"
        else:
            assert (tuple(actual) if isinstance(value, tuple) else actual) == value, f"{where}.{key}"


@pytest.mark.parametrize("name", SOURCES)
def test_numbers_equal_those_of_the_source(name: str) -> None:
    config, source = _read(name), dict(SOURCES[name])
    stages = source.pop("stages")
    for section, expected in source.items():
        _compare(getattr(config, section), expected, section)
    assert len(config.stages) == len(stages)
    for number, (scheduled, expected) in enumerate(zip(config.schedule(), stages, strict=True), start=1):
        stage, values, where = scheduled.stage, dict(expected), f"stages {number}"
        if "margin" in values:
            margin = values.pop("margin")
            assert (scheduled.losses.head.margin, scheduled.losses.head.margin_end) == (margin, margin), where
            assert scheduled.losses.head.loss == "cosface"
        if "dropout_of_stage" in values:
            assert stage.tower(config.tower).dropout == values.pop("dropout_of_stage"), where
            assert stage.loader(config.loader).batch_size == values.pop("batch"), where
            assert stage.run(config.run).accumulate == values.pop("accumulate"), where
        _compare(scheduled.losses.pair, values.pop("pair", {}), f"{where}.pair")
        _compare(stage, values, where)
    if name == "aicrowd-1st":
        assert [scheduled.losses.proxy.centres for scheduled in config.schedule()] == [12, 10, 12]
        assert {scheduled.losses.proxy.lr for scheduled in config.schedule()} == {config.proxy.lr}
    if name == "melgor":
        assert config.head.margin * config.head.min_margin_ratio == pytest.approx(0.05)
        for scheduled in config.schedule()[2:]:
            assert scheduled.losses.weights() == {"contrastive": 1.0}
            assert (scheduled.losses.pair.memory, scheduled.losses.pair.negative_margin) == (32_000, 0.5)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_header_lists_the_deviations(path: Path) -> None:
    header = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert header is not None
    assert ("Deviations" in header[0]) == (path.stem in SOURCES or path.stem == "aicrowd-margin")
    assert all(len(line) <= 120 for line in path.read_text(encoding="utf-8").splitlines())


def _rates(stage: StageConfig, steps: int) -> list[float]:
    return [rate_factor(step, stage, steps) for step in range(steps)]


def _torch_rates(make: Any, epochs: int, steps_per_epoch: int) -> list[float]:
    """Return the rate of each step of a scheduler of PyTorch that is stepped once per epoch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(epochs):
        rates += [optimizer.param_groups[0]["lr"]] * steps_per_epoch
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_equal_those_of_pytorch() -> None:
    steps = StageConfig("all", 6, warmup=0, schedule="steps", milestones=(2, 4), gamma=0.1)
    expected = _torch_rates(lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [2, 4], gamma=0.1), 6, 7)
    assert _rates(steps, 42) == pytest.approx(expected)
    cosine = StageConfig("all", 5, warmup=0, schedule="epoch-cosine")
    expected = _torch_rates(lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5), 5, 7)
    assert _rates(cosine, 35) == pytest.approx(expected)
    constant = StageConfig("all", 3, warmup=0, schedule="steps")
    assert _rates(constant, 9) == [1.0] * 9


def test_warm_up_in_steps() -> None:
    stage = StageConfig("all", 3, warmup=0.9, warmup_steps=4)
    assert _rates(stage, 30)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(_rates(stage, 30)) == 1.0


def test_unused_settings_leave_older_cards_valid() -> None:
    """Keys that older cards do not have are recorded only where they differ from their defaults."""
    from vpr.common.config_values import config_values

    assert not {"momentum", "schedule", "dropout"} & config_values(StageConfig("all", 1)).keys()
    assert config_values(StageConfig("all", 2, momentum=0.0))["momentum"] == 0.0
    plain = config_values(ViewConfig(0, (1, 1), 0, 0))
    assert not {"hue", "affine", "border", "cutout_fill", "sampling"} & plain.keys()
    # Squares had random sides before, and magnified views were blurred.
    assert {"cutout_fill", "cutout_min_size"} <= config_values(ViewConfig(cutout=0.5)).keys()
    assert config_values(ViewConfig())["sampling"] == "bicubic"
