from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from teacher.config import DataConfig
from teacher.data import build_data, drop_split_overlap
from vpr.cli import main
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import SCHEMA, Catalog, load_catalog, rows_to_table
from vpr.data.config import CatalogConfig, LoaderConfig
from vpr.data.loaders import ImageDataset, training_loader
from vpr.data.splits import check_leaks

CLASSES, SHOP_PRODUCTS = 12, 8


def _write_image(path: Path, rng: np.random.Generator, mark: tuple[int, int, int, int] | None = None) -> None:
    """Write a random texture, with a red rectangle at ``mark`` (left, top, right, bottom)."""
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    image = coarse.resize((96, 72), Image.Resampling.NEAREST)
    if mark:
        image.paste((255, 0, 0), mark)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Products-10K (12 classes) and the AIcrowd development set (8 products) in their formats."""
    root, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    train, test = ["name,class,group"], ["name,class,Usage"]
    for number in range(CLASSES * 4):
        name, label = f"{number}.jpg", number % CLASSES
        folder, lines = ("train", train) if number < CLASSES * 3 else ("test", test)
        _write_image(root / "p10k" / folder / name, rng)
        lines.append(f"{name},{label},{360 + label % 2 if folder == 'train' else 'Public'}")
    gallery = ["seller_img_id,img_path,product_id"]
    queries = ["user_img_id,img_path,product_id,bbox_x,bbox_y,bbox_w,bbox_h"]
    for number in range(SHOP_PRODUCTS * 2):
        _write_image(root / "aicrowd" / "gallery" / f"{number}.jpg", rng)
        gallery.append(f"{number},gallery/{number}.jpg,{number % SHOP_PRODUCTS}")
        _write_image(root / "aicrowd" / "queries" / f"{number}.jpeg", rng, (16, 8, 64, 48))
        queries.append(f"{number},queries/{number}.jpeg,{number % SHOP_PRODUCTS},18,10,44,36")
    for path, lines in (
        ("p10k/train.csv", train),
        ("p10k/test_kaggletest.csv", test),
        ("aicrowd/gallery.csv", gallery),
        ("aicrowd/queries.csv", queries),
    ):
        (root / path).write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def sources_copy(sources: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sources, tmp_path / "sources")


def _build(root: Path, output: Path, **values: object) -> Catalog:
    paths = {"products10k": str(root / "p10k"), "aicrowd": str(root / "aicrowd")}
    config = DataConfig(output=str(output), **{**paths, "validation": 0.25, **values})
    return load_catalog(build_data(config))


def _read_duplicates(catalog: Catalog) -> list[list[str]]:
    with catalog.artifact.file("duplicates.csv").open(newline="") as stream:
        header, *lines = csv.reader(stream)
    assert header == ["image", "of", "kind"]
    return lines


def test_each_source_has_validation_products(sources: Path, tmp_path: Path) -> None:
    built = _build(sources, tmp_path / "data")
    assert len(built) == CLASSES * 4 + SHOP_PRODUCTS * 4
    assert all(built.path(row).is_file() for row in range(len(built)))
    training, validation = built.select(split="train"), built.select(split="validation")
    assert not set(training.products) & set(validation.products)
    held_out = sorted(set(validation.products))
    assert [product.split("/")[0] for product in held_out] == ["aicrowd"] * 2 + ["products10k"] * 5
    for product in held_out:
        assert set(validation.roles[validation.products == product]) == {"gallery", "query"}
    assert set(training.roles) == {"train", "gallery", "query"}
    assert set(built.categories) == {"", "360", "361"}


def test_aicrowd_queries_are_cropped_to_their_box(sources: Path, tmp_path: Path) -> None:
    from vpr.data.pixels import read_pixels
    from vpr.imaging.preprocess import Preprocess

    built = _build(sources, tmp_path / "data").select(role="query")
    rows = [row for row in range(len(built)) if built.box(row)]
    assert len(rows) == SHOP_PRODUCTS * 2
    for row in rows[:4]:
        pixels = read_pixels(built, Preprocess(size=32), range(row, row + 1))[0]
        assert pixels[0].min() > 200
        assert pixels[1:].max() < 60


@pytest.mark.parametrize("source", ["products10k", "aicrowd"])
def test_one_source_is_enough(source: str, sources: Path, tmp_path: Path) -> None:
    built = _build(sources, tmp_path / "data", **{"products10k" if source == "aicrowd" else "aicrowd": ""})
    assert set(built.table["source"].to_pylist()) == {source}
    assert built.summary()["products"]["validation"] == (5 if source == "products10k" else 2)


def test_image_of_two_splits_is_set_aside(sources_copy: Path, tmp_path: Path) -> None:
    first = _build(sources_copy, tmp_path / "data")
    scored = first.select(split="validation", role="gallery")
    trained = first.select(split="train")
    row = int(np.flatnonzero(np.char.startswith(trained.products, "products10k/"))[0])
    other = int(np.flatnonzero(np.char.startswith(scored.products, "products10k/"))[0])
    copied, original = trained.path(row), scored.path(other)
    shutil.copyfile(original, copied)
    second = _build(sources_copy, tmp_path / "again")
    check_leaks(second.select(split="train"), second.select(split="validation"))
    assert len(second) == len(first) - 2
    names = {path.relative_to(sources_copy).as_posix() for path in (copied, original)}
    with second.artifact.file("set_aside.csv").open(newline="") as stream:
        listed = dict(list(csv.reader(stream))[1:])
    assert set(listed) == names
    assert {reason.partition(":")[0] for reason in listed.values()} == {"under 2 products"}


def test_image_that_a_table_tests_is_dropped_from_training(sources_copy: Path, tmp_path: Path) -> None:
    first = _build(sources_copy, tmp_path / "data")
    trained = first.select(split="train")
    original = trained.path(int(np.flatnonzero(np.char.startswith(trained.products, "products10k/"))[0]))
    extra = sources_copy / "extra"
    extra.mkdir()
    shutil.copyfile(original, extra / "a.jpg")
    _write_image(extra / "b.png", np.random.default_rng(1))
    (extra / "t.csv").write_text("image,product,split,role\na.jpg,lamp,test,query\nb.png,lamp,test,gallery\n")
    second = _build(sources_copy, tmp_path / "again", csv=(str(extra / "t.csv"),))
    assert second.select(split="test").table["image"].to_pylist() == ["extra/a.jpg", "extra/b.png"]
    dropped = [original.relative_to(sources_copy).as_posix(), "extra/a.jpg", "dropped"]
    assert dropped in _read_duplicates(second)
    assert len(second) == len(first) + 1
    assert second.artifact.card.metrics["dropped"] == second.artifact.card.metrics["same_bytes"] == 1


def test_image_that_two_sources_would_split_is_dropped_from_both(sources_copy: Path, tmp_path: Path) -> None:
    first = _build(sources_copy, tmp_path / "data")
    trained = first.select(split="train")
    original = trained.path(int(np.flatnonzero(np.char.startswith(trained.products, "products10k/"))[0]))
    held_out = first.select(split="validation")
    row = int(np.flatnonzero(np.char.startswith(held_out.products, "aicrowd/") & (held_out.roles == "gallery"))[0])
    shutil.copyfile(original, held_out.path(row))
    second = _build(sources_copy, tmp_path / "again")
    names = [path.relative_to(sources_copy).as_posix() for path in (original, held_out.path(row))]
    assert not {*names} & set(second.table["image"].to_pylist())
    assert sorted(line[:2] for line in _read_duplicates(second) if line[2] == "dropped") == sorted([names, names[::-1]])


def test_training_products_of_a_table_with_a_test_split_are_divided(
    sources_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, lines = np.random.default_rng(1), ["image,product,role,split"]
    for product in range(20):
        for view in range(2):
            _write_image(sources_copy / f"shop/{product}-{view}.png", rng)
            own = f"{('gallery', 'query')[view]},test" if product < 3 else ","
            lines.append(f"{product}-{view}.png,sku-{product},{own}")
    table = sources_copy / "shop" / "t.csv"
    table.write_text("\n".join(lines) + "\n")
    values = {"csv": (str(table),), "products10k": "", "aicrowd": ""}
    built = _build(sources_copy, tmp_path / "data", **values)
    assert set(built.select(split="test").products) == {"sku-0", "sku-1", "sku-2"}
    assert built.summary()["products"]["validation"] > 0
    catalogue = CatalogConfig("csv", str(tmp_path / "c"), str(table), validation=0.25)
    same = load_catalog(build_catalog(catalogue)).table
    assert same.select(["product", "split", "role"]) == built.table.select(["product", "split", "role"])
    table.write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")  # roles without splits
    assert _build(sources_copy, tmp_path / "roles", **values).table.equals(built.table)
    caplog.clear()
    divided = _build(sources_copy, tmp_path / "data", **values, test=0.25, resplit=True)
    scored = set(divided.products) - set(divided.select(split="train").products)
    assert f"had {len(scored & set(built.select(split='train').products))} products (" in caplog.text


def test_table_that_tests_a_file_of_another_table_keeps_it(sources_copy: Path, tmp_path: Path) -> None:
    """Both tables list the same file under the same product."""
    _write_image(sources_copy / "shop/a.png", np.random.default_rng(1))
    _write_image(sources_copy / "shop/b.png", np.random.default_rng(2))
    (sources_copy / "shop/t1.csv").write_text("image,product\na.png,lamp\nb.png,lamp\n")
    (sources_copy / "shop/t2.csv").write_text("image,product,split\na.png,lamp,test\nb.png,lamp,test\n")
    tables = tuple(str(sources_copy / "shop" / name) for name in ("t1.csv", "t2.csv"))
    built = _build(sources_copy, tmp_path / "data", csv=tables)
    assert set(built.table["split"].filter(pa.array(built.products == "lamp")).to_pylist()) == {"test"}
    assert len(built.select(split="test")) == 2


def _build_tables(folder: Path, tables: dict[str, list[str]]) -> Catalog:
    """Build tables of the images 0.png to 3.png, with the columns image, product, role and split."""
    for number in range(4):
        _write_image(folder / f"{number}.png", np.random.default_rng(number))
    for name, rows in tables.items():
        (folder / name).write_text("\n".join(["image,product,role,split", *rows]) + "\n")
    values = {"products10k": "", "aicrowd": "", "validation": 0, "csv": tuple(str(folder / name) for name in tables)}
    return _build(folder, folder / "data", **values)


@pytest.mark.parametrize("tables", [1, 2])
def test_split_that_searches_itself_keeps_its_queries(tmp_path: Path, tables: int) -> None:
    """Leave-one-out: each held-out image is listed as query and as gallery image, in one table or in one for each."""
    roles = {role: [f"{n}.png,lamp,{role},test" for n in (0, 1)] for role in ("query", "gallery")}
    own = {"q.csv": roles["query"], "g.csv": roles["gallery"]} if tables == 2 else {"t.csv": sum(roles.values(), [])}
    built = _build_tables(tmp_path, {**own, "train.csv": ["2.png,sofa,,train", "3.png,sofa,,train"]})
    rows = zip(*(built.table[name].to_pylist() for name in ("image", "role", "split")), strict=True)
    held_out = [(f"{n}.png", role, "test") for role in ("query", "gallery") for n in (0, 1)]
    assert list(rows) == [*held_out, ("2.png", "train", "train"), ("3.png", "train", "train")]
    assert all(line[2] == "near" for line in _read_duplicates(built))


def test_own_split_that_another_table_takes_away_stops(tmp_path: Path) -> None:
    """The second table puts the only gallery image of the first one's queries into test, which keeps it."""
    tables = {
        "a.csv": ["0.png,lamp,query,validation", "1.png,lamp,gallery,validation", "2.png,sofa,,train"],
        "b.csv": ["1.png,lamp,gallery,test", "3.png,lamp,query,test"],
    }
    message = r"a\.csv: none of its 1 validation queries is left, such as 0\.png \(dropped, product: lamp\)\. Correct"
    with pytest.raises(UserError, match=message):
        _build_tables(tmp_path, tables)
    assert not (tmp_path / "data").exists()


def test_near_duplicates_are_listed_and_kept(sources_copy: Path, tmp_path: Path) -> None:
    first = _build(sources_copy, tmp_path / "data")
    scored, trained = first.select(split="validation", role="gallery"), first.select(split="train")
    with Image.open(scored.path(0)) as image:
        image.resize((192, 144)).save(trained.path(0))
    second = _build(sources_copy, tmp_path / "again")
    assert len(second) == len(first)
    (line,) = [line for line in _read_duplicates(second) if line[2] == "near, across splits"]
    assert set(line[:2]) == {path.relative_to(sources_copy).as_posix() for path in (scored.path(0), trained.path(0))}
    assert second.artifact.card.metrics["near_same_across_splits"] == 1


def test_csv_split_column_is_kept(sources_copy: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lines = ["image,product,split,role"]
    for number in range(3):
        _write_image(sources_copy / "extra" / f"{number}.png", rng)
        lines.append(f"{number}.png,products10k/5,test,{'query' if number else 'gallery'}")
    (sources_copy / "extra" / "t.csv").write_text("\n".join(lines) + "\n")
    built = _build(sources_copy, tmp_path / "data", csv=(str(sources_copy / "extra" / "t.csv"),))
    assert set(built.table["split"].filter(pa.array(built.products == "products10k/5")).to_pylist()) == {"test"}
    dropped = [line for line in _read_duplicates(built) if line[2] == "dropped, product"]
    assert len(dropped) == 4
    assert {line[1] for line in dropped} == {"products10k/5"}


def test_small_source_stays_in_train(sources_copy: Path, tmp_path: Path) -> None:
    _write_image(sources_copy / "extra" / "a.png", np.random.default_rng(1))
    (sources_copy / "extra" / "t.csv").write_text("image,product\na.png,lamp\n")
    table = str(sources_copy / "extra" / "t.csv")
    built = _build(sources_copy, tmp_path / "data", csv=(table,))
    assert "lamp" in built.select(split="train").products
    with pytest.raises(UserError, match=r"validation: no source has enough products for 0\.25"):
        _build(sources_copy, tmp_path / "alone", csv=(table,), products10k="", aicrowd="")


def test_queries_without_gallery_are_dropped() -> None:
    fixed = {"category": "", "box": None, "source": "made"}
    rows = [
        {**fixed, "image": image, "product": product, "split": split, "role": role, "sha256": sha}
        for image, product, split, role, sha in [
            ("a", "1", "train", "train", "s1"),
            ("b", "2", "test", "gallery", "s2"),
            ("c", "2", "test", "query", "s3"),
            ("d", "3", "validation", "gallery", "s3"),  # the test query's bytes
            ("e", "3", "validation", "query", "s4"),
            ("f", "4", "train", "train", "s4"),
        ]
    ]
    own = {"sha256": {"s2": 3, "s3": 3, "s4": 2}, "product": {"2": 3, "3": 2}}  # codes of validation and test
    remaining, dropped = drop_split_overlap(Catalog(rows_to_table(rows), Path()), own)
    assert remaining.table["image"].to_pylist() == ["a", "b", "c"]
    assert dropped == [("d", "c", "dropped"), ("f", "e", "dropped"), ("e", "3", "dropped, no gallery")]
    assert remaining.table.schema.equals(SCHEMA)


def test_unreadable_images_are_rejected_or_set_aside(sources_copy: Path, tmp_path: Path) -> None:
    (sources_copy / "p10k" / "train" / "7.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"train/7\.jpg: not an image"):
        _build(sources_copy, tmp_path / "data")
    built = _build(sources_copy, tmp_path / "data", skip_unreadable=True)
    assert built.artifact.file("set_aside.csv").read_text() == "image,reason\np10k/train/7.jpg,not an image\n"
    assert built.artifact.card.metrics["set_aside"] == 1


def test_catalog_is_rebuilt_only_if_a_table_changes(sources_copy: Path, tmp_path: Path) -> None:
    first = _build(sources_copy, tmp_path / "data").artifact
    assert _build(sources_copy, tmp_path / "data").artifact.sha256 == first.sha256
    table = sources_copy / "p10k" / "train.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    assert _build(sources_copy, tmp_path / "data").artifact.card.metrics["images"] == first.card.metrics["images"] - 1


def test_training_loader_reads_the_catalogue(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vpr.imaging.preprocess import Preprocess

    arguments = ["--products10k", str(sources / "p10k"), "--aicrowd", str(sources / "aicrowd"), "--validation", "0.25"]
    main(["teacher", "data", *arguments, "--output", str(tmp_path / "data")])
    assert "0 rows dropped, since two splits" in capsys.readouterr().err
    training = load_catalog(tmp_path / "data").select(split="train")
    loader = training_loader(
        ImageDataset(training, Preprocess(size=16)), LoaderConfig(7, max_per_product=3, min_per_product=3), 0
    )
    rows = np.concatenate([batch["rows"].numpy() for batch in loader])
    assert len(rows) == len(loader.sampler) == 3 * len(set(training.products)) // 7 * 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no source is given. Use --products10k, --aicrowd or --csv"),
        (["--products10k", "x", "--validation", "-1"], "validation"),
        (["--products10k", "x", "--validation", ".nan"], "validation"),
        (["--products10k", "x", "--seed", "-1"], "seed: "),
        (["--products10k", "x", "--aicrowd", "x"], "a source is given twice"),
        (["--csv", "absent.csv"], "absent.csv: "),
        (["--aicrowd", "absent"], "gallery.csv: "),
    ],
)
def test_errors_are_reported_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["teacher", "data", *arguments, "--output", str(tmp_path / "data")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
