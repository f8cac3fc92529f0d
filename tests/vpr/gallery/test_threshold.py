"""Bound of a stored threshold: in galleries that grow, and with a filter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vpr.gallery.shop import EVEN, name_images, unit_vectors, write_model, write_shop, write_threshold
from vpr.gallery.change import add_images, create_gallery, remove_images, update_images
from vpr.gallery.config import AddConfig, CreateConfig, GallerySearchConfig, InfoConfig, RemoveConfig, UpdateConfig
from vpr.gallery.inspect import print_info
from vpr.gallery.search_command import search_in_gallery
from vpr.retrieval.threshold_command import StoredThreshold

pytest.importorskip("lancedb")


def test_every_command_warns_of_a_gallery_that_outgrew_its_threshold(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = write_shop(tmp_path / "first", name_images(30), unit_vectors(30))
    more = write_shop(tmp_path / "more", name_images(3, first=10), unit_vectors(3, seed=1))
    queries = write_shop(tmp_path / "q", name_images(2), unit_vectors(2), roles=["query"] * 2)
    model = write_model(tmp_path, "student")
    thresholds = [
        write_threshold(tmp_path / f"t{products}", model, StoredThreshold("margin", 0.1, EVEN, products))
        for products in (4, 5)
    ]
    path = str(tmp_path / "gallery")

    def warning_of(command: Callable[[], object]) -> str:
        caplog.clear()
        command()
        found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(found) <= 1
        return found[0] if found else ""

    # 10 products are not more than twice 5.
    assert warning_of(lambda: create_gallery(CreateConfig(first, path, threshold=thresholds[1]))) == ""
    assert warning_of(lambda: print_info(InfoConfig(path))) == ""
    assert "no match  margin below 0.1000, confirmed in a gallery of 5 products" in capsys.readouterr().out
    assert warning_of(lambda: search_in_gallery(GallerySearchConfig(path, queries))) == ""
    grown = "threshold: confirmed in a gallery of 5 products, this one has 11, so more false accepts are likely."
    assert warning_of(lambda: add_images(AddConfig(path, more))).startswith(grown)
    assert warning_of(lambda: print_info(InfoConfig(path))).startswith(grown)
    assert warning_of(lambda: search_in_gallery(GallerySearchConfig(path, queries))).startswith(grown)
    assert warning_of(lambda: update_images(UpdateConfig(path, more))).startswith(grown)
    assert print_info(InfoConfig(path))["threshold"] == {"score": "margin", "value": 0.1, "gallery_products": 5}
    remove_images(RemoveConfig(path, products=("p10",)))
    assert warning_of(lambda: update_images(UpdateConfig(path, threshold=thresholds[1]))) == ""
    smaller = warning_of(lambda: update_images(UpdateConfig(path, threshold=thresholds[0])))
    assert smaller.startswith("threshold: confirmed in a gallery of 4 products, this one has 10,")
    other = CreateConfig(first, str(tmp_path / "other"), threshold=thresholds[0])
    assert warning_of(lambda: create_gallery(other)) == smaller
