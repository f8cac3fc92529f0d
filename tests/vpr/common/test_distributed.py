from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vpr.common.distributed import _blocks, trainer_options
from vpr.common.errors import UserError

SCRIPT = Path(__file__).parent / "spread_training.py"
ROOT = Path(__file__).parents[3]


def spread(folder: Path, processes: int, strategy: str, epochs: int) -> list[float]:
    """Losses of the epochs that this start trained."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(SCRIPT), str(folder), strategy, str(epochs), "0.5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())["losses"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    folder = tmp_path_factory.mktemp("alone")
    return spread(folder, 1, "auto", 4), folder


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does_also_when_resumed(
    strategy: str, alone: tuple[list[float], Path], tmp_path: Path
) -> None:
    losses, folder = alone
    whole = spread(tmp_path / "whole", 2, strategy, 4)
    assert whole == pytest.approx(losses, abs=1e-4)
    torch.testing.assert_close(
        load_file(tmp_path / "whole" / "last.safetensors"), load_file(folder / "last.safetensors"), atol=1e-4, rtol=1e-3
    )
    spread(tmp_path / "broken", 2, strategy, 2)
    rest = spread(tmp_path / "broken", 2, strategy, 4)
    assert rest == whole[len(whole) // 2 :]  # bit-equal
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_fsdp_of_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="fsdp needs several processes"):
        trainer_options("fsdp")


def test_the_blocks_that_are_spread_alone_are_the_innermost_large_ones() -> None:
    mlp = nn.Sequential(nn.Linear(1100, 1100), nn.GELU(), nn.Linear(1100, 1100))
    stages = nn.Sequential(*(nn.Sequential(*(nn.ModuleDict({"mlp": mlp}) for _ in range(2))) for _ in range(2)))
    assert len(_blocks(nn.ModuleDict({"stages": stages}))) == 4
    assert all(isinstance(block, nn.ModuleDict) for block in _blocks(stages))
    assert _blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
