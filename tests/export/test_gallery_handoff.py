"""A living gallery hands on its threshold and its metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from export.config import ServingConfig
from export.serving import export_serving
from tests.export.client import run_client, write_served_model
from tests.vpr.gallery.shop import name_images, unit_vectors, write_shop, write_threshold
from vpr.artifacts.store import load_artifact
from vpr.gallery.change import create_gallery
from vpr.gallery.config import CreateConfig, ExportConfig
from vpr.gallery.inspect import export_embeddings
from vpr.retrieval.open_set import Probability, find_best_products
from vpr.retrieval.threshold_command import StoredThreshold

pytest.importorskip("lancedb")
FITTED = Probability(-3.0, 4.0, 2.0)


def test_gallery_hands_on_its_threshold_and_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = write_served_model(tmp_path, 8)
    ids = name_images(12)
    shop = write_shop(tmp_path / "shop", ids, unit_vectors(12))
    (tmp_path / "prices.csv").write_text("product,price\np0,1\np3,4\n")
    threshold = StoredThreshold("margin", 0.1, FITTED, 1, 0.02, 0.9)
    student = load_artifact(tmp_path / "student")
    stored = write_threshold(tmp_path / "threshold", student, threshold)
    stock = str(tmp_path / "stock")
    config = CreateConfig(shop, stock, ("price:number",), str(tmp_path / "prices.csv"), threshold=stored)
    create_gallery(config)
    caplog.clear()
    exported = export_embeddings(ExportConfig(stock, str(tmp_path / "exported")))
    output = export_serving(ServingConfig(model, str(exported), str(tmp_path / "serving")))
    assert "confirmed in a gallery of 1 products, this one has 4" in caplog.text
    written = json.loads((output / "threshold.json").read_text())
    assert {key: written[key] for key in ("score", "threshold", "max_false_accept", "confidence", "results")} == {
        "score": "margin", "threshold": 0.1, "max_false_accept": 0.02, "confidence": 0.9, "results": 4,
    }  # fmt: skip
    products = np.array([product for product, _ in ids])
    queries = unit_vectors(20, seed=1)
    is_match = threshold.accepts(find_best_products(queries, unit_vectors(12), products))
    answers = run_client(output, queries)
    assert [answer != "no match" for answer in answers] == is_match.tolist()
    prices = {row["product"]: row["price"] for answer in answers if answer != "no match" for row in answer}
    assert prices == {"p0": 1.0, "p1": None, "p2": None, "p3": 4.0}
    # Without the second product the margin would be larger.
    part = export_embeddings(ExportConfig(stock, str(tmp_path / "part"), "product <> 'p1'"))
    assert "its margin may rise in a part of the gallery" in caplog.text
    output = export_serving(ServingConfig(model, str(part), str(tmp_path / "part-serving")))
    assert not (output / "threshold.json").exists()
    assert (
        pq.read_table(output / "gallery" / "metadata.parquet")["price"].to_pylist()
        == [1.0] * 3 + [None] * 3 + [4.0] * 3
    )
