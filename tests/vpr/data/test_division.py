from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpr.common.errors import UserError
from vpr.data.catalog import Catalog, rows_to_table
from vpr.data.division import Division, Shares, split_by_product
from vpr.data.splits import find_leaks

Row = dict[str, Any]
ROLES = ("train", "train", "train", "gallery", "query")


def _row(image: str, product: str, sha256: str = "", split: str = "", role: str = "train") -> Row:
    fixed = {"category": "", "box": None, "source": "made"}
    return {**fixed, "image": image, "product": product, "role": role, "split": split, "sha256": sha256 or image}


def _rows(counts: list[int]) -> list[Row]:
    return [_row(f"{p}/{i}.jpg", f"p{p}") for p, count in enumerate(counts) for i in range(count)]


def _divide(rows: list[Row], *shares: Any) -> Division:
    return split_by_product(rows_to_table(rows), Shares(*shares))


def _uniform(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256


def _split_of(product: str, validation: float, test: float, seed: int) -> str:
    number = _uniform(f"{seed}:{product}")
    return "test" if number < test else "validation" if number >= 1 - validation else "train"


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=30),
    validation=st.floats(0.0, 0.45),
    test=st.floats(0.0, 0.45),
    seed=st.integers(0, 5),
    shuffle=st.randoms(),
)
def test_split_of_a_product_depends_on_its_id_alone(
    counts: list[int], validation: float, test: float, seed: int, shuffle: random.Random
) -> None:
    rows = _rows(counts)
    shuffle.shuffle(rows)
    divided = _divide(rows, validation, test, seed)
    assert divided.table["image"].to_pylist() == [row["image"] for row in rows]
    for row in divided.table.to_pylist():
        assert row["split"] == _split_of(row["product"], validation, test, seed)
    for number, count in enumerate(counts):
        roles = [row["role"] for row in divided.table.to_pylist() if row["product"] == f"p{number}"]
        if _split_of(f"p{number}", validation, test, seed) == "train":
            assert set(roles) == {"train"}
        else:
            assert set(roles) == ({"gallery"} if count == 1 else {"gallery", "query"})
    for name in ("validation", "test"):
        reached = [note for note in divided.notes if note.startswith(f"{name}: ")]
        in_split = len(set(divided.table.filter(_equal(divided, name))["product"].to_pylist()))
        share = {"validation": validation, "test": test}[name]
        assert bool(reached) == (share > 0)
        assert not reached or reached[0].startswith(f"{name}: {in_split} of {len(counts)} products")


def _equal(division: Division, split: str) -> Any:
    import pyarrow.compute as pc

    return pc.equal(division.table["split"], split)


def test_shares_are_reached_on_average() -> None:
    counts = Counter(_divide(_rows([2] * 20_000), 0.15, 0.25).table["split"].to_pylist())
    assert counts["validation"] / 40_000 == pytest.approx(0.15, abs=0.01)
    assert counts["test"] / 40_000 == pytest.approx(0.25, abs=0.01)
    roles = Counter(_divide(_rows([10] * 2000), 0, 0.99).table["role"].to_pylist())
    assert roles["query"] / (roles["query"] + roles["gallery"]) == pytest.approx(0.5, abs=0.02)


def test_larger_share_keeps_the_products_of_a_smaller_one() -> None:
    def held_out(validation: float, test: float) -> tuple[set[str], set[str]]:
        rows = _divide(_rows([2] * 300), validation, test).table.to_pylist()
        first, second = ({row["product"] for row in rows if row["split"] == s} for s in ("validation", "test"))
        return first, second

    small, large = held_out(0.1, 0.2), held_out(0.3, 0.4)
    assert small[0] < large[0]
    assert small[1] < large[1]
    assert held_out(0.1, 0.4)[0] == small[0]


def test_own_test_rows_stay_and_the_training_products_are_divided() -> None:
    rows = [
        _row(f"{p}/{view}", f"sku-{p:02}", "", *(["test", "gallery" if view < 2 else "query"] if p < 4 else ["train"]))
        for p in range(40)
        for view in range(5)
    ]
    for shares in ((0.2, 0.0), (0.2, 0.2)):
        divided = _divide(rows, *shares)
        tested = [row for row in divided.table.to_pylist() if row["split"] == "test"]
        assert tested == [{**row, "box": None} for row in rows[:20]]
        assert not divided.unmet
        validated = {row["product"] for row in divided.table.to_pylist() if row["split"] == "validation"}
        expected = {f"sku-{p:02}" for p in range(4, 40) if _split_of(f"sku-{p:02}", 0.2, 0, 0) == "validation"}
        assert validated == expected
        assert f"validation: {len(expected)} of 36 products ({len(expected) / 36:.3g}), requested 0.2" in divided.notes
        assert any(note.startswith("test: 4 products as in the data set") for note in divided.notes)
    assert "--test 0.2 adds none" in str(divided.notes)
    again = _divide(rows, 0.2, 0.2, 0, True).table.to_pylist()
    assert all(row["split"] == _split_of(row["product"], 0.2, 0.2, 0) for row in again)


def test_roles_without_a_split_are_scored() -> None:
    rows = [_row(f"{p}/{v}", f"p{p}", role=ROLES[2 + v] if p < 4 else "train") for p in range(9) for v in (1, 2)]
    divided = _divide(rows)
    assert [row["split"] for row in divided.table.to_pylist()] == ["test"] * 8 + ["train"] * 10
    assert divided.notes[0].startswith("roles: 8 images")
    explicit = _divide([{**row, "split": "train"} for row in rows])
    assert set(explicit.table["split"].to_pylist()) == {"train"}


def test_query_of_a_product_with_training_images_is_left_out() -> None:
    rows = [
        _row("a", "1"),
        _row("b", "1", role="query"),
        _row("c", "2", "", "validation"),
        _row("d", "2", role="query"),
    ]
    divided = _divide(rows)
    assert [(row["image"], row["split"], row["role"]) for row in divided.table.to_pylist()] == [
        ("a", "train", "train"),
        ("c", "validation", "gallery"),
        ("d", "validation", "query"),
    ]
    assert divided.left_out == [("b", "a role without a split: other images of its product are trained on")]
    assert "test: 0.5 selects nothing. Images have a role and no split" in _divide(rows, 0, 0.5).unmet[0]


def test_test_product_that_gains_a_training_image_moves_no_other() -> None:
    """With test products of its own, the data set's other products are trained on, whatever their hash."""
    rows = _rows([2] * 30) + [_row("q1", "q", role="query"), _row("q2", "q", role="gallery")]
    first = _divide(rows, 0.2, 0.4)
    second = _divide([*rows, _row("q3", "q")], 0.2, 0.4)
    trained = {row["product"] for row in first.table.to_pylist() if row["split"] == "train"}
    scored = {row["product"] for row in second.table.to_pylist() if row["split"] != "train"}
    assert any(_split_of(product, 0.2, 0.4, 0) == "test" for product in trained)
    assert not trained & scored


def test_roles_that_the_data_set_gives_decide_over_the_others() -> None:
    rows = [_row(name, "1", "", "test", role) for name, role in (("a", "query"), ("b", "train"), ("c", "train"))]
    assert _divide(rows).table["role"].to_pylist() == ["query", "gallery", "gallery"]
    rows = [_row(name, "1", "", "test", role) for name, role in (("a", "gallery"), ("b", "train"), ("c", "train"))]
    assert _divide(rows).table["role"].to_pylist() == ["gallery", "query", "query"]


def test_image_keeps_its_role_when_others_are_added() -> None:
    numbers = {name: _uniform(f"role:0:{name}") for name in (f"{n}.jpg" for n in range(40))}
    low, high = (
        sorted((n for n in numbers if numbers[n] < 0.5), key=numbers.get)[:3],
        [n for n in numbers if numbers[n] >= 0.5],
    )
    rows = [_row(name, "1", "", "test") for name in (*low, *high[:2])]
    first = dict(zip(*(_divide(rows).table[c].to_pylist() for c in ("image", "role")), strict=True))
    assert first == dict.fromkeys(low, "gallery") | dict.fromkeys(high[:2], "query")
    rows += [_row(name, "1", "", "test") for name in high[2:]]
    second = dict(zip(*(_divide(rows).table[c].to_pylist() for c in ("image", "role")), strict=True))
    assert {name: second[name] for name in first} == first
    alone = _divide([_row(name, "1", "", "test") for name in low]).table.to_pylist()
    assert [row["role"] for row in alone] == ["gallery", "gallery", "query"]  # the last by its hash
    copies = _divide([_row("a", "1", "s", "test"), _row("b", "1", "s", "test")]).table.to_pylist()
    assert [row["role"] for row in copies] == ["gallery", "gallery"]


def test_image_of_several_splits_is_left_out() -> None:
    """One size chart for products of every split, and an own test image that is also trained on."""
    rows = [_row(f"{p}/{v}", f"p{p}") for p in range(20) for v in range(2)]
    chart = [_row(f"{p}/chart", f"p{p}", "chart") for p in range(20)]
    divided = _divide(rows + chart, 0.3, 0.3)
    assert {name for name, _ in divided.left_out} == {row["image"] for row in chart}
    assert len(divided.table) == 40
    same = [row for row in chart if _split_of(row["product"], 0.3, 0.3, 0) == "train"]
    assert _divide(rows + same, 0.3, 0.3).left_out == []
    own = [_row("a", "1", "x", "train"), _row("b", "2", "x", "test"), _row("c", "2", "y", "validation", "query")]
    divided = _divide([*own, _row("d", "3", "y")])
    assert divided.table["image"].to_pylist() == ["b", "c"]
    assert divided.left_out == [
        ("a", "in several splits: same bytes as b of test"),
        ("d", "in several splits: same bytes as c of validation"),
    ]


@pytest.mark.parametrize(
    ("rows", "shares", "message"),
    [
        (
            _rows([2, 2]),
            (0.001, 0),
            r"validation: 0\.001 selects none of 2 products\. 2 products have two images, .* --seed",
        ),
        (
            _rows([1, 1, 1, 1]),
            (0, 0.9),
            r"test: 0\.9 selects none of 4 products\. 0 products have two images, .* need\. Add a sec",
        ),
        (
            [_row(f"{n}", f"{n // 2}", role="query") for n in range(8)],
            (0.5, 0),
            r"holds out every product .* --resplit",
        ),
        (_rows([2]), (0, 0.999999), "leave no product to train on"),
    ],
)
def test_share_that_selects_nothing_is_unmet(rows: list[Row], shares: tuple[float, float], message: str) -> None:
    (unmet,) = _divide(rows, *shares).unmet
    assert re.search(message, unmet), unmet


def test_impossible_shares_are_rejected() -> None:
    with pytest.raises(UserError, match="together less than 1"):
        Shares(0.5, 0.5)
    with pytest.raises(UserError, match=r"resplit: it divides all products by the shares\. Give --validation"):
        Shares(resplit=True)


def _grow(rows: list[Row], rng: random.Random, step: int) -> list[Row]:
    """Return the next version of a catalogue: products and images are added, images replaced, rows shuffled.

    An image of several products is not replaced: in one of them alone, it would have moved to that product.
    """
    copies = Counter(row["sha256"] for row in rows)
    rows = [
        {**row, "sha256": f"{row['sha256']}-{step}"} if copies[row["sha256"]] == 1 and rng.random() < 0.05 else row
        for row in rows
    ]
    products = sorted({row["product"] for row in rows})
    new = [f"p{step}-{number}" for number in range(rng.randrange(6))]
    own = {product: next(row["own"] for row in rows if row["product"] == product) for product in products}
    own |= {product: rng.choice(["", "", "", "train", "validation", "test"]) for product in new}
    marks = rng.random() < 0.5
    for number in range(rng.randrange(12)):
        product = rng.choice([*new, *products, "p"])
        shared = rng.choice(rows)["sha256"] if rows and rng.random() < 0.1 else ""
        role = rng.choice(ROLES) if marks else "train"
        row = _row(f"{product}/{step}-{number}", product, shared, own.get(product, ""), role)
        rows = [*rows, {**row, "own": own.get(product, "")}]
    rng.shuffle(rows)
    return rows


@settings(max_examples=150, deadline=None)
@given(
    rng=st.randoms(use_true_random=False),
    validation=st.sampled_from([0.0, 0.1, 0.4]),
    test=st.sampled_from([0.0, 0.1, 0.4]),
    seed=st.integers(0, 3),
    resplit=st.booleans(),
)
def test_growing_catalogue_never_scores_what_was_trained_on(
    rng: random.Random, validation: float, test: float, seed: int, resplit: bool
) -> None:
    rows, resplit = _grow([], rng, 0), resplit and validation + test > 0
    trained: dict[str, set[str]] = {"product": set(), "sha256": set()}
    for step in range(1, 6):
        rows = _grow(rows, rng, step)
        if not rows:
            continue
        own = {row["sha256"] for row in rows if row["own"] in ("validation", "test") and not resplit}
        division = _divide(rows, validation, test, seed, resplit)
        assert find_leaks(Catalog(division.table, Path()), allow=True) == {}
        for row in division.table.to_pylist():
            for column, seen in trained.items():
                if row["split"] == "train":
                    seen.add(row[column])
                elif column == "product" or row["sha256"] not in own:  # else the data set itself scores the image
                    assert row[column] not in seen, (step, row)


def test_zero_images_of_training_are_scored_by_random_own_splits() -> None:
    """Own splits may share products, which is reported; images are never shared."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = [
            _row(f"{n}", f"p{rng.integers(8)}", f"s{rng.integers(40)}", *rng.choice(["train", "validation", "test"], 1))
            for n in range(40)
        ]
        leaks = find_leaks(Catalog(_divide(rows).table, Path()), allow=True)
        assert all("images" not in leak for leak in leaks.values())
