"""Migration of a gallery from one untrained student to another one, with images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import export.gallery_migration
from experiments.random_student import write_random_student
from export.config import EmbedConfig
from export.embed import embed_catalog
from export.gallery_migration import migrate_gallery
from export.migrate_config import MigrateConfig
from student.config import StudentConfig
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import RelocateConfig
from vpr.data.relocate import relocate_catalog
from vpr.gallery.change import create_gallery
from vpr.gallery.config import CreateConfig, InfoConfig, PlanConfig, VerifyGalleryConfig
from vpr.gallery.gallery import load_gallery
from vpr.gallery.inspect import print_info, verify_gallery
from vpr.gallery.plan import plan_migration

pytest.importorskip("lancedb")

_SHAPE = StudentConfig(
    image_size=32, patch_size=8, dim=32, depth=1, heads=2, dim_head=16, mlp_dim=64, embedding_dim=16, stem="conv"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, catalog: Catalog) -> Path:
    """Two students, their embeddings, and a plan from the first to the second one, of which 8 dimensions are kept."""
    folder = tmp_path_factory.mktemp("shop")
    assert catalog.artifact is not None
    for name, dim, kept in (("old", 16, 0), ("new", 12, 8)):
        write_random_student(folder / name, replace(_SHAPE, embedding_dim=dim))
        path = str(catalog.artifact.path)
        embed_catalog(EmbedConfig(str(folder / name), path, str(folder / f"by-{name}"), dimensions=kept))
    create_gallery(CreateConfig(str(folder / "by-old"), str(folder / "gallery")))
    embeddings = (str(folder / f"by-{name}") for name in ("old", "new"))
    plan_migration(PlanConfig(str(folder / "gallery"), *embeddings, str(folder / "plan")))
    return folder


@pytest.fixture
def config(shop: Path, tmp_path: Path, catalog: Catalog) -> MigrateConfig:
    """Configuration with a gallery of the test's own."""
    assert catalog.artifact is not None
    gallery = shutil.copytree(shop / "gallery", tmp_path / "gallery")
    return MigrateConfig(
        str(gallery), str(shop / "plan"), str(shop / "new"), (str(catalog.artifact.path),), rows_per_version=16
    )


def test_migrated_gallery_has_the_new_embeddings(config: MigrateConfig, shop: Path) -> None:
    images = len(load_gallery(config.gallery).snapshot())
    migrate_gallery(replace(config, rows=20))
    info = print_info(InfoConfig(config.gallery))
    # The adapter's version, 16 images and 4 images.
    assert (info["version"], info["adapted"], info["dimensions"]) == (4, images - 20, 8)
    migrate_gallery(config)
    result = verify_gallery(VerifyGalleryConfig(config.gallery, (str(shop / "by-new"),)))
    assert (result["compared"], result["adapted"]) == (images, 0)
    version = load_gallery(config.gallery).snapshot().version
    migrate_gallery(config)
    assert load_gallery(config.gallery).snapshot().version == version


def test_first_step_needs_no_images(config: MigrateConfig) -> None:
    migrate_gallery(replace(config, model="", catalogs=()))
    info = print_info(InfoConfig(config.gallery))
    assert (info["version"], info["model"], info["adapted"]) == (2, "new", info["images"])


def test_stopped_run_resumes(config: MigrateConfig, monkeypatch: pytest.MonkeyPatch, shop: Path) -> None:
    """The disk is full at the second version of embedded images."""
    calls = []

    def stop(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return replace_adapted(*arguments)  # type: ignore[arg-type]

    replace_adapted = export.gallery_migration.replace_adapted
    monkeypatch.setattr(export.gallery_migration, "replace_adapted", stop)
    with pytest.raises(OSError, match="No space left"):
        migrate_gallery(config)
    info = print_info(InfoConfig(config.gallery))
    assert info["images"] - info["adapted"] == 16
    verify_gallery(VerifyGalleryConfig(config.gallery))
    migrate_gallery(config)
    assert verify_gallery(VerifyGalleryConfig(config.gallery, (str(shop / "by-new"),)))["adapted"] == 0


def test_missing_images(config: MigrateConfig, catalog: Catalog, texture_folder: Path, tmp_path: Path) -> None:
    images = shutil.copytree(texture_folder, tmp_path / "images")
    assert catalog.artifact is not None
    copied = str(shutil.copytree(catalog.artifact.path, tmp_path / "catalog"))
    relocate_catalog(RelocateConfig(copied, str(images)))
    gallery = load_gallery(config.gallery)
    lost = gallery.snapshot().read(["image"])["image"].to_pylist()[:2]
    for name in lost:
        load_catalog(copied).path(catalog.table["image"].to_pylist().index(name)).unlink()
    config = replace(config, catalogs=(copied,))
    with pytest.raises(UserError, match=r"^catalogs: 2 of \d+ images are in no catalogue or have no file, first image"):
        migrate_gallery(config)
    assert gallery.snapshot().version == 1
    migrate_gallery(replace(config, skip_missing=True))
    assert print_info(InfoConfig(config.gallery))["adapted"] == 2
    assert catalog.artifact is not None
    migrate_gallery(replace(config, catalogs=(copied, str(catalog.artifact.path))))  # the second one has the images
    assert print_info(InfoConfig(config.gallery))["adapted"] == 0


def test_bad_input(config: MigrateConfig, shop: Path) -> None:
    for values, message in (
        ({"model": str(shop / "old")}, r"^model: .*old is not the new model 'new' of .*plan. Choose that model"),
        ({"plan": str(shop / "by-old")}, "expected an artifact of kind migration, got embeddings"),
        ({"model": str(shop / "by-old")}, "expected an artifact of kind teacher or student or onnx or engine"),
        ({"catalogs": (str(shop / "old"),)}, "expected an artifact of kind catalog"),
        ({"gallery": str(shop / "by-old")}, "expected an artifact of kind gallery"),
    ):
        with pytest.raises(UserError, match=message):
            migrate_gallery(replace(config, **values))  # type: ignore[arg-type]
    assert load_gallery(config.gallery).snapshot().version == 1
    for values, message in (({"model": ""}, "model: missing"), ({"catalogs": ()}, "catalogs: missing")):
        with pytest.raises(UserError, match=message):
            replace(config, **values)  # type: ignore[arg-type]


def test_vectors_follow_the_plan_and_not_the_catalogue(config: MigrateConfig, shop: Path) -> None:
    """Two catalogues that each have some of the images give the vectors of one."""
    full = load_catalog(config.catalogs[0])
    pending = [
        export.gallery_migration.Pending(place, str(full.products[row]), full.table["image"][row].as_py())
        for place, row in enumerate(range(0, 40, 3), 1)
    ]
    even, odd = (full.take(np.arange(first, len(full), 2)) for first in (0, 1))
    places = {
        (str(part.products[row]), part.table["image"][row].as_py()): (number, row)
        for number, part in enumerate((even, odd))
        for row in range(len(part))
    }
    loaded = export.gallery_migration.load_model(EmbedConfig(config.model, config.catalogs[0], ""))
    assert loaded.artifact.card.preprocess is not None
    images = export.gallery_migration.Images((even, odd), places)
    vectors = images.embed(pending, loaded.artifact.card.preprocess, loaded.open(), 4, 0)
    by_new = np.load(shop / "by-new" / "vectors.npy")[range(0, 40, 3)]
    cut = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, by_new, atol=1e-5)
