from __future__ import annotations

from collections import Counter

import pytest

from calibration.select import select_pictures
from vpr.catalog import Catalog
from vpr.errors import UserError


def test_products_take_turns(catalog: Catalog) -> None:
    training = catalog.select(split="train")
    for count in (8, 20, 64):
        rows = select_pictures(training, count, seed=0)
        assert len(set(rows.tolist())) == count
        drawn = Counter(training.products[rows].tolist())
        assert len(drawn) == 8
        assert max(drawn.values()) - min(drawn.values()) <= 1


def test_the_seed_decides(catalog: Catalog) -> None:
    training = catalog.select(split="train")
    assert select_pictures(training, 20, 0).tolist() == select_pictures(training, 20, 0).tolist()
    assert select_pictures(training, 20, 0).tolist() != select_pictures(training, 20, 1).tolist()


def test_scored_pictures_are_refused(catalog: Catalog) -> None:
    with pytest.raises(UserError, match="test pictures are scored later|pictures of the test split are scored later"):
        select_pictures(catalog.select(split="test"), 4, 0)
    with pytest.raises(UserError, match="choose 1 to that many"):
        select_pictures(catalog.select(split="train"), 10_000, 0)
