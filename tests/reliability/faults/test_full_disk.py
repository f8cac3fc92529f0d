"""A full disk: the command reports it in one line, loses nothing, and resumes once there is room."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.reliability.faults.injection import limit_file_size
from tests.reliability.faults.pipeline import EndedProcess, Pipeline
from vpr.artifacts.store import load_artifact

pytestmark = pytest.mark.reliability
STAGES = ("catalog", "teacher", "student", "shard-embeddings", "fp32", "ranges", "int8")


def error_line(process: EndedProcess) -> str:
    """Return the one-line error message of a command that failed."""
    assert process.code == 2, process.output
    assert "Traceback" not in process.output
    line = process.output.splitlines()[-1]
    assert line.startswith("vpr: error: ")
    return line


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("share", [0.9, 0.3])
def test_file_that_does_not_fit(pipeline: Pipeline, tmp_path: Path, name: str, share: float) -> None:
    stage, output = pipeline.stages[name], tmp_path / name
    expected = load_artifact(pipeline.expected(stage))
    largest = max(entry.size for entry in expected.card.files.values())
    pipeline.write_older(stage, output)
    older = (output / "card.json").read_bytes()
    line = error_line(pipeline.run(stage, output, prepare=partial(limit_file_size, int(share * largest))))
    assert "the disk has no room (File too large)" in line
    assert (output / "card.json").read_bytes() == older
    load_artifact(output)
    assert not list(tmp_path.glob(".*"))
    assert pipeline.run(stage, output).code == 0
    assert not pipeline.differences(stage, output)
