from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.teacher.two_processes import train_spread
from vpr.data.catalog import Catalog


@pytest.mark.slow
def test_two_processes_train_like_one(catalog: Catalog, tmp_path: Path) -> None:
    """Compare two stages of ``vpr teacher train`` under torchrun (FSDP and DDP) with one process."""
    assert catalog.artifact is not None
    arguments = ["--catalog", str(catalog.artifact.path), "--tower.name", "sample-vit", "--tower.pretrained", ""]
    arguments += ["--run.precision", "32-true", "--run.ema", "0.9", "--stages"]
    arguments += ['[{"train": "all", "epochs": 6, "lr_tower": 1e-3}, {"train": "last", "last_blocks": 2, "epochs": 1}]']
    single = train_spread(arguments, tmp_path / "one", 1, 16)
    assert len(single.losses) >= 2
    for strategy in ("ddp", "fsdp"):
        distributed = train_spread(arguments, tmp_path / strategy, 2, 16, strategy)  # type: ignore[arg-type]
        assert distributed.losses == pytest.approx(single.losses, abs=1e-4)
        assert distributed.artifact.card.metrics["steps"] == single.artifact.card.metrics["steps"]
        weights = [load_file(run.artifact.file("model.safetensors")) for run in (single, distributed)]
        torch.testing.assert_close(weights[0], weights[1], atol=2e-3, rtol=0)
