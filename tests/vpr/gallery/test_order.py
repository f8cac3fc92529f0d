from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpr.gallery.order import ORDERS, OrderName, order_rows

_IMAGES = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from("0123456789")), min_size=1, max_size=20, unique=True
)


@settings(max_examples=40, deadline=None)
@given(ids=_IMAGES, seed=st.integers(0, 9), name=st.sampled_from(ORDERS))
def test_order_depends_on_ids_only(ids: list[tuple[str, str]], seed: int, name: OrderName) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 3, len(ids)).astype(np.float32)
    shuffled = rng.permutation(len(ids))

    def ordered(rows: np.ndarray) -> list[tuple[str, str]]:
        products, images = zip(*(ids[row] for row in rows), strict=True)
        return [ids[rows[row]] for row in order_rows(name, products, images, lengths[rows], seed)]

    found = ordered(np.arange(len(ids)))
    assert sorted(found) == sorted(ids)
    assert ordered(shuffled) == found


@settings(max_examples=40, deadline=None)
@given(ids=_IMAGES, seed=st.integers(0, 9))
def test_spread_takes_one_image_of_each_product_first(ids: list[tuple[str, str]], seed: int) -> None:
    lengths = np.random.default_rng(seed).random(len(ids)).astype(np.float32)
    products, images = zip(*ids, strict=True)
    rows = order_rows("spread", products, images, lengths)
    places = []
    seen: Counter[str] = Counter()
    for row in rows:
        places.append(seen[products[row]])
        seen[products[row]] += 1
    assert places == sorted(places)
    for product in seen:
        own = [lengths[row] for row in rows if products[row] == product]
        assert own == sorted(own)


def test_error_begins_with_the_shortest() -> None:
    lengths = np.array([0.9, 0.2, 0.5], np.float32)
    assert order_rows("error", ["a", "b", "a"], ["1", "2", "3"], lengths).tolist() == [1, 2, 0]


@pytest.mark.parametrize("name", ORDERS)
def test_no_images(name: OrderName) -> None:
    assert not len(order_rows(name, [], [], np.empty(0, np.float32)))
