from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig, RelocateConfig
from vpr.data.relocate import relocate_catalog


@pytest.fixture
def project(tmp_path: Path, texture_folder: Path) -> Path:
    """Folder of four products and of their catalogue."""
    for number in range(4):
        shutil.copytree(texture_folder / f"product-{number:02d}", tmp_path / "project" / "shop" / str(number))
    _catalogue(tmp_path / "project")
    return tmp_path / "project"


def _catalogue(project: Path, root: Path | None = None) -> Path:
    shop = str(root or project / "shop")
    return build_catalog(CatalogConfig("folder", str(project / "catalog"), shop, validation=0.25, test=0.25, seed=2))


def test_moved_project_finds_its_images(project: Path, tmp_path: Path) -> None:
    card = load_artifact(project / "catalog").sha256
    moved = project.rename(tmp_path / "moved")
    catalog = load_catalog(moved / "catalog")
    assert catalog.root == moved / "shop"
    assert all(catalog.path(row).is_file() for row in range(len(catalog)))
    assert catalog.artifact is not None
    assert catalog.artifact.sha256 == card


def test_other_images_at_the_place_are_not_taken(project: Path, tmp_path: Path) -> None:
    moved = project.rename(tmp_path / "moved")
    for path in (moved / "shop").glob("*/*.jpg"):
        path.write_bytes(path.read_bytes() + b"changed")
    assert load_catalog(moved / "catalog").root == project / "shop"


def test_moved_images_keep_the_catalogue_when_it_is_made_again(project: Path, tmp_path: Path) -> None:
    card = load_artifact(project / "catalog").sha256
    root = (project / "shop").rename(tmp_path / "elsewhere")
    _catalogue(project, root)
    assert load_artifact(project / "catalog").sha256 == card
    assert load_catalog(project / "catalog").root == root


def test_catalogue_is_relocated_after_a_comparison(project: Path, tmp_path: Path) -> None:
    card = load_artifact(project / "catalog").sha256
    root = (project / "shop").rename(tmp_path / "elsewhere")
    relocate_catalog(RelocateConfig(str(project / "catalog"), str(root)))
    assert load_catalog(project / "catalog").root == root
    assert load_artifact(project / "catalog").sha256 == card
    changed = sorted(root.glob("*/*.jpg"))[5]
    changed.write_bytes(b"changed")
    with pytest.raises(UserError, match=r"root: 1 of 32 sampled images are missing or differ, first '0/5\.jpg'"):
        relocate_catalog(RelocateConfig(str(project / "catalog"), str(root)))
    with pytest.raises(UserError, match=r"root: .*absent is no folder"):
        relocate_catalog(RelocateConfig(str(project / "catalog"), str(tmp_path / "absent")))


def test_catalogue_of_an_earlier_version_is_read_and_relocated(project: Path, tmp_path: Path) -> None:
    (project / "catalog" / "location.json").unlink()
    assert load_catalog(project / "catalog").root == project / "shop"
    root = (project / "shop").rename(tmp_path / "elsewhere")
    _catalogue(project, root)
    assert load_catalog(project / "catalog").root == root


@pytest.mark.parametrize("content", ["", "[]", '{"root": 3, "relative": ""}', '{"root": "a\\u0000", "relative": ""}'])
def test_broken_location_is_rejected(project: Path, content: str) -> None:
    (project / "catalog" / "location.json").write_text(content)
    with pytest.raises(UserError, match=r"location\.json: it does not say where the images are\. Remove it"):
        load_catalog(project / "catalog")


def test_location_is_relative_to_the_finished_catalogue(project: Path) -> None:
    values = json.loads((project / "catalog" / "location.json").read_text())
    assert values == {"root": str((project / "shop").resolve()), "relative": "../shop"}
    assert "location.json" not in load_artifact(project / "catalog").card.files
