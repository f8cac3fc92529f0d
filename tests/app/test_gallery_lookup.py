from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.search_page.gallery_lookup import load_gallery_searchers
from experiments.random_student import write_random_student
from export.config import EmbedConfig
from export.embed import embed_catalog
from tests.app.page import TOP, Lists, queries, serving
from tests.conftest import small_student
from tests.vpr.gallery.shop import write_plan
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import Catalog
from vpr.gallery.change import create_gallery
from vpr.gallery.config import CreateConfig, GallerySearchConfig
from vpr.gallery.gallery import load_gallery
from vpr.gallery.migrate import start_migration
from vpr.gallery.plan import load_plan
from vpr.gallery.search_command import search_in_gallery

pytest.importorskip("lancedb")


def test_page_stays_open_during_a_migration(
    student_artifact: Path, catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert catalog.artifact is not None
    old, table = str(student_artifact), str(catalog.artifact.path)
    new = str(write_random_student(tmp_path / "new", replace(small_student("conv"), depth=2)))
    embeddings = {
        model: str(embed_catalog(EmbedConfig(model, table, str(tmp_path / f"by-{number}"), "test")))
        for number, model in enumerate((old, new))
    }
    path = str(create_gallery(CreateConfig(embeddings[old], str(tmp_path / "stock"))))
    old_only, images = load_gallery_searchers([old], [path], [table])
    searchers, _ = load_gallery_searchers([old, new], [path], [table])
    assert f"models: no gallery is of {new} now." in caplog.text
    name, data = queries(catalog)[0]
    models = load_artifact(old), load_artifact(new)
    gallery = images.catalogs[0]
    with serving(searchers, gallery) as site, serving(old_only, gallery) as stale:
        before = site.request("POST", "/search", data)
        assert Lists(before).rows == Lists(stale.request("POST", "/search", data)).rows
        start_migration(load_gallery(path), load_plan(write_plan(tmp_path / "plan", *models, np.eye(32, dtype="f"))))
        after, rejected = (served.request("POST", "/search", data) for served in (site, stale))
        embedded = json.loads(site.request("POST", "/embed", data).data)["models"][0]
        page = site.request("GET", "/").text
    assert ("student (torch)" in before.text, "new (torch)" in before.text) == (True, False)
    assert ("student (torch)" in after.text, "new (torch)" in after.text) == (False, True)
    assert "stock, new (torch): 16 gallery images, version 2" in page
    assert (embedded["name"], embedded["sha256"]) == ("stock, new (torch)", models[1].sha256)
    assert rejected.status == 500
    assert "it is of model 'new' by now. Start the page again with that model." in rejected.text
    output = tmp_path / "found.csv"
    search_in_gallery(GallerySearchConfig(path, embeddings[new], str(output), k=TOP))
    with output.open(newline="") as stream:
        expected = [row["image"] for row in csv.DictReader(stream) if row["query"] == name]
    assert [gallery.table["image"][row].as_py() for row in Lists(after).rows[0]] == expected
