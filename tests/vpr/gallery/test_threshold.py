"""Bound of a stored threshold: in galleries that grow, and with a filter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.vpr.gallery.shop import EVEN, name_images, unit_vectors, write_model, write_shop, write_threshold
from vpr.gallery.change import add_images, create_gallery, remove_images, update_images
from vpr.gallery.config import AddConfig, CreateConfig, GallerySearchConfig, InfoConfig, RemoveConfig, UpdateConfig
from vpr.gallery.gallery import load_gallery
from vpr.gallery.inspect import print_info
from vpr.gallery.nearest import find_best
from vpr.gallery.search_command import search_in_gallery
from vpr.retrieval.config import ScoreName
from vpr.retrieval.open_set import Probability
from vpr.retrieval.threshold_command import StoredThreshold
from vpr.retrieval.threshold_scope import check_filter

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


def test_filter_raises_no_score(tmp_path: Path) -> None:
    """Similarity and margin equal those of a loop in float64; the margin within the filter would be larger."""
    # A product with more images than the first search returns: its queries need a second one.
    ids = [("p0", f"0/{number}.jpg") for number in range(20)] + name_images(60, first=1)
    vectors = unit_vectors(80)
    vectors[:20] = vectors[0] + 0.01 * vectors[:20]
    vectors[:20] /= np.linalg.norm(vectors[:20], axis=1, keepdims=True)
    queries = np.concatenate([unit_vectors(40, seed=1), vectors[:1]])
    path = create_gallery(CreateConfig(write_shop(tmp_path / "e", ids, vectors), str(tmp_path / "gallery")))
    snapshot = load_gallery(path).snapshot()
    kept = {f"p{number}" for number in range(0, 21, 2)}
    where = "product IN ({})".format(", ".join(f"'{product}'" for product in sorted(kept)))
    raised = 0
    for condition, allowed in (("", {product for product, _ in ids}), (where, kept)):
        best = find_best(snapshot, queries, condition)
        for row, query in enumerate(queries.astype(np.float64)):
            scores: dict[str, float] = {}
            for (product, _), vector in zip(ids, vectors.astype(np.float64), strict=True):
                scores[product] = max(scores.get(product, -1.0), float(query @ vector))
            chosen = max(allowed, key=lambda product: scores[product])
            others = {product: score for product, score in scores.items() if product != chosen}
            assert best.similarity[row] == pytest.approx(scores[chosen], abs=1e-5)
            assert best.margin[row] == pytest.approx(scores[chosen] - max(others.values()), abs=1e-5)
            within = scores[chosen] - max(score for product, score in others.items() if product in allowed)
            raised += within > best.margin[row] + 1e-3
    assert raised > 10
    plain, filtered = find_best(snapshot, queries), find_best(snapshot, queries, where)
    assert (filtered.similarity <= plain.similarity + 1e-6).all()
    assert (filtered.margin <= plain.margin + 1e-6).all()
    nothing = find_best(snapshot, queries, "product = 'absent'")
    assert (nothing.similarity == -1).all()
    assert (nothing.margin == 0).all()


@pytest.mark.parametrize(
    ("score", "margin", "is_warned"),
    [("probability", -1.0, True), ("probability", 1.0, False), ("margin", -1.0, False)],
)
def test_falling_probability_is_named(
    score: ScoreName, margin: float, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_filter(StoredThreshold(score, 0.5, Probability(0.0, 2.0, margin), 4))
    assert ("a filter may cause more false accepts" in caplog.text) == is_warned
