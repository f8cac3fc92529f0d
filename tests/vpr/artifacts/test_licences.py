from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import edit_card
from vpr.artifacts.card import Kind, Parent
from vpr.artifacts.run_folder import is_written, run_folder
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import find_up_to_date, write_artifact
from vpr.common.errors import UserError


def write(path: Path, kind: Kind, *parents: Path, licences: tuple[str, ...] = ()) -> Path:
    entries = [load_artifact(parent).as_parent("start") for parent in parents]
    with write_artifact(path, kind, {}, entries) as draft:
        draft.licences = list(licences)
    return path


def licences_of(path: Path) -> list[str]:
    return load_artifact(path).card.licences


def test_licences_pass_from_teacher_to_engine(tmp_path: Path) -> None:
    catalog = write(tmp_path / "catalog", "catalog")
    path = write(tmp_path / "teacher", "teacher", catalog, licences=("cc-by-nc-4.0",))
    kinds: tuple[Kind, ...] = ("student", "onnx", "ranges", "onnx", "engine", "serving")
    for number, kind in enumerate(kinds):
        path = write(tmp_path / f"{number}", kind, path, catalog)
        assert licences_of(path) == ["cc-by-nc-4.0"]
    assert licences_of(catalog) == []


def test_licences_of_several_parents_are_joined(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "teacher", licences=("mit",))
    second = write(tmp_path / "b", "teacher", licences=("apache-2.0",))
    unknown = write(tmp_path / "c", "teacher")
    assert licences_of(write(tmp_path / "d", "student", first, second, first)) == ["apache-2.0", "mit"]
    mixed = write(tmp_path / "e", "student", first, unknown)
    assert licences_of(mixed) == ["mit", "unknown"]
    assert licences_of(write(tmp_path / "f", "onnx", mixed)) == ["mit", "unknown"]
    assert licences_of(write(tmp_path / "g", "student", unknown, unknown)) == []
    assert licences_of(write(tmp_path / "h", "teacher", first, licences=("own",))) == ["mit", "own"]


def make_old(path: Path) -> None:
    """Remove what earlier versions did not write."""
    card = json.loads((path / "card.json").read_text())
    card.pop("licences")
    for parent in card["parents"]:
        parent.pop("licences")
    (path / "card.json").write_text(json.dumps(card))


def test_cards_without_licences_load_and_stay_up_to_date(tmp_path: Path) -> None:
    teacher = write(tmp_path / "teacher", "teacher")
    make_old(teacher)
    student = write(tmp_path / "student", "student", teacher)
    make_old(student)
    assert licences_of(student) == []
    parents = [load_artifact(teacher).as_parent("start")]
    assert parents[0].licences == ["unknown"]
    assert parents[0] in load_artifact(student).card.parents
    assert find_up_to_date(student, "student", {}, parents) is not None
    assert is_written(str(student), {}, parents)
    other = [parents[0].model_copy(update={"sha256": "0"})]
    assert find_up_to_date(student, "student", {}, other) is None
    assert not is_written(str(student), {}, other)


def test_run_folder_is_that_of_earlier_versions() -> None:
    """A training that an earlier version began resumes: the digest is of role, name and sha256 alone."""
    parent = Parent(role="catalog", name="c", sha256="0", licences=["mit"])
    assert run_folder("out", {"a": 1}, [parent]).name == "out.run-22fefbd38c84"


@pytest.mark.parametrize("licences", [["x" * 101], [""], [1], "mit"])
def test_wrong_licences_in_a_card_are_rejected(tmp_path: Path, licences: object) -> None:
    path = write(tmp_path / "teacher", "teacher")
    edit_card(path, licences=licences)
    with pytest.raises(UserError, match="key 'licences"):
        load_artifact(path)
