"""Plans of a shop that two models see as noisy linear images of the same latent vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.vpr.gallery.shop import DIM, Vectors, unit_vectors, write_plan, write_shop
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.gallery.change import create_gallery
from vpr.gallery.config import CreateConfig, PlanConfig
from vpr.gallery.plan import ADAPTERS, FILE, load_plan, plan_migration
from vpr.gallery.plan_measure import Fit, SplitVectors, choose_order, fit_adapter, measure, read_split
from vpr.retrieval.adapter import Adapter
from vpr.retrieval.embeddings import load_embeddings

pytest.importorskip("lancedb")

PRODUCTS, VIEWS, NEW = 60, 4, 12
ROLES = ("query", "query", "gallery", "gallery")
IDS = [(f"p{row // VIEWS}", f"{row}.jpg") for row in range(PRODUCTS * VIEWS)]
SPLITS = [("train", "validation", "test")[row // VIEWS % 3] for row in range(len(IDS))]


def scaled(vectors: np.ndarray) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def see(noise: float = 0.3) -> tuple[Vectors, Vectors]:
    """Return the old and the new vectors; the new model sees two latent dimensions that the old one does not."""
    rng = np.random.default_rng(0)
    latent = np.repeat(rng.standard_normal((PRODUCTS, DIM + 2)), VIEWS, axis=0)
    latent += noise * rng.standard_normal(latent.shape)
    turn = np.linalg.qr(rng.standard_normal((NEW, NEW)))[0][: DIM + 2]
    return scaled(latent[:, :DIM]), scaled(latent @ turn)


def write(folder: Path, vectors: Vectors, model: str, name: str = "", **values: Any) -> str:
    values = {"roles": list(ROLES) * PRODUCTS, "splits": SPLITS, "ids": IDS, **values}
    return write_shop(folder / (name or f"by-{model}"), values.pop("ids"), vectors, model, **values)


@pytest.fixture
def config(tmp_path: Path) -> PlanConfig:
    old, new = see()
    embeddings = write(tmp_path, old, "old")
    gallery = create_gallery(CreateConfig(embeddings, str(tmp_path / "gallery")))
    return PlanConfig(str(gallery), embeddings, write(tmp_path, new, "new"), str(tmp_path / "plan"))


def read(path: Path | str) -> dict[str, Any]:
    return json.loads(Path(path, FILE).read_text())


def recall(queries: Vectors, gallery: Vectors) -> float:
    """Return recall@1 of the test split, counted with a loop in float64; gallery vectors are those of all rows."""
    is_test = np.array(SPLITS) == "test"
    roles = np.array(list(ROLES) * PRODUCTS)
    searched = np.flatnonzero(is_test & (roles == "gallery"))
    hits = []
    for row in np.flatnonzero(is_test & (roles == "query")):
        best = searched[np.argmax(gallery[searched].astype(np.float64) @ queries[row].astype(np.float64))]
        hits.append(IDS[best][0] == IDS[row][0])
    return float(np.mean(hits))


def test_curve_is_that_of_a_search(config: PlanConfig) -> None:
    result, (old, new) = read(plan_migration(config)), see()
    plan = load_plan(config.output)
    curve = result["curve"]
    assert [step["share"] for step in curve] == [step / 10 for step in range(11)]
    assert result["old_recall"]["recall"] == recall(old, old)
    assert result["new_recall"]["recall"] == recall(new, new) == curve[-1]["recall"]
    assert curve[0]["recall"] == curve[0]["random"] == recall(new, plan.adapter.apply(old)) > 0.5
    assert curve[0]["ratio"] == pytest.approx(recall(new, plan.adapter.apply(old)) / recall(new, new))
    assert curve[-1]["ratio"] == 1
    assert curve[-1]["ratio_interval"] == [1, 1]
    for step in curve:
        low, high = step["interval"]
        assert low <= step["recall"] <= high
    gains = {name: row["gain"] for name, row in result["orders"].items()}
    assert gains.pop("random") is None
    helping = [name for name, gain in gains.items() if gain[0] > 0]
    assert result["order"] in (helping or ["random"])
    assert {row["method"] for row in result["adapters"]} == {"procrustes", "linear"}
    assert [row["is_chosen"] for row in result["adapters"]].count(True) == 1
    best = max(result["adapters"], key=lambda row: (row["recall"], row["map"]))
    assert (best["method"], best["is_chosen"]) == (result["adapter"], True)


def test_rotated_vectors_lose_nothing(config: PlanConfig, tmp_path: Path) -> None:
    old = see()[0]
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((DIM, DIM)))[0]
    embeddings = load_embeddings(config.old), load_embeddings(write(tmp_path, scaled(old @ turn), "turned"))
    train, validation, test = (read_split(*embeddings, split) for split in ("train", "validation", "test"))
    fit = replace(fit_adapter(train, validation), method="procrustes")
    np.testing.assert_allclose(fit.procrustes.weight, turn, atol=1e-4)
    assert choose_order(validation, fit, 0)[0] == "random"  # the simple one, where none helps
    assert {step.ratio for step in measure(test, fit, "error", 0)} == {1.0}


def test_order_that_helps_is_used() -> None:
    """A query finds its product if one of two images is embedded again, and else that of a neighbour."""
    count = 40
    own = np.eye(count, count + 1, dtype=np.float32)
    wrong = (0.6 * np.roll(own, 1, axis=0)).astype(np.float32)
    wrong[:, -1] = 0.8
    adapter = Adapter(np.eye(count + 1, dtype=np.float32), np.zeros(count + 1, np.float32))
    products, images = np.array([f"p{row}" for row in range(count)]), np.array([f"{row}" for row in range(2 * count)])
    gallery = [np.repeat(values, 2, axis=0) for values in (wrong, own)]
    part = SplitVectors(wrong, own, products, *gallery, np.repeat(products, 2), images, None)
    order, results = choose_order(part, Fit(adapter, adapter, "linear", []), 0)
    assert order == "spread"
    assert results["spread"]["recall"] == pytest.approx(np.mean([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]))
    expected = np.mean([1 - (1 - share) ** 2 for share in np.arange(0.1, 1, 0.1)])
    assert results["random"]["recall"] == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_scored_images_do_not_fit(split: str, config: PlanConfig, tmp_path: Path) -> None:
    """Other vectors of a split change what is chosen or scored, and no adapter that is fitted with equal settings."""
    plan_migration(config)
    is_other = np.array(SPLITS) == split
    old, new = see()
    shop = tmp_path / "other"
    shop.mkdir()
    old[is_other], new[is_other] = unit_vectors(is_other.sum(), DIM, 5), unit_vectors(is_other.sum(), NEW, 6)
    embeddings = write(shop, old, "old")
    gallery = create_gallery(CreateConfig(embeddings, str(shop / "gallery")))
    plan_migration(PlanConfig(str(gallery), embeddings, write(shop, new, "new"), str(shop / "plan")))
    first, second = (load_file(folder / "plan" / ADAPTERS) for folder in (tmp_path, shop))
    np.testing.assert_array_equal(first["procrustes.weight"], second["procrustes.weight"])
    results = [read(folder / "plan") for folder in (tmp_path, shop)]
    keys = ("adapter", "adapters", "order", "orders")
    same_choice = [results[0][key] for key in keys] == [results[1][key] for key in keys]
    assert same_choice == (split == "test")
    assert results[0]["curve"] != results[1]["curve"]
    if split == "test":
        np.testing.assert_array_equal(first["linear.weight"], second["linear.weight"])


def test_plan_is_up_to_date(config: PlanConfig) -> None:
    before = load_artifact(plan_migration(config)).sha256
    assert load_artifact(plan_migration(config)).sha256 == before
    assert load_artifact(plan_migration(replace(config, seed=1))).sha256 != before


def test_bad_input(config: PlanConfig, tmp_path: Path) -> None:
    old, new = see()
    fewer = write(tmp_path, new[:-1], "new", "fewer", ids=IDS[:-1], roles=(ROLES * PRODUCTS)[:-1], splits=SPLITS[:-1])
    no_test = [split if split != "test" else "train" for split in SPLITS]
    mixed = ["train" if row == 4 else split for row, split in enumerate(SPLITS)]
    cases = [
        ({"new": config.old}, r"^new: .* is of the gallery's model 'old'. Embed with the new model"),
        ({"old": config.new}, r"^old: .*embedded with 'new', the gallery with 'old'"),
        ({"new": fewer}, r"^new: .*fewer has other images than .*by-old. Embed one catalogue"),
        ({"output": config.old}, r"the output is also the input 'old'"),
        ({"gallery": config.old}, r"expected an artifact of kind gallery"),
    ]
    for name, splits in (("no-test", no_test), ("mixed", mixed)):
        pair = {
            model: write(tmp_path, vectors, model, f"{model}-{name}", splits=splits)
            for model, vectors in (("old", old), ("new", new))
        }
        message = "has no images of split 'test'" if name == "no-test" else "1 products are in two splits, first 'p1'"
        cases.append((pair, message))
    for values, message in cases:
        with pytest.raises(UserError, match=message):
            plan_migration(replace(config, **values))
        assert not Path(config.output).exists()


def test_cut_embeddings_have_another_width(config: PlanConfig, tmp_path: Path) -> None:
    cut = write(tmp_path, scaled(see()[0][:, :4]), "old", "cut")
    with pytest.raises(UserError, match=r"^old: .*4 dimensions, the gallery has 8"):
        plan_migration(replace(config, old=cut))


def test_broken_plan(tmp_path: Path) -> None:
    write_shop(tmp_path / "a", IDS[:1], unit_vectors(1), "old")
    write_shop(tmp_path / "b", IDS[:1], unit_vectors(1, 5), "new")
    models = [load_artifact(tmp_path / name) for name in ("old", "new")]
    weight = unit_vectors(DIM, 5)
    assert load_plan(write_plan(tmp_path / "good", *models, weight)).target.dim == 5
    broken = {"nan": weight * np.nan, "float64": weight.astype(np.float64)}
    for name, values in broken.items():
        with pytest.raises(UserError, match="not a usable migration"):
            load_plan(write_plan(tmp_path / name, *models, values))
    with pytest.raises(UserError, match="not a usable migration .*unknown adapter or order"):
        load_plan(write_plan(tmp_path / "order", *models, weight, order="best"))
    path = Path(write_plan(tmp_path / "wide", *models, weight))
    values = load_file(path / ADAPTERS)
    save_file({**values, "other": np.zeros((1000, 1000), np.float32)}, path / ADAPTERS)
    with pytest.raises(UserError, match="changed since it was written"):
        load_plan(str(path))
