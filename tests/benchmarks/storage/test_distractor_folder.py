from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.config import StorageConfig
from benchmarks.report.storage_schema import Storage
from benchmarks.storage.command import measure_storage
from benchmarks.storage.distractor_folder import embed_distractors
from benchmarks.storage.gallery import read_data
from export.config import EmbedConfig
from export.embed import embed_catalog
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import load_embeddings


@pytest.fixture(scope="module")
def embedded(student_artifact: Path, shop: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Embeddings of products of two images, by a student."""
    output = tmp_path_factory.mktemp("vectors") / "vectors"
    return str(embed_catalog(EmbedConfig(str(student_artifact), str(shop), str(output))))


@pytest.fixture
def config(
    embedded: str, student_artifact: Path, shop_catalog: Catalog, texture_folder: Path, tmp_path: Path
) -> StorageConfig:
    """A gallery with a folder of distractors: three scored images, and eight of other bytes."""
    folder = tmp_path / "others"
    (folder / "deep").mkdir(parents=True)
    scored = shop_catalog.select(split="test").table["image"].to_pylist()
    for number, image in enumerate(scored[:3]):
        shutil.copy(texture_folder / image, folder / "deep" / f"copy-{number}.jpg")
    for number, image in enumerate(sorted(texture_folder.glob("*/*.jpg"))[:8]):
        (folder / f"{number}.jpg").write_bytes(image.read_bytes() + b"\0")  # other bytes, the same pixels
    return StorageConfig(
        embedded, str(tmp_path / "storage"), sizes=(100,), dims=(32,), formats=("int8",), indexes=("flat",),
        distractors=str(folder), model=str(student_artifact), seconds=0.0,
    )  # fmt: skip


def test_folder_is_embedded_by_the_model_without_scored_images(
    config: StorageConfig, embedded: str, texture_folder: Path
) -> None:
    scored = load_embeddings(embedded)
    resolved = embed_distractors(config, scored, scored)
    data = read_data(resolved, scored, scored)
    assert (len(data.model.distractors), data.left_out) == (8, 3)
    images = sorted(texture_folder.glob("*/*.jpg"))[:8]
    rows = [scored.images.tolist().index(str(path.relative_to(texture_folder))) for path in images]
    np.testing.assert_allclose(data.model.distractors, scored.vectors[rows], atol=1e-5)
    written = Path(f"{config.output}.distractors/model/card.json")
    before = written.stat().st_mtime_ns
    assert embed_distractors(config, scored, scored) == resolved
    assert written.stat().st_mtime_ns == before  # up to date


def test_command_counts_images_of_the_folder(config: StorageConfig) -> None:
    path = measure_storage(config)
    storage = Storage.model_validate_json(load_artifact(path, "report").file("storage.json").read_bytes())
    assert storage.galleries[0].real_distractors == 8
    card = load_artifact(path, "report").card
    assert card.config["distractors"] == config.distractors
    before = (path / "card.json").read_bytes()
    (Path(config.distractors) / "0.jpg").unlink()
    assert measure_storage(config) == path
    assert (path / "card.json").read_bytes() != before  # the folder has changed


def test_reference_embeds_the_same_folder(config: StorageConfig, embedded: str) -> None:
    scored = load_embeddings(embedded)
    pair = replace(config, reference=embedded, reference_model=config.model)
    resolved = embed_distractors(pair, scored, scored)
    first, second = load_embeddings(resolved.distractors), load_embeddings(resolved.reference_distractors)
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.vectors, second.vectors)


def test_unusable_folders_and_models_are_one_line(
    config: StorageConfig, embedded: str, each_student: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.jpg").touch()
    pair = {"reference": embedded, "reference_distractors": embedded}
    for values, message in (
        ({"model": ""}, "model: distractors is a folder of images, and .* has to embed them. Set --model"),
        ({"model": str(each_student)}, "model: .* is not 'student', which made"),
        ({"model": embedded}, "expected an artifact of kind"),
        ({"distractors": str(tmp_path / "missing")}, "distractors: .*missing is not a folder"),
        ({"distractors": str(tmp_path / "file.jpg")}, "distractors: .*file.jpg is not a folder"),
        ({"distractors": str(tmp_path / "empty")}, "there are no images here"),
        ({"distractors": embedded}, "model: it embeds a folder of distractors, and none is given"),
        ({"distractors": ""}, "model: it embeds a folder of distractors, and none is given"),
        (pair, "reference_distractors: distractors is the folder .* Leave it out, and set --reference-model"),
        ({"reference": embedded}, "reference_distractors: needs reference and distractors"),
        ({"reference_model": "x"}, "reference_distractors: needs reference and distractors"),
    ):
        with pytest.raises(UserError, match=message):
            measure_storage(replace(config, **values))
    assert not Path(config.output).exists()
    assert not Path(f"{config.output}.distractors").exists()


def test_unreadable_image_is_named(config: StorageConfig) -> None:
    (Path(config.distractors) / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        measure_storage(config)
    assert not Path(config.output).exists()
