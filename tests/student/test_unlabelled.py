from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from student.config import DistillConfig, TargetsConfig
from student.distill import distill
from student.unlabelled import add_unlabelled
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig


@pytest.fixture
def image_folder(catalog: Catalog, tmp_path: Path) -> Path:
    """Write six new images, a scored one, and a smaller copy of another scored one."""
    folder, rng = tmp_path / "more", np.random.default_rng(7)
    folder.mkdir()
    for number in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    images = [Path(catalog.root) / name for name in catalog.select(split="test").table["image"].to_pylist()[:2]]
    shutil.copyfile(images[0], folder / "scored.jpg")
    with Image.open(images[1]) as image:
        image.resize((44, 44)).save(folder / "scored-again.jpg", quality=80)
    return folder


def test_scored_images_are_left_out(catalog: Catalog, image_folder: Path, tmp_path: Path) -> None:
    training = catalog.select(split="train")
    scored = [catalog.select(split="validation"), catalog.select(split="test")]
    joined, summary, parents = add_unlabelled(training, scored, (str(image_folder),), str(tmp_path / "student"))
    assert len(joined) == len(training) + 6
    assert summary["unlabelled"]["left_out"] == 2
    assert joined.products[: len(training)].tolist() == training.products.tolist()
    names = [Path(name).name for name in joined.table["image"].to_pylist()[len(training) :]]
    assert sorted(names) == [f"{n}.png" for n in range(6)]
    assert [parent.role for parent in parents] == ["unlabelled"]


def test_student_learns_from_unlabelled_images(
    config: DistillConfig, catalog: Catalog, image_folder: Path, tmp_path: Path
) -> None:
    losses = replace(config.losses, margin=0.1)
    config = replace(
        config,
        output=str(tmp_path / "s"),
        unlabelled=(str(image_folder),),
        epochs=1,
        targets=TargetsConfig(views=1),
        losses=losses,
    )
    artifact = load_artifact(distill(config))  # type: ignore[arg-type]
    assert artifact.card.catalog is not None
    assert artifact.card.catalog["unlabelled"]["images"] == 6
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "catalog", "unlabelled"}
    cache = load_artifact(tmp_path / "s-views")
    assert np.load(cache.file("view-0000-shard-00000.npy")).shape == (64 + 6, 256)


def test_other_inputs_are_rejected(catalog: Catalog, image_folder: Path, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    training = catalog.select(split="train")
    with pytest.raises(UserError, match="is a catalogue of products. Build one with `--reader images`"):
        add_unlabelled(training, [], (str(catalog.artifact.path),), str(tmp_path / "s"))
    with pytest.raises(UserError, match="unlabelled: no catalogue of .*nowhere"):
        add_unlabelled(training, [], (str(tmp_path / "nowhere"),), str(tmp_path / "s"))


def test_images_reader_takes_all_folders(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "deeper").mkdir()
    shutil.copyfile(image_folder / "0.png", image_folder / "deeper" / "another.png")
    (image_folder / "notes.txt").write_text("no image")
    path = build_catalog(CatalogConfig("images", str(tmp_path / "c"), str(image_folder)))
    catalog = load_catalog(path)
    names = catalog.table["image"].to_pylist()
    assert len(names) in (8, 9)  # A repeated image may be set aside.
    assert set(catalog.table["source"].to_pylist()) == {"unlabelled"}
    assert set(catalog.table["split"].to_pylist()) == {"train"}
