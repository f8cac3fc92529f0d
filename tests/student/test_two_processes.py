from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.teacher.two_processes import DistributedRun, read_losses, train_spread
from student.config import DistillConfig
from teacher.config import TowerConfig
from tests.student.conftest import STUDENT
from tests.teacher.test_fuse import write_teacher
from vpr.common.flags import to_flags
from vpr.data.catalog import Catalog


def train_in_one_and_two(
    config: DistillConfig, teacher: str, settings: dict[str, Any], folder: Path
) -> tuple[DistributedRun, DistributedRun]:
    """Distil with ``vpr student distill`` in one process, and in two under torchrun, and compare them."""
    # The convolutional stem has batch norms, which see the batch of one process only.
    shape = {name: getattr(STUDENT, name) for name in ("image_size", "dim", "depth", "heads", "dim_head", "mlp_dim")}
    arguments = ["--teacher", teacher, "--catalog", config.catalog, "--run.precision", "32-true", "--run.ema", "0.8"]
    arguments += to_flags(DistillConfig, {"model": shape, "epochs": 6, **settings})
    one = train_spread(arguments, folder / "one", 1, 16, verb="student distill")
    two = train_spread(arguments, folder / "two", 2, 16, "ddp", verb="student distill")
    assert len(one.losses) >= 2
    assert two.losses == pytest.approx(one.losses, abs=1e-4)
    assert two.artifact.card.metrics["steps"] == one.artifact.card.metrics["steps"]
    weights = [load_file(run.artifact.file("model.safetensors")) for run in (one, two)]
    torch.testing.assert_close(weights[0], weights[1], atol=2e-3, rtol=0)
    return one, two


@pytest.mark.slow
def test_two_processes_train_the_same_student(config: DistillConfig, tmp_path: Path) -> None:
    """Compare ``vpr student distill`` under torchrun, with a shared cache, to one process."""
    (teacher,) = config.teacher
    train_in_one_and_two(config, teacher, {"targets": {"views": 2, "bank": 32, "shard": 24}}, tmp_path)
    caches = [sizes(tmp_path / f"{name}-views") for name in ("one", "two")]
    assert caches[0].keys() == caches[1].keys()


@pytest.mark.slow
def test_two_processes_standardise_the_same_tokens(config: DistillConfig, catalog: Catalog, tmp_path: Path) -> None:
    """The statistics of the teacher's tokens are those of the tokens in both processes."""
    teacher = write_teacher(tmp_path / "teacher", TowerConfig("sample-vit", "", 32), catalog, 0)
    losses = {"similarity_kl": 0.0, "token_similarity": 1.0, "token_feature": 1.0}
    settings = {"targets": {"mode": "online", "bank": 32}, "losses": losses}
    one, two = train_in_one_and_two(config, teacher, settings, tmp_path)
    for name in ("token_similarity_epoch", "token_feature_epoch"):
        logs = [read_losses(run.artifact.file("metrics.csv"), name) for run in (one, two)]
        assert len(logs[0]) == 6
        assert logs[1] == pytest.approx(logs[0], abs=1e-3)


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.npy")}
