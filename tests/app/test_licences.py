from __future__ import annotations

from pathlib import Path

import pytest
import timm

from app.licences import restriction
from vpr.artifacts.writer import write_artifact
from vpr.cli import main


def write(path: Path, *licences: str) -> str:
    with write_artifact(path, "teacher", {}) as draft:
        draft.licences = list(licences)
    return str(path)


def test_licences_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write(tmp_path / "a", "apache-2.0", "mit"), write(tmp_path / "b")
    main(["doctor", "--models", first, second])
    assert capsys.readouterr().out.splitlines() == [f"{first}: apache-2.0, mit", f"{second}: unknown"]
    main(["doctor", "--models", first, "--require-licence"])


def test_forbidden_commercial_use_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free, bound = write(tmp_path / "a", "mit"), write(tmp_path / "b", "cc-by-nc-4.0", "mit")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--models", free, bound])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert f"warning: {bound}: cc-by-nc-4.0 forbids commercial use" in captured.err
    assert f"{free}: mit" in captured.out


@pytest.mark.parametrize(("licences", "problem"), [((), "no licence is recorded"), (("mit", "unknown"), "comes from")])
def test_required_licence_exits_with_2(
    licences: tuple[str, ...], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a", *licences)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--models", path, "--require-licence"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vpr: error: {path}: ")
    assert problem in error
    assert "Set --tower.licence in the training of its teacher." in error


def test_requirement_needs_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--require-licence"])
    assert stopped.value.code == 2
    assert "require_licence: there is no model to check" in capsys.readouterr().err


@pytest.mark.parametrize(
    "licence",
    ["cc-by-nc-4.0", "CC-BY-NC-SA-4.0", "CC BY-NC 4.0", "fair-noncommercial-research-license", "Non-Commercial"]
    + ["apple-amlr", "for research purposes", "research-only", "other-nc", "stability_nc_1"],
)
def test_restricted_licences(licence: str) -> None:
    assert restriction(licence)


@pytest.mark.parametrize("licence", ["apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "ncsa", "openrail", "unknown"])
def test_other_licences(licence: str) -> None:
    assert not restriction(licence)


def test_restricted_licences_of_timm() -> None:
    """A new name in timm that the table restricts fails here, so that the match is looked at."""
    known = {timm.get_pretrained_cfg(name).license or "" for name in timm.list_pretrained()}
    restricted = {"cc-by-nc-4.0", "fair-noncommercial-research-license", "apple-amlr", "seer-license"}
    assert {name for name in known if restriction(name)} == restricted
