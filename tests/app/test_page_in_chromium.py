"""The search page in a browser: ``apt-get install chromium`` (or any Chromium or Chrome on the PATH)."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from app.search_page.gallery_lookup import load_gallery_searchers
from export.config import EmbedConfig
from export.embed import embed_catalog
from tests.app.browser import Tab, find_chromium, open_browser
from tests.app.page import Site, serving
from vpr.data.catalog import Catalog
from vpr.gallery.change import create_gallery
from vpr.gallery.config import CreateConfig
from vpr.gallery.gallery import load_gallery
from vpr.retrieval.open_set import Probability
from vpr.retrieval.threshold_command import StoredThreshold

pytest.importorskip("lancedb")
pytestmark = pytest.mark.slow
SHIFT = 8
MARKUP = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def site(student_artifact: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if find_chromium() is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    folder = tmp_path_factory.mktemp("shop")
    assert catalog.artifact is not None
    model, path = str(student_artifact), str(catalog.artifact.path)
    embeddings = str(embed_catalog(EmbedConfig(model, path, str(folder / "embeddings"), "test")))
    with (folder / "rows.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("product", "title", "price", "url"))
        for number, product in enumerate(sorted(set(catalog.select(split="test").products.tolist()))):
            writer.writerow((product, f"Chair {number} {MARKUP}", 10 * number, f"https://shop.example/{number}"))
    columns = ("title", "price:number", "url")
    gallery = str(create_gallery(CreateConfig(embeddings, str(folder / "stock"), columns, str(folder / "rows.csv"))))
    searchers, images = load_gallery_searchers([model], [gallery], [path])
    with serving(searchers, images.catalogs[0]) as served:
        yield served


@pytest.fixture
def strict_site(site: Site, tmp_path: Path) -> Iterator[Site]:
    """Page of a gallery with a threshold that no image reaches."""
    searcher = site.searchers[0]
    path = tmp_path / "strict"
    shutil.copytree(searcher.path, path)
    gallery = load_gallery(path)
    threshold = StoredThreshold("similarity", 2.0, Probability(0.0, 0.0, 0.0), 4)
    gallery.store_threshold(threshold, gallery.model_of(gallery.snapshot()))
    with serving([replace(searcher, path=str(path))], site.gallery) as served:
        yield served


@pytest.fixture
def tab(site: Site, tmp_path: Path) -> Iterator[Tab]:
    chromium = find_chromium()
    assert chromium is not None
    with open_browser(chromium, tmp_path) as opened:
        yield opened


def open_page(tab: Tab, site: Site, width: int, is_phone: bool) -> None:
    """Open the page and search for an image of the gallery."""
    tab.open(f"http://127.0.0.1:{site.port}/", width, 844, is_phone)
    tab.choose_file("#file", site.gallery.path(0).resolve())
    wait_for_results(tab, 1)


def searches(tab: Tab) -> list[dict[str, list[str]]]:
    """Return the queries of the searches so far."""
    addresses = [urlsplit(address) for address in tab.requests]
    return [parse_qs(address.query) for address in addresses if address.path == "/search"]


def wait_for_results(tab: Tab, count: int) -> None:
    tab.wait("message.textContent === '' && results.querySelectorAll('li, .no-match').length > 0")
    assert len(searches(tab)) == count


def corners(tab: Tab, *shares: tuple[float, float]) -> list[tuple[float, float]]:
    """Return points of the shown image in CSS pixels."""
    tab.run("preview.scrollIntoView({block: 'center', behavior: 'instant'})")
    place = tab.run("(({left, top, width, height}) => [left, top, width, height])(preview.getBoundingClientRect())")
    return [(place[0] + x * place[2], place[1] + y * place[3]) for x, y in shares]


def box_of(query: dict[str, list[str]]) -> list[float]:
    return [float(share) for share in query["box"][0].split(",")]


@pytest.mark.parametrize("is_phone", [False, True], ids=["mouse", "touch"])
def test_box_is_drawn_and_removed(tab: Tab, site: Site, is_phone: bool) -> None:
    width = 390 if is_phone else 1280
    open_page(tab, site, width, is_phone)
    assert searches(tab) == [{}]
    full = tab.run("results.innerText")
    # Drawn from the lower right corner, and beyond the image.
    tab.drag(corners(tab, (0.8, 0.75), (0.5, 0.5), (-0.1, 0.25)), is_phone)
    wait_for_results(tab, 2)
    assert box_of(searches(tab)[1]) == pytest.approx([0, 0.25, 0.8, 0.5], abs=0.03)
    assert tab.run("results.innerText") != full
    shown = tab.run("[boxShown.offsetWidth / preview.offsetWidth, boxShown.offsetHeight / preview.offsetHeight]")
    assert shown == pytest.approx([0.8, 0.5], abs=0.03)
    tab.drag(corners(tab, (0.5, 0.5), (0.51, 0.5)), is_phone)  # a tap keeps the box
    assert len(searches(tab)) == 2
    assert tab.run("document.documentElement.scrollWidth") <= width
    tab.run("reset.focus()")
    tab.press("Enter")
    wait_for_results(tab, 3)
    assert searches(tab)[2] == {}
    assert tab.run("boxShown.hidden && reset.hidden && document.activeElement === frame")
    assert tab.problems == []


def test_box_is_moved_by_keys(tab: Tab, site: Site) -> None:
    open_page(tab, site, 1280, is_phone=False)
    tab.run("frame.focus()")
    for key, modifiers in (("ArrowRight", 0), ("ArrowRight", 0), ("ArrowDown", 0), ("ArrowLeft", SHIFT)):
        tab.press(key, modifiers)
    tab.press("Enter")
    wait_for_results(tab, 2)
    assert box_of(searches(tab)[1]) == pytest.approx([0.27, 0.27, 0.48, 0.5])
    for _ in range(60):
        tab.press("ArrowRight")
    tab.press("Enter")
    wait_for_results(tab, 3)
    assert box_of(searches(tab)[2]) == pytest.approx([0.52, 0.27, 0.48, 0.5])
    tab.press("Escape")
    wait_for_results(tab, 4)
    assert searches(tab)[3] == {}
    assert tab.problems == []


def test_filter_links_and_markup(tab: Tab, site: Site) -> None:
    open_page(tab, site, 1280, is_phone=False)
    tab.run("where.value = 'price >= 20'; filter.requestSubmit()")
    wait_for_results(tab, 2)
    assert searches(tab)[1] == {"where": ["price >= 20"]}
    prices = tab.run("[...results.querySelectorAll('li')].map((item) => +item.innerText.match(/price: (\\d+)/)[1])")
    assert set(prices) == {20, 30}
    links = tab.run("[...results.querySelectorAll('a')].map((link) => [link.href, link.rel, link.innerText])")
    assert {link[0] for link in links} == {"https://shop.example/2", "https://shop.example/3"}
    assert all(link[1] == "noopener noreferrer" and MARKUP in link[2] for link in links)
    assert tab.run("document.title") == "Visual product search"
    tab.run("where.value = 'price >='; filter.requestSubmit()")
    assert tab.wait("message.className === 'bad' && message.textContent").startswith("where: 'price >=': ")
    assert tab.run("results.childElementCount") == 0
    # The browser reports the status 400 itself; the page has no error of its own.
    assert all("400 (Bad Request)" in problem for problem in tab.problems)


def test_no_match_is_shown(tab: Tab, strict_site: Site) -> None:
    open_page(tab, strict_site, 1280, is_phone=False)
    shown = tab.run("[...results.querySelectorAll('.no-match')].map((text) => text.innerText)")
    assert shown == ["No match: the nearest images are below the threshold (probability 0.50)"]
    assert tab.run("results.querySelectorAll('li').length") > 0
    assert tab.problems == []


def test_policy_blocks_a_handler(tab: Tab, site: Site) -> None:
    """It also shows that these tests see the problems of the page."""
    tab.open(f"http://127.0.0.1:{site.port}/")
    tab.run(f"results.innerHTML = {MARKUP!r}")
    tab.wait("results.firstChild.complete")
    for _ in range(20):
        if tab.problems:
            break
        tab.run("new Promise((done) => setTimeout(done, 100))")
    assert tab.run("document.title") == "Visual product search"
    assert any("Content Security Policy" in problem for problem in tab.problems)
