from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from app.config import ServeConfig
from app.search_page.gallery_lookup import GallerySearcher, load_gallery_searchers
from app.search_page.images import GalleryImages
from app.search_page.lookup import Hit, SearchResult, load_searchers
from app.search_page.results import describe_agreement, web_address
from app.search_page.server import make_app
from app.search_page.upload import MAX_FILTER
from export.config import EmbedConfig
from export.embed import embed_catalog
from tests.app.page import TOP, Answer, Lists, Site, jpeg, queries, serving
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.gallery.change import compact_gallery, create_gallery, remove_images
from vpr.gallery.config import CompactConfig, CreateConfig, GallerySearchConfig, RemoveConfig
from vpr.gallery.gallery import load_gallery
from vpr.gallery.search_command import search_in_gallery
from vpr.imaging.decode import decode
from vpr.retrieval.embeddings import embed
from vpr.retrieval.open_set import Probability
from vpr.retrieval.threshold_command import StoredThreshold

pytest.importorskip("lancedb")
EVEN = Probability(0.0, 0.0, 0.0)  # .5 for every image
COLUMNS = ("title", "price:number", "url")
MARKUP = '"><script>alert(1)</script>'


@dataclass(frozen=True)
class Shop:
    """Artifacts of a gallery with metadata."""

    model: str
    catalog: str
    embeddings: str
    gallery: str
    products: list[str]


def make_gallery(shop: Shop, path: Path, rows: list[tuple[str, ...]]) -> str:
    """Create a gallery with rows of product, title, price and url."""
    table = path.with_suffix(".csv")
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([("product", "title", "price", "url"), *rows])
    return str(create_gallery(CreateConfig(shop.embeddings, str(path), COLUMNS, str(table))))


@pytest.fixture(scope="module")
def shop(student_artifact: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    assert catalog.artifact is not None
    path = str(catalog.artifact.path)
    embeddings = str(embed_catalog(EmbedConfig(str(student_artifact), path, str(folder / "embeddings"), "test")))
    products = sorted(set(catalog.select(split="test").products.tolist()))
    made = Shop(str(student_artifact), path, embeddings, str(folder / "stock"), products)
    prices = ("9.5", "20", "1234567.25", "")
    rows = [
        (product, f"Chair {number}", prices[number], f"https://shop.example/{number}?a=1&b=2")
        for number, product in enumerate(products)
    ]
    make_gallery(made, folder / "stock", rows)
    return made


def load(shop: Shop, *galleries: str) -> tuple[list[GallerySearcher], GalleryImages]:
    return load_gallery_searchers([shop.model], galleries or [shop.gallery], [shop.catalog])


@pytest.fixture(scope="module")
def site(shop: Shop) -> Iterator[Site]:
    searchers, images = load(shop)
    with serving(searchers, images.catalogs[0]) as served:
        yield served


def search(site: Site, data: bytes, **query: str) -> Answer:
    return site.request("POST", f"/search?{urlencode(query)}", data)


class Links(HTMLParser):
    """Attributes of the links, names of all tags, and the text."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.links: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.text = ""
        assert answer.status == 200, answer.text
        self.feed(answer.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag == "a":
            self.links.append(dict(attributes))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "where",
    [
        "",
        "lower(title) IN ('chair 1', 'chair (blue)') AND (price > 3)",
        "price <= 20 AND title LIKE 'Chair %'",
        "price IS NULL",
        "price < 0",
    ],
)
def test_results_equal_those_of_gallery_search(
    site: Site, shop: Shop, catalog: Catalog, where: str, tmp_path: Path
) -> None:
    output = tmp_path / "found.csv"
    search_in_gallery(GallerySearchConfig(shop.gallery, shop.embeddings, str(output), k=TOP, where=where))
    expected: dict[str, list[dict[str, str]]] = {}
    with output.open(newline="") as stream:
        for row in csv.DictReader(stream):
            expected.setdefault(row["query"], []).extend([row] if row["rank"] != "0" else [])
    for name, data in queries(catalog)[:4]:
        answer = search(site, data, where=where)
        lists = Lists(answer)
        assert [site.gallery.table["image"][row].as_py() for row in lists.rows[0]] == [
            row["image"] for row in expected[name]
        ]
        assert lists.scores[0] == pytest.approx([float(row["score"]) for row in expected[name]], abs=6e-4)
        for row in expected[name]:
            assert row["title"] in lists.text
            assert not row["price"] or f"price: {float(row['price']):.15g}" in lists.text
    assert ("No image fulfils the filter." in answer.text) == (where == "price < 0")


def test_results_link_to_the_product(site: Site, catalog: Catalog) -> None:
    links = Links(search(site, queries(catalog)[0][1])).links
    assert len(links) == TOP
    for link in links:
        assert str(link["href"]).startswith("https://shop.example/")
        assert str(link["href"]).endswith("?a=1&b=2")
        assert (link["rel"], link["target"]) == ("noopener noreferrer", "_blank")


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.mark.parametrize("orientation", [1, 6, 3])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_crop_equals_the_embedding_of_the_cropped_image(site: Site, form: str, orientation: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((60, 40), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    width, height = upright.size
    box = (0.25, 0.1, 0.5, 0.6)
    edges = (round(0.25 * width), round(0.1 * height), round(0.75 * width), round(0.7 * height))
    cropped = encode(upright.crop(edges))
    query = {"box": ",".join(map(str, box))}

    def embedding(data: bytes, **values: str) -> list[float]:
        answer = site.request("POST", f"/embed?{urlencode(values)}", data)
        assert answer.status == 200, answer.text
        return list(json.loads(answer.data)["models"][0]["embedding"])

    np.testing.assert_allclose(embedding(data, **query), embedding(cropped), atol=1e-5)
    assert np.abs(np.subtract(embedding(data, **query), embedding(data))).max() > 1e-3
    np.testing.assert_allclose(embedding(data, box="0,0,1,1"), embedding(data), atol=1e-5)
    assert Lists(search(site, data, **query)).rows == Lists(search(site, cropped)).rows


def test_crop_is_that_of_a_catalogue(site: Site, tmp_path: Path) -> None:
    """A large JPEG is decoded at a reduced size; the box then counts like that of a catalogue."""
    noise = np.random.default_rng(1).integers(0, 256, (10, 16, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((1600, 1000), Image.Resampling.BICUBIC)
    (tmp_path / "large.jpg").write_bytes(encode(large, "JPEG"))
    box = {"x": 160.0, "y": 100.0, "w": 1200.0, "h": 700.0}
    row = {**site.gallery.table.to_pylist()[0], "image": "large.jpg", "box": box}
    images = Catalog(pa.Table.from_pylist([row], schema=site.gallery.table.schema), tmp_path)
    searcher = site.searchers[0]
    assert decode(images.path(0), images.box(0), searcher.preprocess.size).width < 1200
    data = (tmp_path / "large.jpg").read_bytes()
    answer = json.loads(site.request("POST", "/embed?box=0.1,0.1,0.75,0.7", data).data)
    expected = embed(images, searcher.preprocess, searcher.forward)[0]
    np.testing.assert_allclose(answer["models"][0]["embedding"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "box",
    [
        *("", "0,0,1", "0,0,1,1,1", "0,0,0,1", "0,0,1,0", "0.5,0,0.6,1", "0,0.5,1,0.6", "-0.1,0,1,1", "0,0,2,1"),
        *("nan,0,1,1", "inf,0,1,1", "1e-1,0,1,1", "0,0,1,٠", "a,b,c,d", "0,0,1,1\n", "0" * 60_000),
        *("0.5,0.5,0.001,0.001", "1,1,0.000001,0.000001", "0,0,0.000000001,1"),
    ],
)
def test_bad_box_is_one_line(site: Site, box: str) -> None:
    for path in ("/search", "/embed"):
        answer = site.request("POST", f"{path}?{urlencode({'box': box})}", jpeg())
        assert answer.status == 400
        if len(box) < 100:  # a longer head is rejected before it is parsed
            assert answer.text.startswith("box: ")
        assert "\n" not in answer.text
        assert len(answer.text) < 300


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("colour = 'red'", "where: 'colour = 'red'': .*colour"),
        ("price <", "where: 'price <': "),
        ("price < 'x' AND", "where: "),
        ("price = 1; DROP TABLE images", "where: "),
        ("product IN (SELECT product FROM images)", "where: "),
        ("price < 20 title LIKE 'Chair'", "where: "),
        ("title", "where: "),
        ("length(repeat(title, 1000000000)) > 1", "where: the page has no function 'repeat'. Use abs, "),
        ("title = 'it''s (' OR title = repeat (title, 9)", "where: the page has no function 'repeat'"),
        ("title = \"repeat\"('x', 9)", "where: the page has no function '\"'"),
        ("title = '\\' OR repeat('x', 9) > ' '", r"where: '\\' is not supported"),
        ("title = repeat/* '*/('x', 9)", r"where: '/\*' is not supported"),
        ("price < 1\nOR TRUE", f"where: expected at most {MAX_FILTER} characters in one line"),
        ("price < 1 OR \0 TRUE", "where: expected at most"),
        (f"title = '{'x' * MAX_FILTER}'", "where: expected at most"),
        ("(" * 900 + "price" + ")" * 90, "where: "),
        ("NOT " * 200 + "price < 1 1", "where: "),
    ],
)
def test_bad_filter_is_one_line(site: Site, where: str, expected: str) -> None:
    answer = search(site, jpeg(), where=where)
    assert answer.status == 400
    assert "\n" not in answer.text
    with pytest.raises(UserError, match=expected):
        raise UserError(answer.text)
    assert Lists(search(site, jpeg())).rows[0]


def test_page_of_models_takes_no_filter_but_a_box(shop: Shop, catalog: Catalog) -> None:
    searchers, gallery = load_searchers((shop.model,), shop.catalog, "test", ())
    with serving(searchers, gallery) as served:
        data = queries(catalog)[0][1]
        answer = search(served, data, where="price < 1")
        assert (answer.status, answer.text.splitlines()) == (
            400,
            ["where: this page has no metadata to filter by. Start it with --galleries."],
        )
        assert search(served, data, box="0.2,0.2,0.5,0.5").status == 200
        assert 'id="where"' not in served.request("GET", "/").text


def test_stored_threshold_says_no_match_without_a_restart(shop: Shop, catalog: Catalog, tmp_path: Path) -> None:
    path = make_gallery(shop, tmp_path / "stock", [])
    searchers, images = load(shop, path)
    gallery = load_gallery(path)
    model = gallery.model_of(gallery.snapshot())
    data = queries(catalog)[0][1]
    with serving(searchers, images.catalogs[0]) as served:
        assert "atch (" not in search(served, data).text
        gallery.store_threshold(StoredThreshold("probability", 0.51, EVEN, 4), model)
        rejected = search(served, data)
        gallery.store_threshold(StoredThreshold("probability", 0.5, EVEN, 4), model)
        accepted = search(served, data)
    assert "No match: the nearest images are below the threshold (probability 0.50)" in rejected.text
    assert '<p class="match">Match (probability 0.50)</p>' in accepted.text
    assert len(Lists(rejected).rows[0]) == TOP
    with serving([replace(searchers[0], threshold=StoredThreshold("margin", 9.0, EVEN, 4))], images.catalogs[0]) as own:
        assert "No match" in search(own, data).text


def test_hostile_metadata_is_text(shop: Shop, catalog: Catalog, tmp_path: Path) -> None:
    scripts = ["javascript:alert(1)", "JAVASCRIPT://%0aalert(1)", "data:text/html,<script>alert(1)</script>"]
    addresses = [*scripts, 'https://shop.example/"onmouseover="alert(1)']
    rows = [(product, MARKUP, "1", url) for product, url in zip(shop.products, addresses, strict=True)]
    path = make_gallery(shop, tmp_path / MARKUP.replace("/", "|"), rows)
    searchers, images = load(shop, path)
    searchers = [replace(searcher, threshold=None) for searcher in searchers]
    with serving(searchers, images.catalogs[0]) as served:
        found = [Links(search(served, data)) for _, data in queries(catalog)]
        page = served.request("GET", "/")
    assert page.text.count("<script") == 1
    assert {link["href"] for links in found for link in links.links} == {addresses[3]}
    for links in found:
        assert "script" not in links.tags
        assert links.text.count(MARKUP) >= TOP
    assert all(any(f"url: {script}" in links.text for links in found) for script in scripts)


@pytest.mark.parametrize(
    ("value", "is_link"),
    [
        *[
            (value, True)
            for value in ("https://a.example", "HTTP://a.example/b?c=d#e", "https://[::1]:80/", "http://ä.de")
        ],
        *[(value, False) for value in ("javascript:alert(1)", "java\nscript:alert(1)", "\x01javascript:alert(1)")],
        *[
            (value, False)
            for value in ("", "//a.example", "/a", "https:a", "https://", "https:///a", "ftp://a.example")
        ],
        *[
            (value, False)
            for value in (" https://a.example", "https://a.example b", "https://a\t.example", "https://[")
        ],
        *[(value, False) for value in ("https:\\\\a.example", "data:text/html,a", "file:///etc/passwd", 5.0, None)],
    ],
)
def test_only_web_addresses_are_links(value: object, is_link: bool) -> None:
    assert web_address(value) == (value if is_link else None)


def test_changes_of_the_gallery_show_at_once(shop: Shop, catalog: Catalog, tmp_path: Path) -> None:
    path = make_gallery(shop, tmp_path / "stock", [])
    searchers, images = load(shop, path)
    data = images.catalogs[0].path(images.places[first_image(images.catalogs[0], shop.products[0])]).read_bytes()
    with serving(searchers, images.catalogs[0]) as served:
        assert "stock, student (torch): 16 gallery images, version 1" in served.request("GET", "/").text
        assert shop.products[0] in Lists(search(served, data)).text
        remove_images(RemoveConfig(path, products=(shop.products[0],)))
        assert shop.products[0] not in Lists(search(served, data)).text
        compact_gallery(CompactConfig(path))
        assert shop.products[0] not in Lists(search(served, data)).text
        assert ": 12 gallery images" in served.request("GET", "/").text


def first_image(catalog: Catalog, product: str) -> tuple[str, str]:
    return product, catalog.table["image"][int(np.flatnonzero(catalog.products == product)[0])].as_py()


def test_two_galleries_side_by_side(shop: Shop, catalog: Catalog, tmp_path: Path) -> None:
    other = make_gallery(shop, tmp_path / "other", [])
    remove_images(RemoveConfig(other, products=tuple(shop.products[:2])))
    searchers, images = load(shop, shop.gallery, other)
    with serving(searchers, images.catalogs[0]) as served:
        answer = search(served, queries(catalog)[0][1])
        lists = Lists(answer)
        assert [searcher.name for searcher in searchers] == ["stock, student (torch)", "other, student (torch)"]
        both = set(lists.rows[0]) & set(lists.rows[1])
        assert f"{len(both)} of {TOP} are in both lists." in lists.text
        assert answer.text.count("only here") == 2 * (TOP - len(both))
        filtered = search(served, queries(catalog)[0][1], where="price < 100")
        assert filtered.text.count("No image fulfils the filter.") == 1
        page = served.request("GET", "/").text
        assert page.count("gallery images") == 2
        assert "price (number)" in page


def test_agreement_counts_the_longer_list() -> None:
    hits = [Hit(("p", str(number)), None, "p", 0.5) for number in range(3)]
    assert describe_agreement([SearchResult(hits), SearchResult(hits[:2])]) == (
        "Same first image; 2 of 3 are in both lists."
    )
    assert describe_agreement([SearchResult(hits), SearchResult([])]) == ""


def test_images_of_several_catalogues(
    shop: Shop, catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    searchers, _ = load_gallery_searchers([shop.model], [shop.gallery], [])
    assert "16 of 16 images are in none of the catalogues" in caplog.text
    with serving(searchers, catalog.select(role="gallery")) as served:
        answer = search(served, queries(catalog)[0][1])
    assert (answer.text.count("no image"), answer.text.count("<img")) == (TOP, 0)
    parts = [catalog.select(split="test", role="gallery"), catalog.select(split="train", role="gallery")]
    Image.new("RGB", (50, 20), "red").save(tmp_path / "red.png")
    row = {**parts[0].table.to_pylist()[0], "image": "red.png", "box": None}
    red = Catalog(pa.Table.from_pylist([row], schema=parts[0].table.schema), tmp_path)
    images = GalleryImages([parts[0], red, parts[1], parts[0]])
    assert len(images) == 2 * len(parts[0]) + 1 + len(parts[1])
    assert images.places[row["product"], "red.png"] == len(parts[0])
    assert images.places[first_image(parts[0], shop.products[1])] < len(parts[0])  # the first catalogue counts
    assert Image.open(io.BytesIO(images.thumbnail(len(parts[0])))).size == (50, 20)


def test_images_of_every_role_are_shown(shop: Shop, catalog: Catalog) -> None:
    assert catalog.artifact is not None
    _, images = load_gallery_searchers([shop.model], [shop.gallery], [str(catalog.artifact.path)])
    training = catalog.select(split="train").table
    assert (training["product"][0].as_py(), training["image"][0].as_py()) in images.places


def test_galleries_and_models_must_fit(shop: Shop, catalog: Catalog, tmp_path: Path) -> None:
    from experiments.random_student import write_random_student
    from tests.conftest import small_student

    other = str(write_random_student(tmp_path / "other", replace(small_student("conv"), depth=2)))
    with pytest.raises(UserError, match=r"models: .*stock is of model 'student', got other. Pass the artifact"):
        load_gallery_searchers([other], [shop.gallery], [shop.catalog])
    with pytest.raises(UserError, match="expected an artifact of kind gallery, got catalog"):
        load_gallery_searchers([shop.model], [shop.catalog], [shop.catalog])
    cut = str(embed_catalog(EmbedConfig(shop.model, shop.catalog, str(tmp_path / "cut"), "test", dimensions=8)))
    small = str(create_gallery(CreateConfig(cut, str(tmp_path / "small"))))
    with pytest.raises(UserError, match=r"galleries: .*small: 8 dimensions, the model 'student' gives 32"):
        load_gallery_searchers([shop.model], [small], [shop.catalog])
    searchers, images = load(shop)
    with pytest.raises(UserError, match=r"galleries: .*stock: it is of model 'student' by now. Start the page again"):
        make_app([replace(searchers[0], sha256="0" * 64)], images, TOP)
    with pytest.raises(UserError, match="probes: the gallery has no index"):
        make_app([replace(searchers[0], probes=4)], images, TOP)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "catalog: expected a catalogue or galleries, got neither"),
        ({"galleries": ("a",), "models": ("m",) * 5}, "models: expected 1 to 4 artifacts, got 5"),
        ({"galleries": ("a", "b", "c")}, "galleries: expected one, or two to compare, got 3"),
        ({"galleries": ("a",), "catalog": "c"}, "catalog: the galleries replace it"),
        ({"galleries": ("a",), "embeddings": ("e",)}, "embeddings: the galleries store them"),
        ({"galleries": ("a", "b"), "threshold": ("t",)}, "threshold: expected 2, one for each gallery"),
        ({"catalog": "c", "catalogs": ("c",)}, "catalogs: it needs galleries"),
        ({"catalog": "c", "probes": 3}, "probes: it needs galleries"),
        ({"galleries": ("a",), "probes": -1}, "probes: expected 0 to 65536"),
    ],
)
def test_invalid_options_are_rejected(values: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        ServeConfig(**{"models": ("m",), **values})  # type: ignore[arg-type]
