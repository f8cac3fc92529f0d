"""Candidates for the defaults: what each changes, and that all process as many images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.student import candidates
from experiments.student.ablation import LARGER, Scores, Setting
from experiments.student.candidates import CANDIDATES, DEFAULT, MORE_CANDIDATES, Trial, candidate_row
from experiments.student.lightly import TeacherGrid, write_grid
from student.config import DistillConfig
from teacher.config import TowerConfig
from teacher.model import build_teacher, read_tower
from vpr.common.errors import UserError
from vpr.retrieval.metrics import evaluate_similarities

_GENERAL = "start from a student of images without labels"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[DistillConfig]:
    """Configurations of the distillations, which are not run."""
    configs: list[DistillConfig] = []

    def distil(config: DistillConfig) -> Path:
        configs.append(config)
        return Path(config.output)

    class Images:
        def select(self, split: str) -> range:
            return range(30)

    monkeypatch.setattr(candidates, "train_student", distil)
    monkeypatch.setattr(candidates, "load_catalog", lambda _: Images())
    return configs


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    others = tmp_path / "others"
    others.mkdir()
    for number in range(60):
        (others / f"{number}.jpg").touch()
    setting = Setting("s", tmp_path / "teacher", tmp_path / "catalog", tmp_path / "students", 6, 6, "command")
    return Trial(setting, {**CANDIDATES, **MORE_CANDIDATES}, others)


def test_only_what_the_candidate_names_differs_from_the_default(trial: Trial, trained: list[DistillConfig]) -> None:
    for name in trial.candidates:
        trial.train(name, seed=1)
    by_name = {Path(config.output).name: config for config in trained}
    default = by_name["default-seed1"]
    assert (default.start, default.targets.mode, default.epochs) == ("", "cached", 6)
    selected = by_name["weights-selected-from-a-larger-student-seed1"]
    assert replace(selected, start="", output=default.output) == default
    larger = by_name[Path(selected.start).name]
    assert larger.model.dim == LARGER.dim > selected.model.dim
    online = by_name["losses-of-lightly-train-v1-seed1"]
    assert (online.targets.mode, online.targets.mixup, online.losses.cosine) == ("online", 1.0, 0.0)
    assert (online.epochs, online.model) == (default.epochs, default.model)
    tokens = by_name["losses-of-eupe-seed1"]
    assert (tokens.targets.mode, tokens.targets.mixup, tokens.losses.tokens) == ("online", 0.0, ("token_feature",))


def test_images_without_labels_shorten_the_training(trial: Trial, trained: list[DistillConfig]) -> None:
    """30 images of the catalogue and 60 others: a third of the epochs, and of the views."""
    trial.train("images without labels added", seed=0)
    assert trained[-1].unlabelled == (str(trial.unlabelled),)
    assert (trained[-1].epochs, trained[-1].targets.views) == (2, 2)
    trial.train(_GENERAL, seed=0)
    general, last = trained[-2:]
    assert (general.unlabelled, general.epochs) == ((str(trial.unlabelled),), 2)
    assert (last.start, last.unlabelled, last.epochs) == (general.output, (), 6)


def test_gains_are_paired_with_the_default() -> None:
    products = np.repeat(np.arange(10), 4).astype(str)
    ranks = np.random.default_rng(0).permutation(40).reshape(20, 2)
    scores = []
    for missed in (ranks[:6, 0], ranks[:2, 0]):
        similarities = (products[:, None] == products[None]).astype(np.float32)
        similarities[missed] = -similarities[missed]
        np.fill_diagonal(similarities, -2)
        scores.append(Scores([evaluate_similarities(similarities, products, products)], 1.0))
    default, better = scores
    row = candidate_row("better", better, default.by_seed[0], default)
    assert row["recall@1 over the default [95 %]"].startswith("+0.100 [")
    assert "recall@1 over the default [95 %]" not in candidate_row(DEFAULT, default, default.by_seed[0], default)


@pytest.fixture
def teacher() -> Any:
    torch.manual_seed(0)
    config = TowerConfig("sample", "")
    return build_teacher(config, read_tower(config.name), load_pretrained=False)[0].eval()


def test_mean_of_the_grid_is_the_embedding(teacher: Any, tmp_path: Path) -> None:
    """What lightly-train pools is the teacher's embedding."""
    write_grid(teacher, 96, tmp_path / "grid.pt")
    pixels = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        pooled = torch.jit.load(tmp_path / "grid.pt")(pixels).mean((2, 3))
        torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=1), teacher(pixels), atol=1e-5, rtol=0)


def test_teacher_with_layers_after_the_mean_is_rejected(teacher: Any, tmp_path: Path) -> None:
    teacher.project = torch.nn.Sequential(torch.nn.Tanh())
    with pytest.raises(UserError, match=r"the teacher's embedding is no mean over positions"):
        write_grid(teacher, 96, tmp_path / "grid.pt")
    assert not (tmp_path / "grid.pt").exists()
    assert TeacherGrid(teacher).trunk is teacher.visual.trunk
