from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.recall.queries import choose_queries
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig


@pytest.fixture
def challenge(tmp_path: Path, texture_folder: Path) -> Path:
    """Hidden test set: a gallery of three images, and two queries with boxes."""
    for name, images in (("gallery", (0, 1, 2)), ("queries", (3, 4))):
        (tmp_path / name).mkdir()
        lines = ["img_path,bbox_x,bbox_y,bbox_w,bbox_h" if name == "queries" else "seller_img_id,img_path"]
        for number in images:
            shutil.copyfile(texture_folder / "product-00" / f"{number}.jpg", tmp_path / name / f"{number}.jpg")
            image = f"{name}/{number}.jpg"
            lines.append(f"{image},1,2,30,40" if name == "queries" else f"{number},{image}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_hidden_test_set_is_read_in_order_and_not_scored(challenge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = load_catalog(build_catalog(CatalogConfig("aicrowd", str(challenge / "c"), str(challenge))))
    assert "hidden test set, to embed and submit" in capsys.readouterr().err
    assert catalog.select(role="query").table["image"].to_pylist() == ["queries/3.jpg", "queries/4.jpg"]
    assert len(set(catalog.products.tolist())) == len(catalog) == 5
    with pytest.raises(UserError, match=r"split: 5 images have no product.*Embed them, and use `vpr search`"):
        choose_queries(catalog)


def test_hidden_test_set_keeps_repeated_images(challenge: Path) -> None:
    """A submission has a row for each query and an index for each gallery image, as the tables list them."""
    shutil.copyfile(challenge / "gallery/0.jpg", challenge / "queries/3.jpg")
    with (challenge / "gallery.csv").open("a") as stream:
        stream.write("3,gallery/1.jpg\n")
    table = (challenge / "queries.csv").read_text().splitlines()
    (challenge / "queries.csv").write_text("\n".join([*table, table[1]]).replace("1,2,30,40", ",,,") + "\n")
    catalog = load_catalog(build_catalog(CatalogConfig("aicrowd", str(challenge / "c"), str(challenge))))
    queries = [f"queries/{number}.jpg" for number in (3, 4, 3)]
    assert catalog.select(role="query").table["image"].to_pylist() == queries
    assert catalog.select(role="gallery").table["image"].to_pylist()[1:] == [f"gallery/{n}.jpg" for n in (1, 2, 1)]


def test_one_table_without_products_is_an_error(challenge: Path) -> None:
    (challenge / "gallery.csv").write_text("img_path,product_id\ngallery/0.jpg,7\n")
    with pytest.raises(UserError, match="product_id"):
        build_catalog(CatalogConfig("aicrowd", str(challenge / "c"), str(challenge)))
