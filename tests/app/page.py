"""A search page that a server in this process serves, and a parser of its results."""

from __future__ import annotations

import http.client
import io
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image

from app.search_page.images import GalleryImages
from app.search_page.lookup import Searcher
from app.search_page.server import make_app
from app.search_page.upload_limits import ADDRESS, make_server
from vpr.data.catalog import Catalog

TOP = 5


@dataclass(frozen=True)
class Answer:
    status: int
    text: str
    data: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Site:
    """Page that a server in this process serves."""

    port: int
    searchers: Sequence[Any]
    gallery: Catalog
    embeddings: tuple[str, ...] = field(default=())

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> Answer:
        connection = http.client.HTTPConnection(ADDRESS, self.port, timeout=timeout)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
        connection.close()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, data.decode("utf-8", "replace"), data, headers)


@contextmanager
def serving(searchers: Sequence[Searcher], gallery: Catalog, embeddings: tuple[str, ...] = ()) -> Iterator[Site]:
    with socket.create_server((ADDRESS, 0)) as listener:
        server = make_server(make_app(searchers, GalleryImages([gallery]), TOP))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Site(listener.getsockname()[1], searchers, gallery, embeddings)
        finally:
            server.should_exit = True
            thread.join()


class Lists(HTMLParser):
    """Rows and scores of each model's list."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[int]] = []
        self.scores: list[list[float]] = []
        self.text = ""
        assert answer.status == 200, answer.text
        self.feed(answer.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "ol":
            self.rows.append([])
            self.scores.append([])
        if tag == "img":
            self.rows[-1].append(int((dict(attributes)["src"] or "").removeprefix("/image/")))

    def handle_data(self, data: str) -> None:
        self.text += data
        if rank := re.fullmatch(r"\d+\. (-?\d\.\d{3})", data):
            self.scores[-1].append(float(rank[1]))


def queries(catalog: Catalog) -> list[tuple[str, bytes]]:
    part = catalog.select(split="test", role="query")
    return [(part.table["image"][row].as_py(), part.path(row).read_bytes()) for row in range(len(part))]


def jpeg(side: int = 64) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()
