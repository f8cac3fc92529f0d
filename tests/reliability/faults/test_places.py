"""Places that are small or may only be read."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.faults.pipeline import Pipeline
from tests.reliability.faults.test_full_disk import refused


def mount(*arguments: str) -> bool:
    """Whether this process may mount."""
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, to be remounted smaller or read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)):
        pytest.skip(
            "mounting is not allowed here; tests/reliability/faults/test_full_disk.py limits the size of files instead"
        )
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("name", ["student", "shard-embeddings"])
def test_a_run_goes_on_when_a_full_disk_has_room_again(pipeline: Pipeline, memory_disk: Path, name: str) -> None:
    stage, output = pipeline.stages[name], memory_disk / name / name
    needed = sum(path.stat().st_size for path in pipeline.unbroken(stage).parent.rglob("*") if path.is_file())
    assert mount("-o", f"remount,size={needed // 2}", str(memory_disk))
    assert "the disk has no room (No space left on device)" in refused(pipeline.run(stage, output))
    assert not output.exists()
    assert mount("-o", "remount,size=64m", str(memory_disk))
    assert pipeline.run(stage, output).code == 0
    assert not pipeline.departures(stage, output)


@pytest.fixture
def read_only(pipeline: Pipeline, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with every stage's artifact, which may only be read."""
    root = os.geteuid() == 0  # whom modes do not bind
    place: Path = request.getfixturevalue("memory_disk" if root else "tmp_path")
    shutil.copytree(pipeline.folder / "unbroken", place, dirs_exist_ok=True)
    if root:
        assert mount("-o", "remount,ro", str(place))
        yield place
        return
    for name in pipeline.stages:
        (place / name).chmod(0o555)
    yield place
    for name in pipeline.stages:
        (place / name).chmod(0o755)


def test_an_output_that_may_only_be_read(pipeline: Pipeline, read_only: Path) -> None:
    for name in ("teacher", "student", "shard-embeddings", "int8"):
        line = refused(pipeline.run(pipeline.stages[name], read_only / name / "new"))
        assert str(read_only / name) in line
        assert "Read-only file system" in line or "Permission denied" in line
        assert not (read_only / name / "new").exists()


def test_what_is_up_to_date_needs_no_writing(pipeline: Pipeline, read_only: Path) -> None:
    for name in ("teacher", "student", "shard-embeddings", "int8"):
        done = pipeline.run(pipeline.stages[name], read_only / name / name)
        assert (done.code, "up to date" in done.output) == (0, True), done.output
