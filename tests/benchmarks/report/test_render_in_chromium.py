"""The page in a browser: ``apt-get install chromium`` (or any Chromium or Chrome on the PATH)."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class _Table(HTMLParser):
    """Texts of the cells of the table ``models``, and the sort order of each heading."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sorted: list[str | None] = []
        self._inside = self._cell = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "table":
            self._inside = values.get("id") == "models"
        self._cell = self._inside and tag == "td"
        if self._inside and tag == "th":
            self.sorted.append(values.get("aria-sort"))
        if self._inside and tag == "tr":
            self.rows.append([])
        if self._cell:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "td"


@pytest.fixture(scope="module")
def chromium() -> str:
    browser = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    return browser


def _open(chromium: str, address: str, folder: Path) -> tuple[str, list[str]]:
    """Return the rendered document and the lines of the console."""
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    base = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *quiet]
    command = [*base, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _table(document: str) -> _Table:
    table = _Table()
    table.feed(document)
    table.rows = [row for row in table.rows if row]
    return table


def test_page_renders_and_sorts_by_a_heading(chromium: str, report_artifact: Path, tmp_path: Path) -> None:
    page = (report_artifact / "report.html").resolve().as_uri()
    document, errors = _open(chromium, page, tmp_path)
    assert errors == []
    assert document.count("<svg") == 6
    plain = _table(document)
    assert [row[0] for row in plain.rows] == [str(number) for number in range(1, 8)]
    assert set(plain.sorted) == {None}
    headings = re.findall(r"<button>([^<]+)</button>", document)
    size = headings.index("MB")
    # The address clicks the heading like a person: once for descending, twice for ascending.
    for order, clicks in (("descending", "down"), ("ascending", "up")):
        document, errors = _open(chromium, f"{page}#sort=models.{size}.{clicks}", tmp_path)
        assert errors == []
        table = _table(document)
        assert table.sorted[size] == order
        values = [row[size] for row in table.rows]
        known = [float(value) for value in values if value != "–"]
        assert known == sorted(known, reverse=order == "descending")
        assert len(set(known)) > 1
        assert values[len(known) :] == ["–", "–"]  # the baselines have no size
        assert sorted(row[0] for row in table.rows) == sorted(row[0] for row in plain.rows)


def test_policy_blocks_an_unescaped_script(chromium: str, report_artifact: Path, tmp_path: Path) -> None:
    """It also shows that these tests see the console of the page."""
    text = (report_artifact / "report.html").read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<h1>", "<script>document.title = 'taken'</script><h1>"), encoding="utf-8")
    document, errors = _open(chromium, broken.as_uri(), tmp_path)
    assert "<title>taken" not in document
    assert any("Content Security Policy" in line for line in errors)
