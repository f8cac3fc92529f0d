from __future__ import annotations

import csv
import shutil
import tarfile
from pathlib import Path

import pytest

from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig


def test_unchanged_images_keep_the_artifact(texture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(texture_folder, root)
    config = CatalogConfig(reader="folder", root=str(root), output=str(tmp_path / "c"), test=0.5)
    first = load_artifact(build_catalog(config)).sha256
    assert load_artifact(build_catalog(config)).sha256 == first
    (root / "product-00" / "0.jpg").unlink()
    assert load_artifact(build_catalog(config)).sha256 != first


def test_foreign_output_is_rejected_before_reading(
    texture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with write_artifact(tmp_path / "taken", "ranges", {}):
        pass
    monkeypatch.setattr("vpr.data.build_catalog.check_images", lambda *_: pytest.fail("images were read"))
    for reader in ("folder", "sample"):
        config = CatalogConfig(reader=reader, root=str(texture_folder), output=str(tmp_path / "taken"))  # type: ignore[arg-type]
        with pytest.raises(UserError, match="holds an artifact of kind ranges"):
            build_catalog(config)


def test_unreadable_images_are_listed_with_a_reason(texture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for product in ("a", "b"):
        (root / product).mkdir(parents=True)
        (root / product / "1.jpg").write_bytes((texture_folder / "product-00" / "1.jpg").read_bytes())
    (root / "a" / "2.jpg").write_bytes(b"GIF?")
    config = CatalogConfig(reader="folder", root=str(root), output=str(tmp_path / "c"), skip_unreadable=True)
    built = load_artifact(build_catalog(config))
    assert built.card.metrics == {"images": 2, "set_aside": 1}
    assert built.file("set_aside.csv").read_text() == "image,reason\na/2.jpg,not an image\n"


def test_files_without_image_suffix_are_listed(texture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(texture_folder / "product-00", root / "shoe")
    for name in ("shoe/notes.txt", "shoe/1.heic", "README"):
        (root / name).write_bytes(b"?")
    config = CatalogConfig(reader="folder", root=str(root), output=str(root / "catalog"))
    first = load_artifact(build_catalog(config))
    with first.file("set_aside.csv").open(newline="") as stream:
        listed = list(csv.reader(stream))[1:]
    assert listed == [[name, "unknown suffix"] for name in ("README", "shoe/1.heic", "shoe/notes.txt")]
    assert first.card.metrics["set_aside"] == 3
    assert load_artifact(build_catalog(config)).sha256 == first.sha256


@pytest.mark.parametrize("reader", ["folder", "images", "webdataset"])
def test_links_to_folders_are_listed(texture_folder: Path, tmp_path: Path, reader: str) -> None:
    """Links are not followed, so their products must not be missing silently."""
    root = tmp_path / "images"
    shutil.copytree(texture_folder / "product-00", root / "shoe")
    with tarfile.open(root / "0.tar", "w") as tar:
        tar.add(root / "shoe" / "0.jpg", "0.jpg")
    for name in ("boots", "boots.jpg", "boots.tar"):
        (root / name).symlink_to(texture_folder / "product-01")
    config = CatalogConfig(reader=reader, root=str(root), output=str(tmp_path / "catalog"))  # type: ignore[arg-type]
    listed = load_artifact(build_catalog(config)).file("set_aside.csv").read_text()
    for name in ("boots", "boots.jpg", "boots.tar"):
        assert f'{name},"a link to a folder, which is not followed"\n' in listed
    assert listed.count("\n") == (4 if reader == "webdataset" else 5)


def test_changed_box_rebuilds_the_catalogue(texture_folder: Path, tmp_path: Path) -> None:
    shutil.copy(texture_folder / "product-00" / "0.jpg", tmp_path / "a.jpg")
    config = CatalogConfig(reader="csv", root=str(tmp_path / "t.csv"), output=str(tmp_path / "c"))
    catalogs = []
    for left in (1, 9):
        (tmp_path / "t.csv").write_text(f"image,product,box_x,box_y,box_w,box_h\na.jpg,shoe,{left},1,5,5\n")
        catalogs.append(load_catalog(build_catalog(config)))
    assert [catalog.box(0) for catalog in catalogs] == [(1, 1, 5, 5), (9, 1, 5, 5)]
    assert catalogs[0].sha256 != catalogs[1].sha256


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation": -1.0}, r"together less than 1, got -1\.0 and 0\.0"),
        ({"test": float("nan")}, r"validation, test: expected shares .* got 0\.0 and nan"),
        ({"validation": float("inf")}, "got inf and 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_values_out_of_range_are_rejected(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CatalogConfig(reader="folder", root="x", output="y", **values)
