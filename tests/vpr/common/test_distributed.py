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

from vpr.common.distributed import _large_blocks, trainer_options
from vpr.common.errors import UserError

SCRIPT = Path(__file__).parent / "distributed_training.py"
ROOT = Path(__file__).parents[3]


def train(folder: Path, processes: int, strategy: str, epochs: int, precision: str = "32-true") -> list[float]:
    """Train in new processes and return the losses of the epochs that they trained."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(SCRIPT), str(folder), strategy, str(epochs), "0.5", precision]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())["losses"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    folder = tmp_path_factory.mktemp("one-process")
    return train(folder, 1, "auto", 4), folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_and_resume_like_one(
    strategy: str, one_process: tuple[list[float], Path], tmp_path: Path
) -> None:
    losses, folder = one_process
    uninterrupted = train(tmp_path / "uninterrupted", 2, strategy, 4)
    assert uninterrupted == pytest.approx(losses, abs=1e-4)
    torch.testing.assert_close(
        load_file(tmp_path / "uninterrupted" / "last.safetensors"),
        load_file(folder / "last.safetensors"),
        atol=1e-4,
        rtol=1e-3,
    )
    train(tmp_path / "interrupted", 2, strategy, 2)
    resumed = train(tmp_path / "interrupted", 2, strategy, 4)
    assert resumed == uninterrupted[len(uninterrupted) // 2 :]  # bit-equal
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "interrupted" / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()


@pytest.mark.slow
def test_sharded_blocks_are_gathered_in_bf16(tmp_path: Path) -> None:
    losses = [train(tmp_path / name, count, name, 4, "bf16-mixed") for name, count in (("auto", 1), ("fsdp", 2))]
    dtypes = [json.loads((tmp_path / name / "losses.json").read_text())["dtypes"] for name in ("auto", "fsdp")]
    assert dtypes == [["torch.float32"], ["torch.bfloat16", "torch.float32"]]  # the input of a block stays float32
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1][-1] < 0.5 * losses[1][0]
    weights = load_file(tmp_path / "fsdp" / "last.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())


def test_fsdp_needs_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="fsdp needs several processes"):
        trainer_options("fsdp")


def test_innermost_large_blocks_are_sharded() -> None:
    mlp = nn.Sequential(nn.Linear(1100, 1100), nn.GELU(), nn.Linear(1100, 1100))
    stages = nn.Sequential(*(nn.Sequential(*(nn.ModuleDict({"mlp": mlp}) for _ in range(2))) for _ in range(2)))
    assert len(_large_blocks(nn.ModuleDict({"stages": stages}))) == 4
    assert all(isinstance(block, nn.ModuleDict) for block in _large_blocks(stages))
    assert _large_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
