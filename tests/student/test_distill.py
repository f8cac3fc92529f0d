from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from student.config import DistillConfig, TargetsConfig
from student.distill import distill
from student.embed import EmbedConfig, embed_catalog
from student.model import load_student
from student.teacher_cache import build_teacher_cache, cache_bytes
from student.teacher_model import load_teacher_model
from tests.student.conftest import STUDENT
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.pixels import read_pixels
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.config import ViewConfig
from vpr.retrieval.config import SearchConfig
from vpr.retrieval.embeddings import load_embeddings, torch_forward
from vpr.retrieval.search_command import search_gallery


def test_student_approaches_its_teacher(student: Path, teacher: Path, catalog: Catalog) -> None:
    import csv

    artifact = load_artifact(student, "student")
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "catalog"}
    with artifact.file("metrics.csv").open() as stream:
        losses = [float(row["cosine_epoch"]) for row in csv.DictReader(stream) if row["cosine_epoch"]]
    assert losses[-1] < 0.6 * losses[0]
    assert artifact.card.metrics["parameters"] < load_artifact(teacher).card.metrics["parameters"]


def test_cache_equals_the_teacher_on_the_views(teacher: Path, catalog: Catalog, tmp_path: Path) -> None:
    model = load_teacher_model(load_artifact(teacher))
    training, views = catalog.select(split="train"), ViewConfig()
    cache = build_teacher_cache(
        str(tmp_path / "views"),
        model,
        training,
        views,
        TargetsConfig(views=2, shard=40),
        seed=9,
    )
    assert [[shard.shape for shard in view] for view in cache.shards] == [[(40, 256), (24, 256)]] * 2
    sizes = [entry.size for entry in cache.artifact.card.files.values()]
    assert sum(sizes) == cache_bytes(64, 256, TargetsConfig(views=2, shard=40))
    rows = torch.tensor([3, 40])
    size = model.preprocess.size
    side = views.decoded_side(size)
    assert side > size  # the views magnify, so they are cut from larger images
    pixels = torch.from_numpy(
        np.concatenate([read_pixels(training, model.preprocess, range(r, r + 1), side) for r in rows.tolist()])
    )
    viewed = apply_views(pixels, draw_views(views, 9, rows, torch.full_like(rows, 1)), size).numpy()
    expected = torch_forward(model.network)(model.preprocess.normalise(viewed))
    cached = cache.lookup(rows.numpy(), 1)
    # The tolerance covers bf16 and the float16 storage.
    assert (cached * expected).sum(axis=1) == pytest.approx(1, abs=5e-3)


def test_cache_depends_on_the_order_of_the_images(teacher: Path, catalog: Catalog, tmp_path: Path) -> None:
    model, training = load_teacher_model(load_artifact(teacher)), catalog.select(split="train")
    reversed_ = Catalog(training.table.take(pa.array(np.arange(len(training))[::-1])), training.root)
    config = TargetsConfig(views=1)
    first = build_teacher_cache(str(tmp_path / "v"), model, training, ViewConfig(), config, seed=0).artifact.sha256
    again = build_teacher_cache(str(tmp_path / "v"), model, reversed_, ViewConfig(), config, seed=0).artifact.sha256
    assert first != again


def test_bank_depends_on_its_seed(teacher: Path, catalog: Catalog, tmp_path: Path) -> None:
    model, training = load_teacher_model(load_artifact(teacher)), catalog.select(split="train")
    cache = build_teacher_cache(str(tmp_path / "views"), model, training, ViewConfig(), TargetsConfig(views=2), seed=0)
    assert np.array_equal(cache.sample(20, 4), cache.sample(20, 4))
    assert not np.array_equal(cache.sample(20, 4), cache.sample(20, 5))
    assert cache.sample(1000, 0).shape == (64, 256)


def test_another_dimension_is_rejected_by_key(config: DistillConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    wrong = replace(config, model=replace(STUDENT, embedding_dim=64), output=str(tmp_path / "s"))
    with pytest.raises(UserError, match=r"model\.embedding_dim: 64 differs from the teacher's 256\. Set it to 256"):
        distill(wrong)


def test_embeddings_of_a_student_are_searchable(student: Path, catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    config = EmbedConfig(str(student), str(catalog.artifact.path), str(tmp_path / "e"), split="test")
    embeddings = load_embeddings(embed_catalog(config))
    assert embeddings.vectors.shape == (32, 256)
    assert embeddings.products.tolist() == catalog.select(split="test").products.tolist()
    model, _ = load_student(student)
    one_by_one = embed_catalog(EmbedConfig(str(student), str(catalog.artifact.path), str(tmp_path / "b"), "test", 1))
    np.testing.assert_allclose(load_embeddings(one_by_one).vectors, embeddings.vectors, atol=1e-5)
    assert model.config == STUDENT
    csv_path = search_gallery(SearchConfig(str(tmp_path / "e"), str(tmp_path / "e"), str(tmp_path / "hits.csv"), k=3))
    assert csv_path is not None
    assert len(csv_path.read_text().splitlines()) == 1 + 16 * 3


def test_embeddings_of_two_models_are_rejected(
    student: Path, student_artifact: Path, catalog: Catalog, tmp_path: Path
) -> None:
    assert catalog.artifact is not None
    for name, model in (("a", student), ("b", student_artifact)):
        embed_catalog(EmbedConfig(str(model), str(catalog.artifact.path), str(tmp_path / name), "test"))
    with pytest.raises(UserError, match="with one model"):
        search_gallery(SearchConfig(str(tmp_path / "a"), str(tmp_path / "b")))
