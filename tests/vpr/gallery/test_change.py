from __future__ import annotations

import csv
import json
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest

from tests.vpr.gallery.shop import DIM, contents, name_images, unit_vectors, write_shop, write_table
from vpr.common.errors import CheckFailed, UserError
from vpr.gallery.change import add_images, compact_gallery, create_gallery, remove_images, update_images
from vpr.gallery.config import (
    AddConfig,
    CompactConfig,
    CreateConfig,
    ExportConfig,
    GallerySearchConfig,
    InfoConfig,
    RemoveConfig,
    UpdateConfig,
    VerifyGalleryConfig,
)
from vpr.gallery.gallery import IDS, load_gallery
from vpr.gallery.inspect import export_embeddings, print_info, verify_gallery
from vpr.gallery.search_command import search_in_gallery
from vpr.gallery.store import InvalidCondition, LostFile, Store
from vpr.retrieval.embeddings import load_embeddings

pytest.importorskip("lancedb")


@pytest.fixture
def shop(tmp_path: Path) -> tuple[str, str]:
    """Embeddings of 30 images of 10 products, and a gallery of them."""
    embeddings = write_shop(tmp_path / "first", name_images(30), unit_vectors(30))
    gallery = create_gallery(CreateConfig(embeddings, str(tmp_path / "gallery"), columns=("title", "price:number")))
    return embeddings, str(gallery)


def test_every_change_is_one_version(shop: tuple[str, str], tmp_path: Path) -> None:
    _, gallery = shop
    first = contents(gallery)
    assert len(first) == 30
    add_images(AddConfig(gallery, write_shop(tmp_path / "more", name_images(6, first=50), unit_vectors(6, seed=1))))
    added = contents(gallery)
    remove_images(RemoveConfig(gallery, products=("p1",), images=("50/0.jpg",)))
    removed = contents(gallery)
    changed = write_shop(tmp_path / "changed", name_images(3), unit_vectors(3, seed=2))
    update_images(UpdateConfig(gallery, changed))
    updated = contents(gallery)
    assert set(added) - set(first) == {*name_images(6, first=50)}
    assert set(added) - set(removed) == {("p1", f"1/{view}.jpg") for view in range(3)} | {("p50", "50/0.jpg")}
    assert {key for key in removed if removed[key] != updated[key]} == set(name_images(3))
    assert [contents(gallery, version) for version in (1, 2, 3, 4)] == [first, added, removed, updated]
    info = print_info(InfoConfig(gallery))
    assert (info["version"], info["images"], info["products"], len(info["versions"])) == (4, 32, 11, 4)


def test_metadata_of_products_and_images(shop: tuple[str, str], tmp_path: Path) -> None:
    _, gallery = shop
    rows = [
        ("product", "image", "Price", "title", "other"),
        ("p0", "", "9.5", 'it\'s "blue"', "x"),
        ("p2", "2/1.jpg", "", "red"),
    ]
    update_images(UpdateConfig(gallery, metadata=write_table(tmp_path / "m.csv", rows)))
    stored = {key: values[:2] for key, values in contents(gallery).items()}
    assert stored["p0", "0/0.jpg"] == stored["p0", "0/2.jpg"] == ('it\'s "blue"', 9.5)
    assert stored["p2", "2/1.jpg"] == ("red", None)
    assert stored["p2", "2/0.jpg"] == (None, None)
    verify_gallery(VerifyGalleryConfig(gallery))


def test_header_with_spaces(shop: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("product, Title , price\np0,blue,9.5\n")
    update_images(UpdateConfig(shop[1], metadata=str(tmp_path / "m.csv")))
    assert contents(shop[1])["p0", "0/0.jpg"][:2] == ("blue", 9.5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("1000.0", "", "x"), "It has product 'p0', the table product '1000.0'. Use the product ids"),
        (("p0", "a.jpg", "x"), "It has image '0/0.jpg' of product 'p0', the table image 'a.jpg' of product 'p0'"),
    ],
)
def test_metadata_of_other_images_only(row: tuple[str, ...], message: str, tmp_path: Path) -> None:
    embeddings = write_shop(tmp_path / "e", name_images(3), unit_vectors(3))
    table = write_table(tmp_path / "m.csv", [("product", "image", "title"), row])
    with pytest.raises(UserError, match=f"metadata: .*m.csv: no row is of a product in .*/e. {message}"):
        create_gallery(CreateConfig(embeddings, str(tmp_path / "g"), ("title",), table))
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("name", ["shop:stock", "s3:stock", "~", "~/stock", "a b#%20?\U0001f600"])
def test_folder_that_looks_like_an_address(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    embeddings = write_shop(tmp_path / "e", name_images(6), unit_vectors(6))
    create_gallery(CreateConfig(embeddings, name))
    remove_images(RemoveConfig(name, products=("p0",)))
    compact_gallery(CompactConfig(name))
    assert set(contents(name)) == set(name_images(6)[3:])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["e", "student", name.split("/")[0]])


@pytest.mark.parametrize("partitions", [0, 4])
def test_search_equals_faiss(partitions: int, tmp_path: Path) -> None:
    ids, vectors = name_images(700), unit_vectors(700, 16)
    embeddings = write_shop(tmp_path / "e", ids, vectors)
    rows = [("product", "price"), *((f"p{number}", number % 10) for number in range(234))]
    gallery = str(
        create_gallery(
            CreateConfig(
                embeddings, str(tmp_path / "g"), ("price:number",), metadata=write_table(tmp_path / "m.csv", rows)
            )
        )
    )
    if partitions:
        compact_gallery(CompactConfig(gallery, index=partitions))
        assert print_info(InfoConfig(gallery))["index"] == {"partitions": 4, "images": 700, "others": 0}
    queries = unit_vectors(20, 16, seed=1)
    searched = write_shop(tmp_path / "q", name_images(20), queries, roles=["query"] * 20)
    kept = np.array([int(product[1:]) % 10 < 3 for product, _ in ids])
    for where, allowed in (("", np.ones(700, dtype=bool)), ("price < 3", kept)):
        out = str(tmp_path / "out.csv")
        search_in_gallery(GallerySearchConfig(gallery, searched, out, k=5, where=where, probes=partitions))
        with open(out, newline="") as stream:
            found = list(csv.DictReader(stream))
        chosen = np.flatnonzero(allowed)
        scores, expected = faiss.knn(queries, vectors[chosen], 5, metric=faiss.METRIC_INNER_PRODUCT)
        assert [row["image"] for row in found] == [ids[row][1] for row in chosen[expected].ravel()]
        np.testing.assert_allclose([float(row["score"]) for row in found], scores.ravel(), atol=1e-5)
        assert all(row["price"] for row in found)


@pytest.mark.parametrize("partitions", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_removal_leaves_nothing_in_the_files(partitions: int, tmp_path: Path) -> None:
    ids = [(f"SECRET{number}", f"private-{number}.jpg") for number in range(4)] + name_images(60)
    vectors = unit_vectors(64)
    embeddings = write_shop(tmp_path / "e", ids, vectors)
    gallery = create_gallery(CreateConfig(embeddings, str(tmp_path / "g"), ("title",)))
    titles = write_table(tmp_path / "m.csv", [("product", "title"), ("SECRET0", "confidential title")])
    update_images(UpdateConfig(str(gallery), metadata=titles))
    compact_gallery(CompactConfig(str(gallery), index=partitions))
    needles = [b"SECRET", b"private-", b"confidential title", *(vector.tobytes() for vector in vectors[:4])]

    def found() -> set[bytes]:
        files = [path.read_bytes() for path in gallery.rglob("*") if path.is_file()]
        return {needle for needle in needles if any(needle in content for content in files)}

    assert found() == set(needles)  # so the search of the bytes can find them
    remove_images(RemoveConfig(str(gallery), products=tuple(f"SECRET{number}" for number in range(4))))
    assert found()
    compact_gallery(CompactConfig(str(gallery)))
    assert not found()
    info = print_info(InfoConfig(str(gallery)))
    assert info["images"] == 60
    assert info["index"] == ({"partitions": 2, "images": 60, "others": 0} if partitions else None)
    verify_gallery(VerifyGalleryConfig(str(gallery), (embeddings,)))


def test_writers_of_the_same_images_wait_for_each_other(shop: tuple[str, str], tmp_path: Path) -> None:
    ids = name_images(6, first=50)
    changed = [write_shop(tmp_path / str(seed), ids, unit_vectors(6, seed=seed)) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda embeddings: update_images(UpdateConfig(shop[1], embeddings)), changed))
    table = load_gallery(shop[1]).snapshot().read(IDS)
    found = list(zip(table["product"].to_pylist(), table["image"].to_pylist(), strict=True))
    assert sorted(found) == sorted(name_images(30) + ids)


def test_reader_keeps_its_version(shop: tuple[str, str], tmp_path: Path) -> None:
    _, gallery = shop
    snapshot = load_gallery(gallery).snapshot()
    before = snapshot.read(IDS)
    remove_images(RemoveConfig(gallery, products=("p0",)))
    add_images(AddConfig(gallery, write_shop(tmp_path / "more", name_images(3, first=90), unit_vectors(3, seed=3))))
    assert snapshot.read(IDS) == before
    compact_gallery(CompactConfig(gallery))
    with pytest.raises(LostFile):
        snapshot.read(["vector"])
    searched = write_shop(tmp_path / "q", name_images(1), unit_vectors(1), roles=["query"])
    with pytest.raises(UserError, match=r"version 1 was removed by `vpr gallery compact`.*newest"):
        search_in_gallery(GallerySearchConfig(gallery, searched, version=1))


def test_index_has_at_most_as_many_partitions_as_images(shop: tuple[str, str]) -> None:
    _, gallery = shop
    before = {path: path.stat().st_mtime_ns for path in Path(gallery).rglob("*")}
    fix = "index: 31 partitions need as many images, the gallery has 30. Use --index 30 or less."
    with pytest.raises(UserError, match=re.escape(fix)):
        compact_gallery(CompactConfig(gallery, index=31))
    assert {path: path.stat().st_mtime_ns for path in Path(gallery).rglob("*")} == before
    compact_gallery(CompactConfig(gallery, index=30))
    assert print_info(InfoConfig(gallery))["index"] == {"partitions": 30, "images": 30, "others": 0}
    remove_images(RemoveConfig(gallery, products=tuple(f"p{number}" for number in range(10))))
    with pytest.raises(UserError, match=r"index: 1 partitions need .* the gallery has 0. Add images first."):
        compact_gallery(CompactConfig(gallery, index=1))


def test_export_is_read_by_search(shop: tuple[str, str], tmp_path: Path) -> None:
    embeddings, gallery = shop
    remove_images(RemoveConfig(gallery, products=("p3",)))
    exported = load_embeddings(export_embeddings(ExportConfig(gallery, str(tmp_path / "out"))))
    original = load_embeddings(embeddings)
    kept = original.products != "p3"
    order = np.lexsort((original.images[kept], original.products[kept]))
    np.testing.assert_array_equal(exported.vectors, original.vectors[kept][order])
    np.testing.assert_array_equal(exported.images, original.images[kept][order])
    assert exported.model == original.model


def test_verify_finds_a_changed_vector(shop: tuple[str, str]) -> None:
    embeddings, gallery = shop
    assert verify_gallery(VerifyGalleryConfig(gallery, (embeddings,)))["compared"] == 30
    store = load_gallery(gallery).store
    rows = store.open().read(["product", "image", "title", "price", "digest", "vector"]).drop_columns(["_rowid"])
    store.replace(rows.slice(0, 2).set_column(4, "digest", rows["digest"].slice(1, 2)), IDS)
    with pytest.raises(CheckFailed, match=r"2 problems: image '0/0.jpg' of product 'p0' changed since it was added"):
        verify_gallery(VerifyGalleryConfig(gallery))
    store.replace(rows.slice(0, 2), IDS)
    store.append(rows.slice(5, 1))
    with pytest.raises(CheckFailed, match=r"1 problems: image '1/2.jpg' of product 'p1' is there twice"):
        verify_gallery(VerifyGalleryConfig(gallery))


def test_bad_input_leaves_the_gallery(shop: tuple[str, str], tmp_path: Path) -> None:
    embeddings, gallery = shop
    before = contents(gallery)
    other = write_shop(tmp_path / "other", name_images(3, first=70), unit_vectors(3), model="another")
    wide = tmp_path / "wide"
    wide.mkdir()
    shutil.copytree(tmp_path / "student", wide / "student")
    wider = write_shop(wide / "e", name_images(3, first=70), unit_vectors(3, DIM + 1))
    twice = write_shop(tmp_path / "twice", [("p80", "a.jpg")] * 2, unit_vectors(2))
    fresh = write_shop(tmp_path / "fresh", name_images(3, first=70), unit_vectors(3))
    broken = write_table(tmp_path / "broken.csv", [("product", "title", "price"), ("p70", "x", "cheap")])
    unknown = write_table(tmp_path / "unknown.csv", [("product", "title", "price"), ("p0", "a", "1"), ("px", "x", "1")])
    cases = (
        (
            lambda: add_images(AddConfig(gallery, embeddings)),
            r"image '0/0.jpg' of product 'p0' is in the gallery \(30 of 30",
        ),
        (lambda: add_images(AddConfig(gallery, other)), "embedded with 'another', the gallery with 'student'"),
        (lambda: add_images(AddConfig(gallery, wider)), "9 dimensions, the gallery has 8"),
        (lambda: add_images(AddConfig(gallery, twice)), "image 'a.jpg' of product 'p80' is there twice"),
        (
            lambda: add_images(AddConfig(gallery, fresh, metadata=broken)),
            "line 2: 'price' is 'cheap', expected a number",
        ),
        (lambda: update_images(UpdateConfig(gallery, metadata=unknown)), "the gallery has no product 'px'"),
        (lambda: remove_images(RemoveConfig(gallery, products=("p0", "p77"))), r"no product 'p77' .*nearest are 'p7'"),
        (lambda: remove_images(RemoveConfig(gallery, images=("9/9.jpg",))), r"no image '9/9.jpg'"),
        (lambda: remove_images(RemoveConfig(gallery)), "nothing to remove"),
        (lambda: update_images(UpdateConfig(gallery)), "nothing to change"),
        (lambda: create_gallery(CreateConfig(embeddings, gallery)), "there is a gallery"),
        (lambda: create_gallery(CreateConfig(embeddings, embeddings)), "expected gallery"),
    )
    for work, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            work()
        assert re.match(r"[\w./-]+: ", str(caught.value))
    assert contents(gallery) == before
    assert print_info(InfoConfig(gallery))["version"] == 1
    remove_images(RemoveConfig(gallery, products=("p0", "p77"), skip_missing=True))
    assert len(contents(gallery)) == 27


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("prce < 3", "No field named prce"),
        ("price <<", "parser error"),
        ("price < 3 title", r"Expected: \)"),
        ('product = "p1"', "No field named p1"),
    ],
)
def test_wrong_condition(where: str, message: str, shop: tuple[str, str], tmp_path: Path) -> None:
    searched = write_shop(tmp_path / "q", name_images(1), unit_vectors(1), roles=["query"])
    with pytest.raises(UserError, match=message) as caught:
        search_in_gallery(GallerySearchConfig(shop[1], searched, where=where))
    assert str(caught.value).startswith(f"where: '{where}': ")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("cast(title AS int) > 1", "Cannot cast string 'blue'"),
        ("1 / 0 = 1", "Divide by zero"),
        ("price" + " + 1" * 2000 + " > 3", "a chain of 2001 operators, expected at most 256. Shorten it.$"),
        ("price" + " IS NULL" * 5000, "a chain of 5000 operators"),
        ("length(repeat(title, 1000000000)) > 5", "the function repeat is not supported"),
        ('"repeat"(title, 9) = title', "the function with a quoted name is not supported"),
        ("1=1); DROP TABLE images", "a bracket that closes none"),
        ("price > 1 -- x", "a comment"),
        ("title = '" + "x" * (1 << 20) + "'", "1048586 characters, expected at most 1048576"),
    ],
)
def test_condition_that_cannot_be_computed(where: str, message: str, shop: tuple[str, str], tmp_path: Path) -> None:
    rows = [("product", "title", "price"), ("p0", "blue", "2")]
    update_images(UpdateConfig(shop[1], metadata=write_table(tmp_path / "m.csv", rows)))
    with pytest.raises(InvalidCondition, match=f"^where: '.*{message}"):
        load_gallery(shop[1]).snapshot().count(where)


@pytest.mark.parametrize("name", ["select", "order", "group", "limit", "case", "from", "interval", "user", "true"])
def test_column_named_as_a_word_of_sql(name: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "m.csv", [("product", name), ("p0", "a"), ("p1", "b")])
    embeddings = write_shop(tmp_path / "e", name_images(9), unit_vectors(9))
    gallery = create_gallery(CreateConfig(embeddings, str(tmp_path / "g"), (name,), table))
    snapshot = load_gallery(gallery).snapshot()
    assert snapshot.read([name], f"`{name}` = 'a'")[name].to_pylist() == ["a"] * 3


def test_many_conditions_are_no_chain(shop: tuple[str, str]) -> None:
    products = ", ".join(f"'- + {number}'" for number in range(500))
    numbers = ", ".join(f"-{number}.5" for number in range(500))
    either = " OR ".join(f"product = 'p{number}'" for number in range(600))
    snapshot = load_gallery(shop[1]).snapshot()
    assert snapshot.count(f"product IN ({products}) OR price IN ({numbers})") == 0
    assert snapshot.count(either) == 30


def test_table_of_another_version(shop: tuple[str, str]) -> None:
    _, gallery = shop
    card = Path(gallery, "card.json")
    text = card.read_text()
    newer = json.loads(text) | {"schema": 99}
    card.write_text(json.dumps(newer))
    with pytest.raises(UserError, match="expected card schema up to"):
        print_info(InfoConfig(gallery))
    card.write_text(text)
    for manifest in Path(gallery).rglob("*.manifest"):
        manifest.write_bytes(manifest.read_bytes()[:-1] + b"?")  # the magic number of the format
    with pytest.raises(UserError, match="LanceDB reports"):
        print_info(InfoConfig(gallery))


def test_server_that_does_not_answer(shop: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(UserError, match=r"address: s3://bucket/shop: the server does not answer"):
        create_gallery(CreateConfig(shop[0], str(tmp_path / "remote"), address="s3://bucket/shop"))
    assert not (tmp_path / "remote").exists()


def test_vectors_that_a_killed_create_left_at_an_address(shop: tuple[str, str], tmp_path: Path) -> None:
    rows = load_gallery(shop[1]).snapshot().read([*IDS, "vector"]).drop_columns(["_rowid"])
    store = Store(str(tmp_path / "address"))
    store.create(rows.to_batches(), rows.schema)
    fix = "Choose another address, or delete what is at this one if no gallery uses it."
    with pytest.raises(UserError, match=f"^address: .*address: there are vectors .* that was killed. {fix}$"):
        store.create(rows.to_batches(), rows.schema)
    shutil.rmtree(tmp_path / "address")
    Store(store.address).create(rows.to_batches(), rows.schema)
    assert len(Store(store.address).open()) == 30


def test_missing_package_is_named(shop: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lancedb", None)
    with pytest.raises(UserError, match=r"lancedb is not installed. Run `make gallery`"):
        print_info(InfoConfig(shop[1]))


@pytest.mark.parametrize(("split", "expected"), [("test", [2, 3]), ("train", [0, 1]), ("", [2, 3])])
def test_split_gives_its_gallery_or_all_of_a_split_without_one(tmp_path: Path, split: str, expected: list[int]) -> None:
    ids, roles = name_images(6), ["train", "train", "gallery", "gallery", "query", "query"]
    splits = ["train", "train", "test", "test", "test", "validation"]
    embeddings = write_shop(tmp_path / "e", ids, unit_vectors(6), roles=roles, splits=splits)
    gallery = create_gallery(CreateConfig(embeddings, str(tmp_path / "gallery"), split=split))
    assert set(contents(str(gallery))) == {ids[row] for row in expected}
    with pytest.raises(UserError, match="split: .* has no gallery images in split 'validation'. Leave out --split"):
        create_gallery(CreateConfig(embeddings, str(tmp_path / "other"), split="validation"))


def test_empty_gallery(shop: tuple[str, str], tmp_path: Path) -> None:
    _, gallery = shop
    remove_images(RemoveConfig(gallery, products=tuple(f"p{number}" for number in range(10))))
    compact_gallery(CompactConfig(gallery))
    assert not contents(gallery)
    searched = write_shop(tmp_path / "q", name_images(2), unit_vectors(2), roles=["query"] * 2)
    search_in_gallery(GallerySearchConfig(gallery, searched, str(tmp_path / "out.csv")))
    assert [line.split(",")[1] for line in (tmp_path / "out.csv").read_text().splitlines()[1:]] == ["0", "0"]
    verify_gallery(VerifyGalleryConfig(gallery))
    with pytest.raises(UserError, match="has no such images"):
        export_embeddings(ExportConfig(gallery, str(tmp_path / "none")))


def test_link_in_a_gallery(shop: tuple[str, str], tmp_path: Path) -> None:
    """A change would write to, or remove files of, the folder that a link leads to."""
    data = Path(shop[1]) / "vectors" / "images.lance" / "data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"data: a symbolic link. Galleries hold plain files: restore the gallery.$"):
        compact_gallery(CompactConfig(shop[1]))


def test_unlabelled_images_are_no_products(tmp_path: Path) -> None:
    ids = [("unlabelled/x.jpg", "x.jpg"), ("p", "p.jpg")]
    embeddings = write_shop(tmp_path / "e", ids, unit_vectors(2), sources=["unlabelled", "csv"])
    with pytest.raises(UserError, match="embeddings: .*/e: 1 images have no product. Build .* --reader folder or csv"):
        create_gallery(CreateConfig(embeddings, str(tmp_path / "gallery")))


def test_products_without_a_gallery_image_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    embeddings = write_shop(tmp_path / "e", name_images(6), unit_vectors(6), roles=["train"] * 3 + ["gallery"] * 3)
    create_gallery(CreateConfig(embeddings, str(tmp_path / "gallery")))
    assert caplog.text.count("3 of 6 images (1 of 2 products) are gallery images") == 1
    caplog.clear()
    complete = write_shop(tmp_path / "complete", name_images(3), unit_vectors(3), roles=["query"] + ["gallery"] * 2)
    create_gallery(CreateConfig(complete, str(tmp_path / "other")))
    assert "are gallery images" not in caplog.text


def test_cleared_metadata_and_skipped_products(
    shop: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("product", "title", "price"), ("p0", "a", "1"), ("px", "x", "1")]
    table = write_table(tmp_path / "m.csv", rows)
    with pytest.raises(UserError, match="no product 'px' .1 unknown.. Remove the row, or set --skip-missing"):
        update_images(UpdateConfig(shop[1], metadata=table))
    update_images(UpdateConfig(shop[1], metadata=table, skip_missing=True))
    assert contents(shop[1])["p0", "0/0.jpg"][:2] == ("a", 1.0)
    with caplog.at_level("INFO"):
        update_images(UpdateConfig(shop[1], shop[0]))
    assert "metadata of 3 images cleared; give --metadata to keep values" in caplog.text


def test_a_gallery_in_place_of_embeddings_names_the_command(shop: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="got gallery. Search it with `vpr gallery search`, or .* `vpr gallery export`"):
        load_embeddings(shop[1])
