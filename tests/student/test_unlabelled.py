from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from student.config import DistillConfig, TargetsConfig
from student.distill import distill
from student.teacher_model import TeacherModel
from student.unlabelled import MAX_WRONG, leave_out_scored, measure_threshold, open_unlabelled
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.duplicates import NEAR_BITS, image_hash
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import l2_normalize

CONFIG = DistillConfig(teacher=("t",), catalog="c", output="o")


@pytest.fixture
def image_folder(catalog: Catalog, tmp_path: Path) -> Path:
    """Write six new images, a scored one, a smaller copy of another scored one, and one of a training product."""
    folder, rng = tmp_path / "more", np.random.default_rng(7)
    folder.mkdir()
    for number in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    test = catalog.select(split="test")
    shutil.copyfile(test.path(0), folder / "scored.jpg")
    with Image.open(test.path(1)) as image:
        image.resize((44, 44)).save(folder / "scored-again.jpg", quality=80)
    return folder


class _MeanColour(torch.nn.Module):
    """Embedding of an image: its mean colours in a 2 x 2 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))  # shows the device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture
def colours(catalog: Catalog) -> TeacherModel:
    assert catalog.artifact is not None
    return TeacherModel(_MeanColour(), catalog.artifact, Preprocess(size=32), 12)


def _scored(catalog: Catalog) -> list[Catalog]:
    return [catalog.select(split="validation"), catalog.select(split="test")]


def test_scored_images_are_left_out(
    catalog: Catalog, colours: TeacherModel, image_folder: Path, tmp_path: Path
) -> None:
    images, parents = open_unlabelled((str(image_folder),), str(tmp_path / "student"))
    assert [parent.role for parent in parents] == ["unlabelled"]
    assert images is not None
    high = replace(CONFIG, unlabelled_cosine=0.999)
    kept, summary = leave_out_scored(images, _scored(catalog), colours, high, tmp_path / "run")
    assert sorted(kept.table["image"].to_pylist()) == [f"{n}.png" for n in range(6)]
    entry = summary["unlabelled"]
    assert (entry["images"], entry["left_out"], entry["same_bytes"], entry["close"]) == (6, 2, 1, 1)
    assert entry["threshold"]["cosine"] == 0.999
    # Another start of the same run takes the cosines from its folder.
    broken = replace(colours, network=torch.nn.Identity())
    assert leave_out_scored(images, _scored(catalog), broken, high, tmp_path / "run")[1] == summary


def test_dry_run_compares_bytes_alone(
    catalog: Catalog, colours: TeacherModel, image_folder: Path, tmp_path: Path
) -> None:
    images, _ = open_unlabelled((str(image_folder),), str(tmp_path / "student"), dry_run=True)
    assert images is not None
    kept, summary = leave_out_scored(images, _scored(catalog), colours, CONFIG, None)
    assert summary["unlabelled"]["left_out"] == 1
    assert "scored.jpg" not in kept.table["image"].to_pylist()
    assert not list(tmp_path.glob("student*"))


def test_images_that_look_alike_and_show_other_products_stay(
    catalog: Catalog, colours: TeacherModel, tmp_path: Path
) -> None:
    """Objects of different colours on one background have equal hashes of their outlines."""
    (tmp_path / "more").mkdir()
    rng, scored = np.random.default_rng(3), catalog.select(split="test")
    with Image.open(scored.path(0)) as image:
        pixels = np.asarray(image, dtype=np.float64)
        grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    tinted = Image.fromarray((grey * (1, 0.35, 0.35)).astype(np.uint8))
    tinted.save(tmp_path / "more" / "tinted.png")
    with Image.open(scored.path(0)) as image:
        assert (image_hash(image) ^ image_hash(tinted)).bit_count() <= NEAR_BITS
    Image.fromarray((pixels + rng.normal(size=pixels.shape)).clip(0, 255).astype(np.uint8)).save(
        tmp_path / "more/same.png"
    )
    images, _ = open_unlabelled((str(tmp_path / "more"),), str(tmp_path / "student"))
    assert images is not None
    chosen = replace(CONFIG, unlabelled_cosine=0.999)
    kept, _ = leave_out_scored(images, _scored(catalog), colours, chosen, tmp_path / "run")
    assert kept.table["image"].to_pylist() == ["tinted.png"]


def test_threshold_is_that_of_images_of_other_products() -> None:
    """Compare with a loop over all pairs."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 6))
    products = np.array([f"p{number % 40}" for number in range(160)])
    noisy = centres[np.arange(160) % 40] + 0.3 * rng.normal(size=(160, 6))
    vectors = l2_normalize(noisy.astype(np.float32))
    measured = measure_threshold(vectors, products, 120)
    own, other = [], []
    for row in range(120):
        cosines = vectors @ vectors[row]
        same = products == products[row]
        other.append(cosines[~same].max())
        own.append(max(cosines[index] for index in np.flatnonzero(same) if index != row))
    assert measured.images == 120
    assert measured.wrong == pytest.approx(np.mean(np.array(other) >= measured.cosine))
    assert measured.found == pytest.approx(np.mean(np.array(own) >= measured.cosine))
    assert sum(cosine >= measured.cosine - 1e-3 for cosine in other) > 0
    assert measured.wrong <= MAX_WRONG
    given = measure_threshold(vectors, products, 120, 0.5)
    assert given.cosine == 0.5
    assert given.found is not None
    assert measured.found is not None
    assert given.found >= measured.found


@pytest.mark.parametrize(("count", "products"), [(9, 3), (20, 1)])
def test_threshold_needs_images_of_two_products(count: int, products: int) -> None:
    vectors = l2_normalize(np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32))
    names = np.array([f"p{number % products}" for number in range(count)])
    with pytest.raises(UserError, match=rf"unlabelled_cosine: it is measured on 10 or more .*, got {count}\. Set it"):
        measure_threshold(vectors, names, count)


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
    entry = artifact.card.catalog["unlabelled"]
    assert entry["images"] + entry["left_out"] == 8
    assert entry["same_bytes"] == 1
    assert entry["threshold"]["wrong"] <= MAX_WRONG
    assert artifact.card.config["unlabelled_by"] == "embedding"
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "catalog", "unlabelled"}
    cache = load_artifact(tmp_path / "s-views")
    assert np.load(cache.file("view-0000-shard-00000.npy")).shape == (64 + entry["images"], 256)


def test_other_inputs_are_rejected(catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    with pytest.raises(UserError, match="is a catalogue of products. Build one with `--reader images`"):
        open_unlabelled((str(catalog.artifact.path),), str(tmp_path / "s"))
    with pytest.raises(UserError, match="unlabelled: no catalogue of .*nowhere"):
        open_unlabelled((str(tmp_path / "nowhere"),), str(tmp_path / "s"))


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
