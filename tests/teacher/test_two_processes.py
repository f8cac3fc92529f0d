from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.teacher.two_processes import train_spread
from vpr.data.catalog import Catalog


@pytest.mark.slow
def test_the_command_trains_the_same_in_two_processes(catalog: Catalog, tmp_path: Path) -> None:
    """``vpr teacher train`` under torchrun, in two stages, with FSDP and DDP, against one process."""
    assert catalog.artifact is not None
    arguments = ["--catalog", str(catalog.artifact.path), "--tower.name", "sample-vit", "--tower.pretrained", ""]
    arguments += ["--run.precision", "32-true", "--run.ema", "0.9", "--stages"]
    arguments += ["{train: all, epochs: 6, lr_tower: 1.0e-3}", "{train: last, last_blocks: 2, epochs: 1}"]
    one = train_spread(arguments, tmp_path / "one", 1, 16)
    assert len(one.losses) >= 2
    for strategy in ("ddp", "fsdp"):
        two = train_spread(arguments, tmp_path / strategy, 2, 16, strategy)  # type: ignore[arg-type]
        assert two.losses == pytest.approx(one.losses, abs=1e-4)
        assert two.artifact.card.metrics["steps"] == one.artifact.card.metrics["steps"]
        weights = [load_file(run.artifact.file("model.safetensors")) for run in (one, two)]
        torch.testing.assert_close(weights[0], weights[1], atol=2e-3, rtol=0)
