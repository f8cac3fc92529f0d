"""The roads that hostile input takes: commands as they are typed, the search page, the report, a gallery's image.

All are run in the folder of a case, which :mod:`tests.reliability.hostile.worker` lays out.
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

from app.search_page.lookup import Searcher, load_searchers
from app.search_page.server import ADDRESS, make_app
from benchmarks.config import ReportConfig
from benchmarks.report.build import build_report
from benchmarks.report.render import draw_html, draw_markdown
from benchmarks.report.schema import Report
from student.embed import embed_catalog
from tests.reliability.commands import COMMAND_CASES, RESULT, CommandCase, make_student, run_once
from vpr.artifacts.store import load_artifact
from vpr.cli import main
from vpr.common.errors import OUT_OF_MEMORY, UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.config import EmbedConfig

IMAGE = "2/0.png"  # of the shop's gallery: a hostile one takes its place
IMAGE_ROADS = ("catalog", "embed the shop", "upload", "gallery image")
_LINE = "vpr: error: "
_HARMLESS = "chair"
_TOP = 3


class SetAside(Exception):
    """A catalogue was made, without what was given; the message is the reason that it lists."""


def make_originals(folder: Path, shop: Path) -> None:
    """Artifacts, the shop's images and its catalogue, and a report to put names into.

    Args:
        folder: where they are written.
        shop: where the images of the shop will lie in every case.
    """
    make_student(folder, shop)
    student, catalog = str(folder / "student"), str(folder / "catalog")
    embed_catalog(EmbedConfig(student, catalog, str(folder / "embeddings")))
    drawn = build_report(ReportConfig(catalog, (student,), str(folder / "drawn"), seconds=0.02, sheet_queries=2))
    (folder / "report.json").write_bytes((drawn / "report.json").read_bytes())
    shop.rename(folder / "images")


def command(*arguments: str) -> None:
    """Run a command as it is typed.

    Raises:
        UserError: it ended with 2 and one line.
        RuntimeError: it ended with anything else, or for lack of memory.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            main(arguments)
    except SystemExit as ended:
        lines = [line for line in said.getvalue().splitlines() if line.startswith("vpr: ")]
        if ended.code != 2 or len(lines) != 1 or not lines[0].startswith(_LINE):
            raise RuntimeError(f"exit status {ended.code} after {said.getvalue()[-500:]!r}") from None
        if OUT_OF_MEMORY in lines[0]:  # what was given has made it ask for more than there is
            raise RuntimeError(lines[0]) from None
        raise UserError(lines[0].removeprefix(_LINE)) from None


def _catalog(reader: str, root: str, folder: Path) -> None:
    """Import what lies in the folder, and say so where something was set aside."""
    result = folder / RESULT
    command(
        *("catalog", "--reader", reader, "--root", str(folder / root), "--output", str(result)),
        "--skip-unreadable",
    )
    if load_artifact(result).card.metrics["set_aside"]:
        raise SetAside((result / "set_aside.csv").read_text(encoding="utf-8").splitlines()[-1])


def _embed(folder: Path) -> None:
    paths = {"model": "student", "catalog": "catalog", "output": RESULT}
    command("student", "embed", *(word for key, name in paths.items() for word in (f"--{key}", str(folder / name))))


def _recipe(folder: Path) -> None:
    command("catalog", "--recipe", str(folder / "in" / "recipe.yaml"), "--output", str(folder / RESULT))


def _teach(folder: Path) -> None:
    command(
        *("teacher", "train", "--catalog", str(folder / "catalog"), "--output", str(folder / RESULT)),
        *("--tower.name", str(folder / "in" / "tower.json"), "--tower.pretrained", "", "--loader.batch-size", "4"),
        *("--stages", "{train: all, epochs: 1}"),
    )


@cache
def _searchers(folder: Path) -> tuple[list[Searcher], Catalog]:
    """The model and its gallery, embedded once, when the shop's images are still those that it was built from."""
    return load_searchers((str(folder / "student"),), str(folder / "catalog"), "", ())


@cache
def _app(folder: Path) -> Any:
    return make_app(*_searchers(folder), _TOP)


def warm_up(folder: Path) -> None:
    """Open the search page."""
    _app(folder)


def ask(app: Any, method: str, path: str, body: bytes = b"") -> str:
    """What the page answers; :class:`UserError` with its line where it refuses, RuntimeError where it fails."""
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
    ask(_app(folder), "POST", "/search", (folder / "shop" / IMAGE).read_bytes())


def _thumbnail(folder: Path) -> None:
    gallery = _searchers(folder)[1]
    row = gallery.table["image"].to_pylist().index(IMAGE)
    ask(_app(folder), "GET", f"/image/{row}")


class _Marks(HTMLParser):
    """The tags of a page with the names of their attributes, and what its scripts say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attributes]))

    def handle_comment(self, data: str) -> None:
        self.found.append("comment")


def _shows_as_text(draw: Callable[[str], str], folder: Path) -> None:
    """A page may have no other tags for any name than it has for a harmless one."""
    name = (folder / "in" / "name.txt").read_bytes().decode()
    drawn, harmless = draw(name), draw(_HARMLESS)
    if _Marks(drawn).found != _Marks(harmless).found:
        raise RuntimeError("the name has become a part of the page")
    if name.isprintable() and not name.isspace() and name not in _text_of(drawn):
        raise RuntimeError("the name is not shown")


def _text_of(page: str) -> str:
    class Text(HTMLParser):
        said = ""

        def handle_data(self, data: str) -> None:
            self.said += data

    text = Text()
    text.feed(page)
    return text.said


def _report_page(folder: Path) -> None:
    measured = json.loads((folder.parent / "originals" / "report.json").read_bytes())

    def draw(name: str) -> str:
        named = json.loads(json.dumps(measured))
        for row in named["rows"]:
            row["name"] = row["notes"] = name
            if row["by_category"]:
                row["by_category"] = dict.fromkeys([name], next(iter(row["by_category"].values())))
        for query in named["sheet"]:
            query["product"] = name
            for results in query["results"].values():
                for hit in results:
                    hit["product"] = name
        report = Report.model_validate(named)
        if "<script" in (text := draw_markdown(report)) or "](" in text.replace("]\\(", ""):
            raise RuntimeError("the name has become a part of report.md")
        return draw_html(report)

    _shows_as_text(draw, folder)


def _results_page(folder: Path) -> None:
    searchers, gallery = _searchers(folder)

    def draw(name: str) -> str:
        table = gallery.table
        for column in ("product", "category"):
            place = table.schema.get_field_index(column)
            table = table.set_column(place, column, pa.array([name] * len(table), pa.string()))
        named = [replace(one, name=name) for one in searchers]
        app = make_app(named, Catalog(table, gallery.root), _TOP)
        ask(app, "GET", "/")
        return ask(app, "POST", "/search", (folder / "shop" / IMAGE).read_bytes())

    _shows_as_text(draw, folder)


ROADS: dict[str, CommandCase] = {
    **{name: COMMAND_CASES[name] for name in ("calibrate", "student embed", "export onnx")},
    "run by ONNX Runtime": CommandCase(lambda folder: run_once(folder / "fp32", "onnxruntime-cpu")),
    "catalog": CommandCase(partial(_catalog, "folder", "shop"), "catalog"),
    "catalog csv": CommandCase(partial(_catalog, "csv", "in/table.csv"), "catalog"),
    **{
        f"catalog {reader}": CommandCase(partial(_catalog, reader, "in"), "catalog")
        for reader in ("folder", "images", "webdataset", "products10k", "aicrowd")
    },
    "embed the shop": CommandCase(_embed, "embeddings"),
    "recipe": CommandCase(_recipe, "catalog"),
    "teacher train": CommandCase(_teach),
    "upload": CommandCase(_upload),
    "gallery image": CommandCase(_thumbnail),
    "report page": CommandCase(_report_page),
    "search page results": CommandCase(_results_page),
}
