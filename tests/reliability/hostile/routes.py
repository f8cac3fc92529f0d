"""Routes of hostile input: commands, the search page, the report, an image of the gallery.

Each runs in the folder of a case, which :mod:`tests.reliability.hostile.worker` lays out.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa

from app.search_page.images import GalleryImages
from app.search_page.lookup import VectorSearcher, load_searchers
from app.search_page.server import ADDRESS, make_app
from benchmarks.config import ReportConfig
from benchmarks.report.build import build_report
from benchmarks.report.render import draw_html, draw_markdown
from benchmarks.report.schema import Report
from tests.reliability.cases import CASES, RESULT, Case, make_student, run_graphs
from tests.reliability.commands import BY_OUTPUT, paths_in, run_in
from tests.reliability.hostile.command_routes import command_routes, make_command_originals
from vpr.artifacts.store import load_artifact
from vpr.cli import main
from vpr.common.errors import OUT_OF_MEMORY, UserError
from vpr.data.catalog import Catalog

IMAGE = "2/0.png"  # the image of the gallery that a hostile one replaces
IMAGE_ROUTES = ("catalog", "embed the shop", "upload", "gallery image")
_ERROR = "vpr: error: "
_HARMLESS = "chair"
_TOP = 3


class SetAside(Exception):
    """Raised where a catalogue was written without the hostile file; the message is the listed reason."""


def make_originals(folder: Path, shop: Path) -> None:
    """Write artifacts, the shop's images and catalogue, and a report to put names into.

    Args:
        folder: Folder to write to.
        shop: Folder of the shop's images in every case.
    """
    make_student(folder, shop)
    run_in(folder, "embeddings")
    student, catalog = str(folder / "student"), str(folder / "catalog")
    report = build_report(ReportConfig(catalog, (student,), str(folder / "drawn"), seconds=0.02, sheet_queries=2))
    (folder / "report.json").write_bytes((report / "report.json").read_bytes())
    make_command_originals(folder)
    shop.rename(folder / "images")


def run_vpr(*arguments: str, is_check: bool = False) -> None:
    """Run ``vpr`` with these arguments.

    Args:
        arguments: Words after ``vpr``.
        is_check: Whether the command checks its input, and reports what is wrong with exit code 1.

    Raises:
        UserError: The command ended with exit code 2 and one line, or a check failed with one line.
        RuntimeError: The command ended with anything else, or for lack of memory.
    """
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            main(arguments)
    except SystemExit as end:
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("vpr: ")]
        is_failed_check = is_check and end.code == 1 and len(lines) == 1 and errors.getvalue().endswith(f"{lines[0]}\n")
        if is_failed_check:
            raise UserError(lines[0]) from None
        if end.code != 2 or len(lines) != 1 or not lines[0].startswith(_ERROR):
            raise RuntimeError(f"exit status {end.code} after {errors.getvalue()[-500:]!r}") from None
        if OUT_OF_MEMORY in lines[0]:  # the input made the command allocate too much
            raise RuntimeError(lines[0]) from None
        raise UserError(lines[0].removeprefix(_ERROR)) from None


def _catalog(reader: str, root: str, folder: Path) -> None:
    """Import a folder; raise :class:`SetAside` if a file was set aside."""
    result = folder / RESULT
    run_vpr(
        *("catalog", "--reader", reader, "--root", str(folder / root), "--output", str(result)),
        "--skip-unreadable",
    )
    if load_artifact(result).card.metrics["set_aside"]:
        raise SetAside((result / "set_aside.csv").read_text(encoding="utf-8").splitlines()[-1])


def _embed(folder: Path) -> None:
    run_vpr(*BY_OUTPUT["embeddings"].words(paths_in(folder), str(folder / RESULT)))


def _recipe(folder: Path) -> None:
    run_vpr("catalog", "--recipe", str(folder / "in" / "recipe.yaml"), "--output", str(folder / RESULT))


def _train_teacher(folder: Path) -> None:
    run_vpr(
        *("teacher", "train", "--catalog", str(folder / "catalog"), "--output", str(folder / RESULT)),
        *("--tower.name", str(folder / "in" / "tower.json"), "--tower.pretrained", "", "--loader.batch-size", "4"),
        *("--stages", "{train: all, epochs: 1}"),
    )


@cache
def _searchers(folder: Path) -> tuple[list[VectorSearcher], Catalog]:
    """Return the model and its gallery, embedded once while the shop's images are still the original ones."""
    return load_searchers((str(folder / "student"),), str(folder / "catalog"), "", ())


@cache
def _app(folder: Path) -> Any:
    searchers, gallery = _searchers(folder)
    return make_app(searchers, GalleryImages([gallery]), _TOP)


def open_page(folder: Path) -> None:
    """Open the search page."""
    _app(folder)


def request(app: Any, method: str, path: str, body: bytes = b"") -> str:
    """Return the page's answer.

    Raises:
        UserError: The page rejected the request with one line.
        RuntimeError: The page failed.
    """
    headers = [(b"host", ADDRESS.encode()), (b"content-length", str(len(body)).encode())]
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
    }
    scope |= {"query_string": b"", "headers": headers, "scheme": "http", "server": (ADDRESS, 80), "client": None}
    parts: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        parts.append(message)

    asyncio.run(app(scope, receive, send))
    status, text = parts[0]["status"], b"".join(part.get("body", b"") for part in parts[1:])
    if status in (404, 413, 422):
        raise UserError(text.decode())
    if status != 200:
        raise RuntimeError(f"answered {status}: {text[:200]!r}")
    return text.decode("utf-8", "replace")


def _upload(folder: Path) -> None:
    request(_app(folder), "POST", "/search", (folder / "shop" / IMAGE).read_bytes())


def _thumbnail(folder: Path) -> None:
    gallery = _searchers(folder)[1]
    row = gallery.table["image"].to_pylist().index(IMAGE)
    request(_app(folder), "GET", f"/image/{row}")


class _Tags(HTMLParser):
    """Tags of a page with the names of their attributes, and its comments."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attributes]))

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")


def _shows_as_text(draw: Callable[[str], str], folder: Path) -> None:
    """Check that a page has the same tags for any name as for a harmless one, and shows the name."""
    name = (folder / "in" / "name.txt").read_bytes().decode()
    page, harmless_page = draw(name), draw(_HARMLESS)
    if _Tags(page).tags != _Tags(harmless_page).tags:
        raise RuntimeError("the name is part of the markup")
    if name.isprintable() and not name.isspace() and name not in _text_of(page):
        raise RuntimeError("the name is not shown")


def _text_of(page: str) -> str:
    class Text(HTMLParser):
        shown = ""

        def handle_data(self, data: str) -> None:
            self.shown += data

    text = Text()
    text.feed(page)
    return text.shown


def _report_page(folder: Path) -> None:
    report = json.loads((folder.parent / "originals" / "report.json").read_bytes())

    def draw(name: str) -> str:
        named = json.loads(json.dumps(report))
        for row in named["rows"]:
            row["name"] = row["notes"] = name
            if row["by_category"]:
                row["by_category"] = dict.fromkeys([name], next(iter(row["by_category"].values())))
        for query in named["sheet"]:
            query["product"] = name
            for results in query["results"].values():
                for hit in results:
                    hit["product"] = name
        changed = Report.model_validate(named)
        if "<script" in (text := draw_markdown(changed)) or "](" in text.replace("]\\(", ""):
            raise RuntimeError("the name is part of the markup of report.md")
        return draw_html(changed)

    _shows_as_text(draw, folder)


def _results_page(folder: Path) -> None:
    searchers, gallery = _searchers(folder)

    def draw(name: str) -> str:
        table = gallery.table
        for column in ("product", "category"):
            index = table.schema.get_field_index(column)
            table = table.set_column(index, column, pa.array([name] * len(table), pa.string()))
        hostile = Catalog(table, gallery.root)
        named = [replace(searcher, name=name, gallery=hostile) for searcher in searchers]
        app = make_app(named, GalleryImages([hostile]), _TOP)
        request(app, "GET", "/")
        return request(app, "POST", "/search", (folder / "shop" / IMAGE).read_bytes())

    _shows_as_text(draw, folder)


ROUTES: dict[str, Case] = {
    **{name: CASES[name] for name in ("calibrate", "student embed", "export onnx")},
    "ONNX Runtime": Case(partial(run_graphs, "onnxruntime-cpu", ("fp32",))),
    "catalog": Case(partial(_catalog, "folder", "shop"), "catalog"),
    "catalog csv": Case(partial(_catalog, "csv", "in/table.csv"), "catalog"),
    **{
        f"catalog {reader}": Case(partial(_catalog, reader, "in"), "catalog")
        for reader in ("folder", "images", "webdataset", "products10k", "aicrowd")
    },
    "embed the shop": Case(_embed, "embeddings"),
    "recipe": Case(_recipe, "catalog"),
    "teacher train": Case(_train_teacher),
    "upload": Case(_upload),
    "gallery image": Case(_thumbnail),
    "report page": Case(_report_page),
    "search page results": Case(_results_page),
    **command_routes(run_vpr),
}
