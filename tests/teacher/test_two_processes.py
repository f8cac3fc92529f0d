from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.teacher.two_processes import train_spread
from vpr.data.catalog import Catalog

SCRIPT = Path(__file__).parent / "pair_loss_training.py"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4], ids=["weights", "lora"])
def test_two_processes_train_like_one(rank: int, catalog: Catalog, tmp_path: Path) -> None:
    """Compare two stages of ``vpr teacher train`` under torchrun (FSDP and DDP) with one process."""
    assert catalog.artifact is not None
    arguments = ["--catalog", str(catalog.artifact.path), "--tower.name", "sample-vit", "--tower.pretrained", ""]
    arguments += ["--lora.rank", str(rank), "--run.precision", "32-true", "--run.ema", "0.9", "--stages"]
    arguments += ["{train: all, epochs: 6, lr_tower: 1.0e-3}", "{train: last, last_blocks: 2, epochs: 1}"]
    single = train_spread(arguments, tmp_path / "one", 1, 16)
    assert len(single.losses) >= 2
    for strategy in ("ddp", "fsdp"):
        distributed = train_spread(arguments, tmp_path / strategy, 2, 16, strategy)  # type: ignore[arg-type]
        assert distributed.losses == pytest.approx(single.losses, abs=1e-4)
        assert distributed.artifact.card.metrics["steps"] == single.artifact.card.metrics["steps"]
        weights = [load_file(run.artifact.file("model.safetensors")) for run in (single, distributed)]
        torch.testing.assert_close(weights[0], weights[1], atol=2e-3, rtol=0)


def run_pair_losses(output: Path, processes: int) -> dict[str, dict[str, list[float]]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    root = Path(__file__).parents[2]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.slow
def test_pair_losses_of_two_processes_equal_those_of_one(tmp_path: Path) -> None:
    """Compare 50 steps with memories, miners and proxies on the same joint batches."""
    single, both = (run_pair_losses(tmp_path / f"{count}.json", count) for count in (1, 2))
    for name, expected in single.items():
        assert len(expected["losses"]) == 50
        assert expected["losses"][-1] < expected["losses"][0]
        for key, values in expected.items():
            assert both[name][key] == pytest.approx(values, abs=1e-4), (name, key)
