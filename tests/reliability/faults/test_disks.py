"""Small disks and read-only disks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.faults.pipeline import Pipeline
from tests.reliability.faults.test_full_disk import error_line

pytestmark = pytest.mark.reliability
STAGES = ("teacher", "student", "shard-embeddings", "int8")


def mount(*arguments: str) -> bool:
    """Return whether a mount succeeds."""
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, to be remounted smaller or read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)):
        pytest.skip("mounting is not allowed here. test_full_disk.py limits the size of files instead.")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("name", ["student", "shard-embeddings"])
def test_stage_resumes_once_disk_has_room(pipeline: Pipeline, memory_disk: Path, name: str) -> None:
    stage, output = pipeline.stages[name], memory_disk / name / name
    needed = sum(path.stat().st_size for path in pipeline.expected(stage).parent.rglob("*") if path.is_file())
    assert mount("-o", f"remount,size={needed // 2}", str(memory_disk))
    assert "the disk has no room (No space left on device)" in error_line(pipeline.run(stage, output))
    assert not output.exists()
    assert mount("-o", "remount,size=64m", str(memory_disk))
    assert pipeline.run(stage, output).code == 0
    assert not pipeline.differences(stage, output)


@pytest.fixture
def read_only(pipeline: Pipeline, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A read-only folder with every stage's artifact."""
    is_root = os.geteuid() == 0  # permissions do not bind root
    folder: Path = request.getfixturevalue("memory_disk" if is_root else "tmp_path")
    shutil.copytree(pipeline.folder / "expected", folder, dirs_exist_ok=True)
    if is_root:
        assert mount("-o", "remount,ro", str(folder))
        yield folder
        return
    for name in pipeline.stages:
        (folder / name).chmod(0o555)
    yield folder
    for name in pipeline.stages:
        (folder / name).chmod(0o755)


def test_read_only_output_is_rejected(pipeline: Pipeline, read_only: Path) -> None:
    for name in STAGES:
        line = error_line(pipeline.run(pipeline.stages[name], read_only / name / "new"))
        assert str(read_only / name) in line
        assert "Read-only file system" in line or "Permission denied" in line
        assert not (read_only / name / "new").exists()


def test_up_to_date_stage_writes_nothing(pipeline: Pipeline, read_only: Path) -> None:
    for name in STAGES:
        process = pipeline.run(pipeline.stages[name], read_only / name / name)
        assert (process.code, "up to date" in process.output) == (0, True), process.output
