from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.audit import audit

FOUND = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}


def _pip_audit(tmp_path: Path, answer: Any, error: str = "") -> str:
    """A pip-audit that says this."""
    path = tmp_path / "pip-audit"
    said = answer if isinstance(answer, str) else json.dumps({"dependencies": answer, "fixes": []})
    path.write_text(f"#!{sys.executable}\nimport sys\nprint({said!r})\nprint({error!r}, file=sys.stderr)\n")
    path.chmod(0o755)
    return str(path)


def _package(**values: Any) -> dict[str, Any]:
    return {"name": "numpy", "version": "1.0", **values}


@pytest.mark.parametrize(
    ("answer", "status", "last"),
    [
        ([_package(vulns=[]), _package(vulns=[])], 0, "2 of 2 packages looked up, 0 vulnerabilities known"),
        ([_package(vulns=[FOUND]), _package(vulns=[])], 1, "2 of 2 packages looked up, 1 vulnerabilities known"),
        ([_package(vulns=[]), _package(skip_reason="not found")], 2, "nothing can be said here (not found)"),
        ([_package(vulns=[FOUND]), _package(skip_reason="not found")], 1, "nothing can be said here (not found)"),
        ([], 2, "0 of 0 packages"),
        ("", 2, "cannot be asked (ConnectionError: no route): nothing was checked"),
    ],
)
def test_only_a_look_at_every_package_is_a_success(tmp_path: Path, answer: Any, status: int, last: str) -> None:
    found, lines = audit(_pip_audit(tmp_path, answer, "Traceback\nConnectionError: no route"))
    assert found == status
    assert last in lines[-1]


def test_a_known_vulnerability_is_named(tmp_path: Path) -> None:
    _, lines = audit(_pip_audit(tmp_path, [_package(vulns=[FOUND])]))
    assert lines[0] == "numpy 1.0: PYSEC-1, mended in 2.0"
