from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog, rows_to_table
from vpr.data.splits import check_leaks, find_leaks, split_by_product


def _rows(counts: list[int]) -> list[dict[str, object]]:
    fixed = {"category": "", "role": "train", "split": "train", "box": None, "source": "made"}
    return [
        {**fixed, "image": f"{p}/{i}.jpg", "product": f"p{p}", "sha256": f"{p}-{i}"}
        for p, count in enumerate(counts)
        for i in range(count)
    ]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=4, max_size=30),
    validation=st.floats(0.0, 0.45),
    test=st.floats(0.05, 0.45),
    seed=st.integers(0, 5),
    shuffle=st.randoms(),
)
def test_splits_are_by_product_in_any_row_order(
    counts: list[int], validation: float, test: float, seed: int, shuffle: object
) -> None:
    assume(round(test * len(counts)) and (validation == 0 or round(validation * len(counts))))
    assume(sum(count > 1 for count in counts) >= round(test * len(counts)) + round(validation * len(counts)))
    rows = _rows(counts)
    first = split_by_product(rows_to_table(rows), validation, test, seed).to_pylist()
    shuffle.shuffle(rows)
    second = split_by_product(rows_to_table(rows), validation, test, seed).to_pylist()
    by_image = {row["image"]: row for row in second}
    assert all(by_image[row["image"]] == row for row in first)
    for product in {row["product"] for row in first}:
        group = [row for row in first if row["product"] == product]
        assert len({row["split"] for row in group}) == 1
        if group[0]["split"] != "train":
            roles = [row["role"] for row in group]
            assert "query" in roles
            assert "gallery" in roles
    test_products = {row["product"] for row in first if row["split"] == "test"}
    assert len(test_products) == round(test * len(counts))


def _split_by_a_simple_loop(
    rows: list[dict[str, object]], validation: float, test: float, seed: int
) -> list[dict[str, object]]:
    images: dict[object, list[dict[str, object]]] = {}
    for row in sorted(rows, key=lambda row: (row["product"], row["image"], str(row["box"]))):
        images.setdefault(row["product"], []).append(row)
    names = np.array([name for name, group in images.items() if len(group) > 1], dtype=np.str_)
    np.random.default_rng(seed).shuffle(names)
    test_count, validation_count = round(test * len(images)), round(validation * len(images))
    split = dict.fromkeys(names.tolist()[:test_count], "test")
    split |= dict.fromkeys(names.tolist()[test_count : test_count + validation_count], "validation")
    split_rows = {}
    for name, group in images.items():
        for number, row in enumerate(group):
            role = row["role"]
            if name in split and role == "train":
                role = "gallery" if number < len(group) / 2 else "query"
            split_rows[id(row)] = {**row, "split": split.get(name, "train"), "role": role}
    return [split_rows[id(row)] for row in rows]


@settings(max_examples=60, deadline=None)
@given(
    drawn_rows=st.lists(
        st.tuples(
            st.sampled_from(["", "a", "b", "c", "é", "aa", "B"]),
            st.sampled_from(["1", "10", "2", "é"]),
            st.sampled_from(["train", "train", "gallery", "query"]),
            st.sampled_from([None, 1.0, 10.0, 9.0]),
        ),
        min_size=8,
        max_size=40,
    ),
    seed=st.integers(0, 3),
)
def test_splits_equal_a_simple_loop(drawn_rows: list[tuple[str, str, str, float | None]], seed: int) -> None:
    fixed = {"category": "", "split": "train", "source": "made"}
    rows: list[dict[str, object]] = [
        {**fixed, "product": product, "image": image, "role": role, "sha256": str(number)}
        | {"box": None if left is None else {"x": left, "y": 0.0, "w": 1.0, "h": 1.0}}
        for number, (product, image, role, left) in enumerate(drawn_rows)
    ]
    products = [row["product"] for row in rows]
    assume(sum(products.count(name) > 1 for name in set(products)) >= 4)
    validation = test = 1.5 / len(set(products))
    result = split_by_product(rows_to_table(rows), validation, test, seed).to_pylist()
    assert result == _split_by_a_simple_loop(rows, validation, test, seed)


def test_leaks_of_products_and_images_are_rejected(catalog: Catalog) -> None:
    check_leaks(catalog.select(split="train"), catalog.select(split="test"))
    with pytest.raises(UserError, match="leak: 4 products are trained and scored: .* Rerun `vpr catalog`"):
        check_leaks(catalog, catalog.select(split="test"))
    leaks = check_leaks(catalog, catalog.select(split="test"), allow=True)
    assert {key: value["count"] for key, value in leaks.items()} == {"products": 4, "images": 32}
    assert set(leaks["products"]["first"]) <= set(catalog.select(split="test").products)
    assert all(catalog.root.joinpath(image).is_file() for image in leaks["images"]["first"])
    renamed = [{**row, "product": "other"} for row in catalog.select(split="test").table.to_pylist()]
    other_names = Catalog(pa.Table.from_pylist(renamed, schema=SCHEMA), catalog.root)
    with pytest.raises(UserError, match=r"leak: 32 images \(same bytes\) are trained and scored"):
        check_leaks(other_names, catalog.select(split="test"))
    assert list(check_leaks(other_names, catalog.select(split="test"), allow=True)) == ["images"]


def test_warning_of_an_allowed_leak_names_products(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "product": "p", "sha256": str(i)} for i, row in enumerate(catalog.table.to_pylist())]
    leaking = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), catalog.root)
    with caplog.at_level("WARNING", logger="vpr"):
        assert len(find_leaks(leaking, allow=True)) == 3
    assert "train and validation share 1 products (p). The card records it." in caplog.text


def test_shares_without_training_products_are_rejected() -> None:
    with pytest.raises(UserError, match="together less than 1"):
        split_by_product(rows_to_table(_rows([2, 2])), 0.5, 0.5, 0)


def test_share_without_a_product_is_rejected() -> None:
    with pytest.raises(UserError, match=r"validation: 0\.1 selects none of 2 products"):
        split_by_product(rows_to_table(_rows([2, 2])), 0.1, 0, 0)
    with pytest.raises(UserError, match=r"test: 0\.5 selects none of 4 products\. 0 products have two images"):
        split_by_product(rows_to_table(_rows([1, 1, 1, 1])), 0, 0.5, 0)
