from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.vpr.gallery.shop import DIM, Ids, Vectors, name_images, unit_vectors, write_model, write_plan, write_shop
from vpr.common.errors import CheckFailed, UserError
from vpr.gallery.change import add_images, compact_gallery, create_gallery, remove_images, update_images
from vpr.gallery.config import (
    AddConfig,
    CompactConfig,
    CreateConfig,
    ExportConfig,
    GallerySearchConfig,
    InfoConfig,
    RemoveConfig,
    UpdateConfig,
    VerifyGalleryConfig,
)
from vpr.gallery.gallery import BACKFILL, IDS, PENDING, Gallery, load_gallery, vectors_of
from vpr.gallery.inspect import export_embeddings, print_info, verify_gallery
from vpr.gallery.migrate import Pending, list_pending, replace_adapted, start_migration
from vpr.gallery.plan import Plan, load_plan
from vpr.gallery.search_command import search_in_gallery
from vpr.retrieval.embeddings import load_embeddings

pytest.importorskip("lancedb")

NEW = 5
SHOP = name_images(30)


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    """30 images of 10 products, with a title of one of them."""
    titles = tmp_path / "titles.csv"
    titles.write_text("product,title\np1,red\n")
    embeddings = write_shop(tmp_path / "old-embeddings", SHOP, unit_vectors(30), "old")
    return load_gallery(
        create_gallery(CreateConfig(embeddings, str(tmp_path / "gallery"), ("title",), metadata=str(titles)))
    )


@pytest.fixture
def plan(tmp_path: Path, gallery: Gallery) -> Plan:
    models = write_model(tmp_path, "old"), write_model(tmp_path, "new", NEW)
    return load_plan(write_plan(tmp_path / "plan", *models, unit_vectors(DIM, NEW, seed=7), "spread"))


def contents(gallery: Gallery, version: int = 0) -> dict[Ids, tuple[Any, ...]]:
    snapshot = gallery.snapshot(version)
    names = [name for name in (*IDS, "title", BACKFILL) if name in snapshot.schema.names]
    table = snapshot.read([*names, "vector"])
    rows = zip(*(table[name].to_pylist() for name in names), vectors_of(table), strict=True)
    return {(product, image): (*values, vector.tobytes()) for product, image, *values, vector in rows}


def embed(images: list[Pending]) -> Vectors:
    """Return what the new model sees in these images."""
    new = dict(zip(SHOP, unit_vectors(30, NEW, seed=3), strict=True))
    return np.array([new[image.product, image.image] for image in images])


def search(gallery: Gallery, embeddings: str, **values: Any) -> list[dict[str, str]]:
    output = gallery.path.parent / "found.csv"
    search_in_gallery(GallerySearchConfig(str(gallery.path), embeddings, str(output), **values))
    with output.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_first_step_is_one_version_of_adapted_vectors(gallery: Gallery, plan: Plan) -> None:
    before = contents(gallery)
    start_migration(gallery, plan)
    after = contents(gallery)
    assert after.keys() == before.keys()
    places = {place for _, place, _ in after.values()}
    assert places == set(range(1, 31))
    for key, (title, _, vector) in after.items():
        mapped = np.frombuffer(before[key][-1], np.float32).astype(np.float64) @ plan.adapter.weight
        np.testing.assert_allclose(np.frombuffer(vector, np.float32), mapped / np.linalg.norm(mapped), atol=1e-5)
        assert title == before[key][0]
    first = sorted(after, key=lambda key: after[key][1])[:10]
    assert len({product for product, _ in first}) == 10  # the order of the plan: one image of each product
    assert contents(gallery, version=1) == before
    info = print_info(InfoConfig(str(gallery.path)))
    assert (info["version"], info["dimensions"], info["model"]) == (2, NEW, "new")
    assert (info["migrated_from"], info["adapted"], info["images"]) == ("old", 30, 30)
    start_migration(gallery, plan)
    assert gallery.snapshot().version == 2  # nothing to do again


def test_each_part_is_one_version(
    gallery: Gallery, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_migration(gallery, plan)
    adapted = contents(gallery)
    pending = list_pending(gallery, plan)
    assert [image.place for image in pending] == list(range(1, 31))
    assert replace_adapted(gallery, plan.target, pending[:12], embed(pending[:12])) == 12
    assert gallery.snapshot().version == 3
    after = contents(gallery)
    done = {(image.product, image.image) for image in pending[:12]}
    assert {key for key in after if after[key] != adapted[key]} == done
    assert {place for key, (_, place, _) in after.items() if key in done} == {None}
    assert {after[key][0] for key in after if key[0] == "p1"} == {"red"}
    print_info(InfoConfig(str(gallery.path)))
    assert "from old, 12 of 30 images embedded again, 40.0%" in capsys.readouterr().out
    assert list_pending(gallery, plan) == pending[12:]
    new = write_shop(tmp_path / "new-embeddings", SHOP, unit_vectors(30, NEW, seed=3), "new")
    result = verify_gallery(VerifyGalleryConfig(str(gallery.path), (new,)))
    assert (result["compared"], result["adapted"]) == (12, 18)
    replace_adapted(gallery, plan.target, pending[12:], embed(pending[12:]))
    assert list_pending(gallery, plan) == []
    expected = {key: vector.tobytes() for key, vector in zip(SHOP, unit_vectors(30, NEW, seed=3), strict=True)}
    assert {key: values[-1] for key, values in contents(gallery).items()} == expected


def test_queries_at_each_point(gallery: Gallery, plan: Plan, tmp_path: Path) -> None:
    old = write_shop(tmp_path / "q-old", SHOP[:4], unit_vectors(4), "old", ["query"] * 4)
    queries = unit_vectors(4, NEW, seed=9)
    new = write_shop(tmp_path / "q-new", SHOP[:4], queries, "new", ["query"] * 4)
    with pytest.raises(UserError, match="embedded with 'new', the gallery with 'old'"):
        search(gallery, new)
    start_migration(gallery, plan)
    pending = list_pending(gallery, plan)
    for start in (0, 10, 20, 30):
        rows = search(gallery, new, k=1)
        stored = contents(gallery)
        keys = list(stored)
        vectors = np.array([np.frombuffer(stored[key][-1], np.float32) for key in keys], np.float64)
        best = np.argmax(queries.astype(np.float64) @ vectors.T, axis=1)
        assert [(row["product"], row["image"]) for row in rows] == [keys[row] for row in best]
        state = f"the gallery was migrated to 'new' \\({start} of 30 images embedded again, .*%\\)"
        with pytest.raises(UserError, match=rf"^queries: .*embedded with 'old', {state}"):
            search(gallery, old)
        if part := pending[start : start + 10]:
            replace_adapted(gallery, plan.target, part, embed(part))
    assert search(gallery, old, version=1, k=1)[0]["image"] == SHOP[0][1]  # an older version has its own model


def test_changes_during_a_migration(gallery: Gallery, plan: Plan, tmp_path: Path) -> None:
    """Images that were removed or updated while a part was embedded stay so."""
    path = str(gallery.path)
    start_migration(gallery, plan)
    pending = list_pending(gallery, plan)
    removed, updated = pending[0], pending[1]
    remove_images(RemoveConfig(path, images=(removed.image,)))
    key = (updated.product, updated.image)
    fresh = write_shop(tmp_path / "fresh", [key], unit_vectors(1, NEW, seed=20), "new")
    update_images(UpdateConfig(path, fresh))
    more = write_shop(tmp_path / "more", name_images(3, first=90), unit_vectors(3, NEW, seed=21), "new")
    add_images(AddConfig(path, more))
    prices = tmp_path / "titles.csv"
    prices.write_text(f"product,title\n{pending[2].product},changed\n")
    update_images(UpdateConfig(path, metadata=str(prices)))
    compact_gallery(CompactConfig(path))
    assert replace_adapted(gallery, plan.target, pending[:3], embed(pending[:3])) == 1
    after = contents(gallery)
    assert len(after) == 32
    assert (removed.product, removed.image) not in after
    assert after[key][-1] == unit_vectors(1, NEW, seed=20).tobytes()
    assert after[pending[2].product, pending[2].image][:2] == ("changed", None)
    assert {after[other][1] for other in name_images(3, first=90)} == {None}
    assert len(list_pending(gallery, plan)) == 27
    assert replace_adapted(gallery, plan.target, pending[:3], embed(pending[:3])) == 0
    verify_gallery(VerifyGalleryConfig(path))
    old = write_shop(tmp_path / "late", name_images(3, first=80), unit_vectors(3), "old")
    with pytest.raises(UserError, match=r"embedded with 'old', the gallery was migrated to 'new' \(5 of 32"):
        add_images(AddConfig(path, old))


def test_verify_finds_a_wrong_mark(gallery: Gallery, plan: Plan) -> None:
    start_migration(gallery, plan)
    verify_gallery(VerifyGalleryConfig(str(gallery.path)))
    table = gallery.snapshot().read(gallery.snapshot().schema.names, f"{BACKFILL} = 1").drop_columns(["_rowid"])
    column = table.schema.names.index(BACKFILL)
    gallery.store.replace(table.set_column(column, table.schema.field(BACKFILL), pa.array([None], pa.int64())), IDS)
    assert gallery.snapshot().count(PENDING) == 29
    with pytest.raises(CheckFailed, match="1 problems: .* changed since it was added"):
        verify_gallery(VerifyGalleryConfig(str(gallery.path)))


def test_export_marks_adapted_images(
    gallery: Gallery, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vpr"), "propagate", True)
    start_migration(gallery, plan)
    exported = load_embeddings(export_embeddings(ExportConfig(str(gallery.path), str(tmp_path / "out"))))
    assert "30 images have vectors of the adapter. Finish `vpr gallery migrate`" in caplog.text
    assert (exported.model.name, exported.vectors.shape) == ("new", (30, NEW))
    assert exported.artifact.card.metrics["adapted"] == 30


def test_threshold_is_outgrown(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.vpr.retrieval.test_threshold_command import draw_vectors, settings, write
    from vpr.retrieval.threshold_command import find_threshold

    monkeypatch.setattr(logging.getLogger("vpr"), "propagate", True)
    embeddings = {name: write(tmp_path, draw_vectors(seed=seed), name) for seed, name in enumerate(("old", "new"))}
    found = {}
    for name, path in embeddings.items():
        (tmp_path / f"t-{name}").mkdir()
        found[name] = str(find_threshold(settings(path, tmp_path / f"t-{name}")))
    path = str(create_gallery(CreateConfig(embeddings["old"], str(tmp_path / "gallery"), threshold=found["old"])))
    gallery = load_gallery(path)
    stored = gallery.threshold(gallery.snapshot())
    models = (write_model(tmp_path, f"{name}-weights") for name in ("old", "new"))
    plan = load_plan(write_plan(tmp_path / "plan", *models, np.eye(16, dtype=np.float32)))
    start_migration(gallery, plan)
    assert "threshold: the stored one is of 'old-weights' and no longer applies. Calibrate again with" in caplog.text
    assert gallery.threshold(gallery.snapshot()) is None
    assert gallery.threshold(gallery.snapshot(1)) == stored
    print_info(InfoConfig(path))
    assert "never: the stored threshold is of an earlier model. Calibrate again" in capsys.readouterr().out
    caplog.clear()
    assert all(row["product"] for row in search(gallery, embeddings["new"], k=1))
    assert "so all queries are answered. Calibrate again" in caplog.text
    with pytest.raises(UserError, match="the threshold is of model 'old-weights'"):
        update_images(UpdateConfig(path, threshold=found["old"]))
    update_images(UpdateConfig(path, threshold=found["new"]))
    assert "200 of 200 images have vectors of the adapter, for which it was not confirmed" in caplog.text
    gallery = load_gallery(path)
    assert gallery.threshold(gallery.snapshot()) is not None
    assert gallery.threshold(gallery.snapshot(1)) is None


def test_plans_of_others(gallery: Gallery, plan: Plan, tmp_path: Path) -> None:
    old, new = (write_model(tmp_path, name) for name in ("old", "new"))
    third = write_model(tmp_path, "third", 4)
    to_third = load_plan(write_plan(tmp_path / "to-third", new, third, unit_vectors(NEW, 4)))
    narrow = load_plan(write_plan(tmp_path / "narrow", old, third, unit_vectors(3, 4)))
    version = gallery.snapshot().version
    for other, message in (
        (to_third, "it migrates from 'new' to 'third', the gallery's model is 'old'"),
        (narrow, "it migrates 3 dimensions, the gallery has 8"),
    ):
        with pytest.raises(UserError, match=rf"^plan: .*{message}"):
            start_migration(gallery, other)
    assert gallery.snapshot().version == version
    start_migration(gallery, plan)
    with pytest.raises(UserError, match="30 images have vectors of the adapter of an earlier migration. Finish that"):
        start_migration(gallery, to_third)
    pending = list_pending(gallery, plan)
    replace_adapted(gallery, plan.target, pending, embed(pending))
    start_migration(gallery, to_third)
    with pytest.raises(UserError, match="another process migrated it to 'third' meanwhile"):
        replace_adapted(gallery, plan.target, pending, embed(pending))
    info = print_info(InfoConfig(str(gallery.path)))
    assert (info["model"], info["migrated_from"], info["dimensions"]) == ("third", "new", 4)


def test_index_is_built_again(tmp_path: Path) -> None:
    ids, vectors = name_images(600), unit_vectors(600)
    path = create_gallery(CreateConfig(write_shop(tmp_path / "e", ids, vectors, "old"), str(tmp_path / "gallery")))
    compact_gallery(CompactConfig(str(path), index=4))
    models = write_model(tmp_path, "old"), write_model(tmp_path, "new", NEW)
    gallery = load_gallery(path)
    start_migration(gallery, load_plan(write_plan(tmp_path / "plan", *models, unit_vectors(DIM, NEW, seed=7))))
    assert print_info(InfoConfig(str(path)))["index"] == {"partitions": 4, "images": 600, "others": 0}
    assert verify_gallery(VerifyGalleryConfig(str(path)))["index_found"] > 0.9


def test_empty_gallery(gallery: Gallery, plan: Plan) -> None:
    remove_images(RemoveConfig(str(gallery.path), products=tuple(f"p{number}" for number in range(10))))
    start_migration(gallery, plan)
    assert (len(gallery.snapshot()), list_pending(gallery, plan)) == (0, [])
    assert gallery.model_of(gallery.snapshot()).model.name == "new"


def test_broken_record_of_the_model(gallery: Gallery, plan: Plan) -> None:
    start_migration(gallery, plan)
    schema = gallery.snapshot().schema
    gallery.store.overwrite([], schema.with_metadata({b"model": b'{"dim": 5}'}))
    with pytest.raises(UserError, match=r"the record of the vectors' model is broken \(Field required\). Restore"):
        gallery.snapshot()
