from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vpr.gallery.shop import name_images, unit_vectors, write_shop
from vpr.common.errors import UserError
from vpr.gallery.change import compact_gallery, create_gallery
from vpr.gallery.config import CompactConfig, CreateConfig, GallerySearchConfig
from vpr.gallery.gallery import load_gallery
from vpr.gallery.nearest import find_nearest
from vpr.gallery.search_command import search_in_gallery

lancedb = pytest.importorskip("lancedb")


def search(gallery: str, queries: str, output: Path, **values: Any) -> list[dict[str, str]]:
    search_in_gallery(GallerySearchConfig(gallery, queries, str(output), **values))
    with output.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("where", "k", "count"), [("", 200, 200), ("product = 'p7'", 5, 3), ("product IN ('p1', 'p2')", 6, 6)]
)
def test_few_probes_find_as_many_images_as_all(where: str, k: int, count: int, tmp_path: Path) -> None:
    embeddings = write_shop(tmp_path / "e", name_images(200), unit_vectors(200))
    gallery = str(create_gallery(CreateConfig(embeddings, str(tmp_path / "gallery"))))
    compact_gallery(CompactConfig(gallery, index=16))
    snapshot, queries = load_gallery(gallery).snapshot(), unit_vectors(8, seed=1)
    builder = snapshot._table.search(queries[0]).distance_type("dot").nprobes(1)
    assert len(builder.limit(200).to_arrow()) < 60  # of the nearest partition
    found = find_nearest(snapshot, queries, k, where, probes=1)
    exact = find_nearest(snapshot, queries, k, where)
    assert found.found.sum(axis=1).tolist() == [count] * 8
    np.testing.assert_array_equal(np.sort(found.rows), np.sort(exact.rows))


def test_probes_without_the_index_that_a_stopped_compact_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = write_shop(tmp_path / "e", name_images(60), unit_vectors(60))
    gallery = str(create_gallery(CreateConfig(embeddings, str(tmp_path / "gallery"))))
    queries = write_shop(tmp_path / "q", name_images(5), unit_vectors(5, seed=1), roles=["query"] * 5)
    out = tmp_path / "found.csv"
    exact = search(gallery, queries, out)
    with pytest.raises(UserError, match="probes: the gallery has no index"):
        search(gallery, queries, out, probes=1)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lancedb.table.LanceTable, "create_index", stop)
        with pytest.raises(KeyboardInterrupt):
            compact_gallery(CompactConfig(gallery, index=4))
    snapshot = load_gallery(gallery).snapshot()
    assert (snapshot.version, snapshot.partitions, snapshot.index()) == (2, 4, None)
    caplog.clear()
    assert search(gallery, queries, out, probes=1) == exact
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("probes: the index of version 2 is not built yet, so all images are compared.")
    compact_gallery(CompactConfig(gallery))
    caplog.clear()
    found = search(gallery, queries, out, probes=4)
    assert [row["image"] for row in found] == [row["image"] for row in exact]
    scores = [[float(row["score"]) for row in rows] for rows in (found, exact)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
