from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.cli import main
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog
from vpr.retrieval.config import RerankConfig, ScoreName, SearchConfig, ThresholdConfig
from vpr.retrieval.cut import cut_vectors
from vpr.retrieval.embeddings import l2_normalize, load_embeddings, write_embeddings
from vpr.retrieval.search_command import search_gallery
from vpr.retrieval.threshold_command import _log, find_threshold

PRODUCTS, QUERIES, DIM, LIMIT = 100, 3, 16, 0.1


def draw_vectors(noise: float = 0.12, seed: int = 0) -> NDArray[np.float32]:
    """Return three query and two gallery vectors of each product, product after product."""
    centres = np.random.default_rng(seed).normal(size=(PRODUCTS, 1, DIM))
    offsets = np.random.default_rng(seed + 1).normal(size=(PRODUCTS, QUERIES + 2, DIM))
    return l2_normalize((centres + noise * 2 * offsets).reshape(-1, DIM).astype(np.float32))


def write(
    folder: Path,
    vectors: NDArray[np.float32],
    model: str = "model",
    split: str = "validation",
    is_doubled: bool = False,
) -> str:
    """Write an embeddings artifact with its model; doubled images are queries and gallery images."""
    roles = ["query"] * QUERIES + ["gallery"] * 2
    rows = [
        {"image": f"{row}.jpg", "product": f"p{row // len(roles)}", "role": roles[row % len(roles)], "split": split}
        for row in range(len(vectors))
    ]
    if is_doubled:
        rows = [{**row, "role": role} for row in rows for role in ("gallery", "query")]
        vectors = np.repeat(vectors, 2, axis=0)
    if not (folder / f"{model}-weights").exists():
        with write_artifact(folder / f"{model}-weights", "teacher", {"name": model}) as draft:
            (draft.path / "x").write_text(model)
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), folder)
    write_embeddings(str(folder / model), vectors, catalog, load_artifact(folder / f"{model}-weights"), {})
    return str(folder / model)


def settings(embeddings: str, folder: Path, **values: object) -> ThresholdConfig:
    return ThresholdConfig(embeddings, str(folder / "threshold"), **{"max_false_accept": LIMIT, **values})  # type: ignore[arg-type]


def read(path: Path) -> tuple[dict, dict[str, tuple[str, str]]]:
    """Return the stored result, and the gallery and the use of each product."""
    artifact = load_artifact(path, "threshold")
    with artifact.file("products.csv").open(newline="", encoding="utf-8") as stream:
        draws = {row["product"]: (row["gallery"], row["use"]) for row in csv.DictReader(stream)}
    return json.loads(artifact.file("threshold.json").read_text(encoding="utf-8")), draws


@pytest.mark.parametrize("score", ["similarity", "margin", "probability"])
def test_stored_rates_are_those_of_a_search_without_the_absent(score: ScoreName, tmp_path: Path) -> None:
    """The rates are counted again with a matrix product and a loop."""
    path = write(tmp_path, draw_vectors())
    result, draws = read(find_threshold(settings(path, tmp_path, score=score)))
    assert Counter(draws.values()) == {
        ("present", "confirm"): 40, ("absent", "confirm"): 40, ("present", "fit"): 10, ("absent", "fit"): 10,
    }  # fmt: skip
    data = load_embeddings(path)
    gallery = [
        row
        for row in range(len(data.roles))
        if data.roles[row] == "gallery" and draws[data.products[row]][0] == "present"
    ]
    assert (result["gallery_images"], result["gallery_products"]) == (100, 50)
    errors: dict[str, list[float]] = {"present": [], "absent": []}
    weights = result["probability"]
    for product, (part, use) in draws.items():
        if use == "fit":
            continue
        answered = []
        for row in np.flatnonzero((data.products == product) & (data.roles == "query")):
            cosines = {r: float(data.vectors[row] @ data.vectors[r]) for r in gallery}
            best = max(cosines, key=lambda r: cosines[r])
            second = max(value for r, value in cosines.items() if data.products[r] != data.products[best])
            margin = cosines[best] - second
            logit = weights["intercept"] + weights["similarity"] * cosines[best] + weights["margin"] * margin
            value = {"similarity": cosines[best], "margin": margin, "probability": 1 / (1 + np.exp(-logit))}[score]
            answered.append(value >= result["threshold"])
        errors[part].append(float(np.mean(answered)))
    row = next(row for row in result["scores"] if row["score"] == score)
    assert row["false_accept"] == pytest.approx(np.mean(errors["absent"]), abs=0.01)  # ties of float32 sums
    assert row["false_reject"] == pytest.approx(1 - np.mean(errors["present"]), abs=0.01)
    assert row["false_accept"] <= LIMIT
    assert row["false_reject"] < 0.9
    assert result["statement"].startswith("confirmed: false accepts at most 0.1 with 95 % confidence (40 absent")


def test_no_image_finds_itself(tmp_path: Path) -> None:
    """The rates are counted again with a matrix product in which an image has no similarity to itself."""
    vectors = draw_vectors(0.3)
    path = write(tmp_path, vectors, is_doubled=True)
    output = find_threshold(settings(path, tmp_path, score="similarity", compare=(path,)))
    result, draws = read(output)
    names = np.array([f"p{row // (QUERIES + 2)}" for row in range(len(vectors))])
    present = np.array([draws[name][0] == "present" for name in names])
    confirms = np.array([draws[name][1] == "confirm" for name in names])
    cosines = vectors.astype(np.float64) @ vectors.T
    np.fill_diagonal(cosines, -2)
    answered = cosines[:, present].max(axis=1) >= result["threshold"]
    row = next(row for row in result["scores"] if row["score"] == "similarity")
    assert row["false_reject"] == pytest.approx(1 - answered[present & confirms].mean(), abs=0.01)
    assert 0.05 < row["false_reject"] < 0.95  # with itself in the gallery, every image is answered
    assert row["false_accept"] == pytest.approx(answered[~present & confirms].mean(), abs=0.01)
    assert (result["gallery_images"], result["gallery_products"]) == (250, 50)
    assert result["compare"][0]["moved"] == 0
    assert load_artifact(output).card.config["queries_search"] == "leave-one-out"


def test_search_answers_no_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Queries of products that no gallery has are rejected, and most of the others are answered as before."""
    path = write(tmp_path, draw_vectors(0.05))
    threshold = str(find_threshold(settings(path, tmp_path)))
    plain, limited = tmp_path / "plain.csv", tmp_path / "limited.csv"
    _, draws = read(Path(threshold))
    data = load_embeddings(path)
    present = np.array([draws[product][0] == "present" for product in data.products])
    rows = np.flatnonzero((data.roles == "query") | present)
    rows = rows[np.argsort(present[rows], kind="stable")]  # the first queries are printed
    catalog = Catalog(
        pa.Table.from_pylist(
            [{"image": data.images[r], "product": data.products[r], "role": data.roles[r]} for r in rows], schema=SCHEMA
        ),
        tmp_path,
    )
    model = load_artifact(tmp_path / "model-weights")
    shop = write_embeddings(str(tmp_path / "shop"), data.vectors[rows], catalog, model, {})
    for output, used in ((plain, ""), (limited, threshold)):
        search_gallery(SearchConfig(str(shop), str(shop), str(output), k=2, threshold=used))
    assert "no match (best 0." in capsys.readouterr().out
    with plain.open(newline="") as before, limited.open(newline="") as after:
        all_results = {(row["query"], row["rank"]): row for row in csv.DictReader(before)}
        results = list(csv.DictReader(after))
    product_of = dict(zip(data.images.tolist(), data.products.tolist(), strict=True))
    counts: Counter[tuple[str, bool]] = Counter()
    for row in results:
        probability = float(row.pop("probability"))
        assert 0 <= probability <= 1
        counts[draws[product_of[row["query"]]][0], row["rank"] == "0"] += 1
        if row["rank"] == "0":
            assert (row["image"], row["product"]) == ("", "")
            assert row["score"] == all_results[row["query"], "1"]["score"]
        else:
            assert row == all_results[row["query"], row["rank"]]
    assert len({row["query"] for row in results}) == PRODUCTS * QUERIES
    assert counts["absent", True] > 9 * counts["absent", False]
    assert counts["present", False] > counts["present", True]


def test_other_models_are_compared_at_the_same_draw(tmp_path: Path) -> None:
    vectors = draw_vectors(0.3)
    path = write(tmp_path, vectors)
    same = write(tmp_path, vectors, "same")
    rounded = write(tmp_path, l2_normalize(np.round(vectors * 12) / 12), "rounded")
    result, _ = read(find_threshold(settings(path, tmp_path, compare=(same, rounded), score="similarity")))
    first, second = result["compare"]
    chosen = result["scores"][0]
    assert (first["model"], first["moved"]) == ("same-weights", 0.0)
    assert first["kept"]["false_accept"] == chosen["false_accept"]
    assert 0 < abs(second["moved"]) < 0.1
    assert second["threshold"] == pytest.approx(result["threshold"] + second["moved"])
    assert second["kept"]["false_reject"] != chosen["false_reject"]
    other = write(tmp_path, vectors[:-5], "other")
    with pytest.raises(UserError, match="compare: .*other has other images"):
        find_threshold(settings(path, tmp_path, compare=(other,)))


def test_too_few_products_are_an_honest_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 1 and keeps the curves; a search does not use the artifact."""
    path, output = write(tmp_path, draw_vectors()), tmp_path / "threshold"
    for _ in range(2):  # also if it is up to date
        with pytest.raises(SystemExit) as ended:
            main(["gallery", "threshold", "--embeddings", path, "--output", str(output)])
        assert ended.value.code == 1
        expected = "no threshold confirmable: 40 absent products can confirm false accepts of 0.0722 at best"
        assert expected in capsys.readouterr().err
    result, _ = read(output)
    assert (result["threshold"], result["needed_products"]) == (None, 299)
    with (output / "curves.csv").open(newline="") as stream:
        curves = list(csv.DictReader(stream))
    for score in ("similarity", "margin", "probability"):
        rows = [[float(row[key]) for key in row if key != "score"] for row in curves if row["score"] == score]
        assert len(rows) > 50
        assert (np.diff(rows, axis=0)[:, 0] > 0).all()
        assert (np.diff(rows, axis=0)[:, 1] <= 1e-9).all()
        assert (np.diff(rows, axis=0)[:, 2] >= -1e-9).all()
    with pytest.raises(UserError, match="threshold: .*no threshold confirmable: 40 absent"):
        search_gallery(SearchConfig(path, path, threshold=str(output)))


def test_threshold_of_another_model_or_a_broken_one_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, draw_vectors())
    other = write(tmp_path, draw_vectors(), "other")
    threshold = str(find_threshold(settings(path, tmp_path)))
    with pytest.raises(UserError, match="threshold: .*is of model 'model-weights', the embeddings are of 'other-"):
        search_gallery(SearchConfig(other, other, threshold=threshold))
    with pytest.raises(UserError, match="expected an artifact of kind threshold, got embeddings"):
        search_gallery(SearchConfig(path, path, threshold=path))
    parents = load_artifact(threshold).card.parents
    good = json.loads((Path(threshold) / "threshold.json").read_text())
    for number, broken in enumerate(({"score": "x"}, {"threshold": "x"}, {"probability": {}}, {"threshold": np.inf})):
        with write_artifact(tmp_path / f"broken{number}", "threshold", {}, parents) as draft:
            (draft.path / "threshold.json").write_text(json.dumps({**good, **broken}))
        with pytest.raises(UserError, match=f"broken{number}: not a usable threshold"):
            search_gallery(SearchConfig(path, path, threshold=str(tmp_path / f"broken{number}")))


def test_larger_gallery_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, draw_vectors())
    threshold = str(find_threshold(settings(path, tmp_path, absent=0.55)))
    with caplog.at_level("WARNING", logger="vpr"):
        search_gallery(SearchConfig(path, path, threshold=threshold))
    assert "confirmed in a gallery of 45 products, this one has 100" in caplog.text


def test_bad_input_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, draw_vectors(), split="test")
    with pytest.raises(UserError, match="split: .* has no queries in split 'validation', but in: test"):
        find_threshold(settings(path, tmp_path))
    assert not (tmp_path / "threshold").exists()
    for values in ({"max_false_accept": 0.0}, {"confidence": 1.0}, {"absent": float("nan")}, {"fit": -1.0}):
        with pytest.raises(UserError, match=f"^{next(iter(values))}: expected a number between 0 and 1"):
            settings(path, tmp_path, **values)
    with pytest.raises(UserError, match="threshold: re-ranking"):
        SearchConfig(path, path, threshold="t", rerank=RerankConfig(centre=True))
    with pytest.raises(UserError, match="threshold: a submission"):
        SearchConfig(path, path, threshold="t", submission=str(tmp_path / "s.npy"))


def test_unchanged_inputs_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, draw_vectors())
    config = settings(path, tmp_path)
    before = load_artifact(find_threshold(config)).sha256
    monkeypatch.setattr("vpr.retrieval.threshold_command._measure", None)
    assert load_artifact(find_threshold(config)).sha256 == before


def test_threshold_of_another_cut_is_rejected(tmp_path: Path) -> None:
    vectors = draw_vectors()
    threshold = str(find_threshold(settings(write(tmp_path, vectors), tmp_path)))
    cut = write(tmp_path, cut_vectors(vectors, 8))
    with pytest.raises(UserError, match=f"threshold: .* is of {DIM} dimensions, the embeddings have 8"):
        search_gallery(SearchConfig(cut, cut, threshold=threshold))


@pytest.mark.parametrize("threshold", [0.9, None])
def test_threshold_that_rejects_every_match_is_warned_about(
    threshold: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    rates = {"false_accept": 0.0, "false_reject": 1.0, "wrong": 0.0} if threshold else {"false_reject": None}
    row = {"score": "margin", "threshold": threshold, **rates}
    with caplog.at_level("INFO", logger="vpr"):
        result = {"gallery_images": 9, "gallery_products": 3, "scores": [row], "compare": []}
        _log(result, ThresholdConfig("e", "t", score="margin"))
    assert ("rejects every query that has a match. Train further" in caplog.text) == (threshold is not None)
    assert ("false rejects  wrong" in caplog.text) == (threshold is not None)  # no header of an empty table
