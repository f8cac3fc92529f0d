from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.teacher.two_processes import train_spread
from student.config import DistillConfig
from tests.student.conftest import STUDENT
from vpr.common.flags import to_flags


@pytest.mark.slow
def test_two_processes_train_the_same_student(config: DistillConfig, tmp_path: Path) -> None:
    """Compare ``vpr student distill`` under torchrun, with a shared cache, to one process."""
    # The convolutional stem has batch norms, which see the batch of one process only.
    shape = {name: getattr(STUDENT, name) for name in ("image_size", "dim", "depth", "heads", "dim_head", "mlp_dim")}
    arguments = ["--teacher", *config.teacher, "--catalog", config.catalog, "--run.precision", "32-true"]
    arguments += [*to_flags(DistillConfig, {"model": shape}), "--epochs", "6", "--run.ema", "0.8"]
    arguments += ["--targets.views", "2", "--targets.bank", "32", "--targets.shard", "24"]
    one = train_spread(arguments, tmp_path / "one", 1, 16, verb="student distill")
    two = train_spread(arguments, tmp_path / "two", 2, 16, "ddp", verb="student distill")
    assert len(one.losses) >= 2
    assert two.losses == pytest.approx(one.losses, abs=1e-4)
    assert two.artifact.card.metrics["steps"] == one.artifact.card.metrics["steps"]
    caches = [sizes(tmp_path / f"{name}-views") for name in ("one", "two")]
    assert caches[0].keys() == caches[1].keys()
    weights = [load_file(run.artifact.file("model.safetensors")) for run in (one, two)]
    torch.testing.assert_close(weights[0], weights[1], atol=2e-3, rtol=0)


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.npy")}
