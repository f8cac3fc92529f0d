from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.catalogs import write_catalog
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.cli import main, run
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog, load_catalog
from vpr.retrieval.config import CatalogCheckConfig
from vpr.retrieval.embeddings import l2_normalize, write_embeddings

PRODUCTS, IMAGES = 12, 6
HOSTILE = "<script>alert(1)</script>\"&'{{7*7}}"
WRONG, UNREADABLE = 8, 20  # rows: a wrong label, a file that is gone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catalogue of clusters of which the last three products are tested, and its embeddings."""
    folder = tmp_path_factory.mktemp("check")
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(PRODUCTS), IMAGES)
    rows = []
    for row, product in enumerate(truth.tolist()):
        name = f"{row}.png"
        Image.new("RGB", (8, 8), (20 * product, 0, 0)).save(folder / name)
        is_test = product >= PRODUCTS - 3
        role = ("gallery" if row % 2 else "query") if is_test else "train"
        label = HOSTILE if product == 0 else f"p{product}"
        label = "p3" if row == WRONG else "p10" if row == 70 else label
        rows.append({"image": name, "product": label, "role": role, "split": "test" if is_test else "train"})
    rows = [{**row, "category": "", "source": "csv", "sha256": str(n)} for n, row in enumerate(rows)]
    catalog = load_catalog(write_catalog(folder / "catalog", Catalog(pa.Table.from_pylist(rows, SCHEMA), folder)))
    (folder / f"{UNREADABLE}.png").unlink()
    vectors = rng.standard_normal((PRODUCTS, 32))[truth] + 0.5 * rng.standard_normal((len(truth), 32))
    vectors[WRONG] = vectors[truth == 1].mean(axis=0)  # typical of product 1, so the suggestion is to move it
    vectors[30] = vectors[WRONG] + 0.001  # nearly the same image, of product 5
    with write_artifact(folder / "model", "teacher", {}) as draft:
        (draft.path / "x").write_text("x")
    model = load_artifact(folder / "model")
    config = {"catalog": str(folder / "catalog")}
    write_embeddings(str(folder / "e"), l2_normalize(vectors.astype(np.float32)), catalog, model, config)
    return folder


def check(folder: Path, output: Path, *words: str) -> list[dict[str, str]]:
    """Return the rows of ``findings.csv``."""
    run(["catalog", "check", "--embeddings", str(folder / "e"), "--output", str(output), *words])
    with (output / "findings.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_findings_are_listed_with_decisions(folder: Path, tmp_path: Path) -> None:
    rows = check(folder, tmp_path / "found")
    columns = ["kind", "image", "product", "split", "other_image", "other_product", "score", "decision"]
    assert list(rows[0]) == columns
    wrong = {row["image"]: row for row in rows if row["kind"] == "wrong-label"}
    assert wrong[f"{WRONG}.png"]["product"] == "p3"
    assert wrong[f"{WRONG}.png"]["other_product"] == "p1"
    assert wrong[f"{WRONG}.png"]["decision"] == "move p1"
    assert wrong["70.png"]["decision"] == "keep"  # a test image: the model must not choose what it is scored on
    duplicate = next(row for row in rows if row["kind"] == "duplicate")
    assert {duplicate["image"], duplicate["other_image"]} == {f"{WRONG}.png", "30.png"}
    card = load_artifact(tmp_path / "found", "report").card
    assert card.metrics["findings"]["wrong-label"] == len(wrong)
    assert card.metrics["suggested_changes"] == sum(row["decision"] != "keep" for row in rows)
    assert [parent.role for parent in card.parents] == ["embeddings", "catalog"]


def test_decisions_of_an_image_agree_and_can_be_applied(folder: Path, tmp_path: Path) -> None:
    rows = check(folder, tmp_path / "found", "--outlier", "0.5")
    decisions: dict[str, set[str]] = {}
    for row in rows:
        decisions.setdefault(row["image"], set()).add(row["decision"])
    for values in decisions.values():
        assert len({value for value in values if value != "keep" and not value.startswith("merge")}) <= 1
    words = ["--apply", str(tmp_path / "found" / "findings.csv"), "--output", str(tmp_path / "cleaned")]
    run(["catalog", "check", "--embeddings", str(folder / "e"), *words])
    cleaned = load_catalog(tmp_path / "cleaned")
    products = dict(zip(cleaned.table["image"].to_pylist(), cleaned.products.tolist(), strict=True))
    assert products[f"{WRONG}.png"] == "p1"
    assert cleaned.path(0).is_file()
    assert len(cleaned.select(split="test")) == 3 * IMAGES
    again = ["--embeddings", str(folder / "e"), "--catalog", str(tmp_path / "cleaned"), "--output", str(tmp_path / "o")]
    with pytest.raises(UserError, match="^embeddings: .*is of another catalogue than .*cleaned"):
        run(["catalog", "check", *again])


def test_page_needs_no_network_and_runs_no_script(folder: Path, tmp_path: Path) -> None:
    check(folder, tmp_path / "found", "--confusable", "0", "--outlier", "1")
    page = (tmp_path / "found" / "findings.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "{{7*7}}" in page
    assert "&lt;script&gt;" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert all(uri.startswith("data:image/webp;base64,") for uri in re.findall(r'src="([^"]*)"', page))
    assert not re.search(r'(href|src)="(?!#|data:)', page)
    assert "not readable" in page


def test_page_shows_the_first_findings_only(folder: Path, tmp_path: Path) -> None:
    check(folder, tmp_path / "found", "--outlier", "1", "--shown", "1")
    page = (tmp_path / "found" / "findings.html").read_text(encoding="utf-8")
    assert "The first 1 are shown." in page
    assert page.count("<article>") <= 5


def test_unchanged_check_is_up_to_date(folder: Path, tmp_path: Path) -> None:
    check(folder, tmp_path / "found")
    before = load_artifact(tmp_path / "found").sha256
    check(folder, tmp_path / "found", "--catalog", str(folder / "catalog"))
    assert load_artifact(tmp_path / "found").sha256 == before


def test_findings_do_not_replace_a_report_of_another_command(folder: Path, tmp_path: Path) -> None:
    with write_artifact(tmp_path / "report", "report", {}) as draft:
        (draft.path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="a report of another command"):
        check(folder, tmp_path / "report")


def test_missing_catalogue_is_reported(folder: Path, tmp_path: Path) -> None:
    catalog, model = load_catalog(folder / "catalog"), load_artifact(folder / "model")
    vectors = np.eye(len(catalog), dtype=np.float32)
    for config, expected in (({}, "does not record its catalogue"), ({"catalog": "absent"}, "recorded in the")):
        write_embeddings(str(tmp_path / "e"), vectors, catalog, model, config)
        with pytest.raises(UserError, match=f"^catalog: .*{expected}"):
            check(tmp_path, tmp_path / "o")


def test_rows_of_another_split_are_rejected(folder: Path, tmp_path: Path) -> None:
    catalog, model = load_catalog(folder / "catalog"), load_artifact(folder / "model")
    config = {"catalog": str(folder / "catalog"), "split": "test"}
    write_embeddings(str(tmp_path / "e"), np.eye(len(catalog), dtype=np.float32), catalog, model, config)
    with pytest.raises(UserError, match="^embeddings: the rows of .* differ from those of its catalogue"):
        check(tmp_path, tmp_path / "o")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"outlier": 2.0}, "outlier: expected -1 to 1, got 2.0"),
        ({"duplicate": float("nan")}, "duplicate: expected -1 to 1, got nan"),
        ({"merge": 0.1}, "confusable: expected at most the value of merge, 0.1, got 0.2"),
        ({"shown": -1}, "shown: expected 0 to 10000, got -1"),
    ],
)
def test_thresholds_out_of_range_are_rejected(values: dict[str, float], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        CatalogCheckConfig("e", "o", **values)


def test_bad_input_exits_with_2_and_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decisions = tmp_path / "decisions.csv"
    decisions.write_text("image,decision\n0.png,burn\n", encoding="utf-8")
    words = ["--embeddings", str(folder / "e"), "--apply", str(decisions), "--output", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as error:
        main(["catalog", "check", *words])
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_catalog_keeps_working_next_to_catalog_check(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["catalog", "--help"])
    assert "See also: vpr catalog check, vpr catalog relocate." in capsys.readouterr().out
    run(["catalog", "--reader", "images", "--root", str(folder), "--output", str(tmp_path / "images")])
    assert len(load_catalog(tmp_path / "images")) == PRODUCTS * IMAGES - 1
