from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.config import RecallConfig
from benchmarks.models import load_models
from benchmarks.recall.measure import measure_recall
from tests.conftest import edit_card
from vpr.artifacts.names import with_distinct_names
from vpr.common.errors import UserError
from vpr.retrieval.config import RerankConfig


@pytest.fixture
def students(student_artifact: Path, tmp_path: Path) -> list[str]:
    """Two different artifacts of one name, and a third of another name."""
    paths = [tmp_path / "exp1" / "student", tmp_path / "exp2" / "student", tmp_path / "other"]
    for number, path in enumerate(paths):
        shutil.copytree(student_artifact, path)
        edit_card(path, created=f"2026-01-0{number + 1}T00:00:00+00:00", name=path.name)
    return [str(path) for path in paths]


def test_equal_names_become_the_ends_of_the_paths(students: list[str]) -> None:
    artifacts = load_models(students)
    names = [artifact.card.name for artifact in with_distinct_names(artifacts)]
    assert names == ["exp1/student", "exp2/student", "other"]
    assert [artifact.card.name for artifact in artifacts] == ["student", "student", "other"]


def test_end_of_a_path_that_is_another_name_is_longer(students: list[str], tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"exp{number}" / "student").rename(tmp_path / f"exp{number}" / ("other" if number == 1 else "s"))
    paths = [str(tmp_path / "exp1" / "other"), str(tmp_path / "exp2" / "s"), students[2]]
    names = [artifact.card.name for artifact in with_distinct_names(load_models(paths))]
    assert len(set(names)) == 3
    assert names[0] == "exp1/other"


def test_rows_of_equal_names_are_named_by_path(students: list[str], shop: Path, tmp_path: Path) -> None:
    config = RecallConfig(str(shop), tuple(students), str(tmp_path / "recall"), rerank=RerankConfig())
    rows = json.loads((measure_recall(config) / "recall.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in rows[2:]] == ["exp1/student", "exp2/student", "other"]


def test_one_artifact_given_twice_is_rejected(students: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"models: .*exp1/student is given twice\. Pass each artifact once"):
        load_models([students[0], students[0]])
    shutil.copytree(students[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"models: .*copy equals .*exp1/student"):
        load_models([students[0], str(tmp_path / "copy")])
