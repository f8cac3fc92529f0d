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
from student.teacher_model import TeacherModel, load_teacher_model
from teacher.model import load_teacher
from tests.student.conftest import STUDENT
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.config import ViewConfig
from vpr.retrieval.config import SearchConfig
from vpr.retrieval.embeddings import load_embeddings, torch_forward
from vpr.retrieval.search_command import search_gallery


def test_the_student_comes_close_to_its_teacher(student: Path, teacher: Path, catalog: Catalog) -> None:
    import csv

    artifact = load_artifact(student, "student")
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "catalog"}
    with artifact.file("metrics.csv").open() as stream:
        losses = [float(row["cosine_epoch"]) for row in csv.DictReader(stream) if row["cosine_epoch"]]
    assert losses[-1] < 0.6 * losses[0]
    assert artifact.card.metrics["parameters"] < load_artifact(teacher).card.metrics["parameters"]


def test_cached_signal_is_the_teacher_on_the_very_views(teacher: Path, catalog: Catalog, tmp_path: Path) -> None:
    model, artifact = load_teacher(teacher)
    training, views = catalog.select(split="train"), ViewConfig()
    signal = build_teacher_cache(
        str(tmp_path / "views"),
        TeacherModel.of(model, artifact),
        training,
        views,
        TargetsConfig(views=2, shard=40),
        seed=9,
    )
    assert [[shard.shape for shard in view] for view in signal.shards] == [[(40, 256), (24, 256)]] * 2
    sizes = [entry.size for entry in signal.artifact.card.files.values()]
    assert sum(sizes) == cache_bytes(64, 256, TargetsConfig(views=2, shard=40))
    assert artifact.card.preprocess is not None
    from vpr.data.pixels import read_pixels

    rows = torch.tensor([3, 40])
    pixels = torch.from_numpy(
        np.concatenate([read_pixels(training, artifact.card.preprocess, range(r, r + 1)) for r in rows.tolist()])
    )
    seen = apply_views(pixels, draw_views(views, 9, rows, torch.full_like(rows, 1))).numpy()
    expected = torch_forward(model)(artifact.card.preprocess.normalise(seen))
    found = signal.lookup(rows.numpy(), 1)
    # bf16, where the hardware has it, and float16 storage.
    assert (found * expected).sum(axis=1) == pytest.approx(1, abs=5e-3)


def test_cached_signal_is_not_reused_for_another_order_of_the_images(
    teacher: Path, catalog: Catalog, tmp_path: Path
) -> None:
    source, training = load_teacher_model(teacher), catalog.select(split="train")
    turned = Catalog(training.table.take(pa.array(np.arange(len(training))[::-1])), training.root)
    one = TargetsConfig(views=1)
    first = build_teacher_cache(str(tmp_path / "v"), source, training, ViewConfig(), one, seed=0).artifact.sha256
    again = build_teacher_cache(str(tmp_path / "v"), source, turned, ViewConfig(), one, seed=0).artifact.sha256
    assert first != again


def test_the_bank_is_drawn_by_its_seed(teacher: Path, catalog: Catalog, tmp_path: Path) -> None:
    source, training = load_teacher_model(teacher), catalog.select(split="train")
    signal = build_teacher_cache(
        str(tmp_path / "views"), source, training, ViewConfig(), TargetsConfig(views=2), seed=0
    )
    assert np.array_equal(signal.draw(20, 4), signal.draw(20, 4))
    assert not np.array_equal(signal.draw(20, 4), signal.draw(20, 5))
    assert signal.draw(1000, 0).shape == (64, 256)


def test_another_dimension_is_refused_by_key(config: DistillConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    wrong = replace(config, model=replace(STUDENT, embedding_dim=64), output=str(tmp_path / "s"))
    with pytest.raises(UserError, match=r"model\.embedding_dim: 64, the teacher's embeddings have 256: set it to 256"):
        distill(wrong)


def test_embeddings_are_kept_with_their_rows_and_searched(student: Path, catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    config = EmbedConfig(str(student), str(catalog.artifact.path), str(tmp_path / "e"), split="test")
    embeddings = load_embeddings(embed_catalog(config))
    assert embeddings.vectors.shape == (32, 256)
    assert embeddings.products.tolist() == catalog.select(split="test").products.tolist()
    model, _ = load_student(student)
    alone = embed_catalog(EmbedConfig(str(student), str(catalog.artifact.path), str(tmp_path / "b"), "test", 1))
    np.testing.assert_allclose(load_embeddings(alone).vectors, embeddings.vectors, atol=1e-5)
    assert model.config == STUDENT
    csv_path = search_gallery(SearchConfig(str(tmp_path / "e"), str(tmp_path / "e"), str(tmp_path / "hits.csv"), k=3))
    assert csv_path is not None
    assert len(csv_path.read_text().splitlines()) == 1 + 16 * 3


def test_two_models_embeddings_are_not_compared(
    student: Path, student_artifact: Path, catalog: Catalog, tmp_path: Path
) -> None:
    assert catalog.artifact is not None
    for name, model in (("a", student), ("b", student_artifact)):
        embed_catalog(EmbedConfig(str(model), str(catalog.artifact.path), str(tmp_path / name), "test"))
    with pytest.raises(UserError, match="with one model"):
        search_gallery(SearchConfig(str(tmp_path / "a"), str(tmp_path / "b")))
