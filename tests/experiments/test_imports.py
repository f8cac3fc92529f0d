from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from experiments.figures import ROOT
from experiments.imports import IMAGE, PACKAGES, arrows, draw, imports_of, listed, read_imports


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "vpr").mkdir()
    (tmp_path / "vpr" / "images.py").touch()
    file = tmp_path / "export" / "some.py"
    file.parent.mkdir()
    file.write_text(
        "import os\nfrom vpr import images\ndef f():\n    import teacher.model\n    from vpr.cli import main\n"
    )
    assert imports_of(file, tmp_path) == {"vpr.imaging.decode", "teacher.model", "vpr.cli"}


def test_arrows_between_packages_go_one_way() -> None:
    found = arrows(read_imports())
    assert ("student", "teacher") in found
    backwards = [pair for pair in found if PACKAGES.index(pair[0]) < PACKAGES.index(pair[1])]
    assert not backwards


def test_vpr_loads_without_any_stage() -> None:
    stages = [package for package in PACKAGES if package != "vpr"]
    code = f"import vpr.cli, sys; assert not [m for m in sys.modules if m.partition('.')[0] in {stages}]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_image_shows_the_arrows_of_the_code(tmp_path: Path) -> None:
    found = arrows(read_imports())
    assert listed(found) in IMAGE.read_text(encoding="utf-8"), "make architecture"
    other = tmp_path / "other.svg"
    draw(found[:-1], other)
    assert listed(found) not in other.read_text(encoding="utf-8")
