"""``vpr search serve``: a page on this machine that looks an image up with one or two models side by side.

Nothing of a request reaches the disk: an image comes as the body itself (no form, whose parts would be spooled to
files), is decoded from memory, and gallery images are asked for by row alone.
"""

from __future__ import annotations

import asyncio
import io
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.config import ServeConfig
from app.search_page.lookup import Searcher, SearchResult, agreement, load_searchers
from app.search_page.upload_limits import ADDRESS, UploadBudget, listen, make_server
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.imaging.decode import FORMATS, ImageRejected, decode

log = get_logger(__name__)

MAX_BYTES = 16 << 20
UPLOAD_SECONDS = 20
ROOM = 8 * MAX_BYTES  # of all uploads in memory; who finds too little left waits
_THUMBNAIL = 240  # pixels, either side at most
_TEMPLATES = Path(__file__).parent / "templates"
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_Answer = TypeVar("_Answer")


def serve(config: ServeConfig) -> None:
    """Serve the page until it is interrupted.

    Raises:
        UserError: the port is taken, or what :func:`load_searchers` finds wrong.
    """
    with listen(config.port) as listener:
        searchers, gallery = load_searchers(config.models, config.catalog, config.split, config.embeddings)
        app = make_app(searchers, gallery, config.top)
        log.info(f"http://{ADDRESS}:{listener.getsockname()[1]}: open it in a browser, Ctrl-C ends it")
        with suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
            make_server(app).run(sockets=[listener])
    log.info("ended")


def make_app(searchers: list[Searcher], gallery: Catalog, top: int) -> ASGIApp:
    """The page, its search and the gallery's images, behind the checks that every request passes."""
    page = _Page(searchers, gallery, min(top, len(gallery)))
    app = Starlette(
        routes=[
            Route("/", page.show),
            Route("/search", page.search, methods=["POST"]),
            Route("/image/{row}", page.image),
        ],
        middleware=[
            # Another site's name may be pointed at this address; its pages must not read the gallery.
            Middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"], www_redirect=False),
            Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BYTES),
        ],
        exception_handlers={ImageRejected: _refused, UserError: _failed, ClientDisconnect: _gone},
    )
    return _with_headers(app)


class _Page:
    def __init__(self, searchers: list[Searcher], gallery: Catalog, top: int) -> None:
        self._searchers, self._gallery, self._top = searchers, gallery, top
        templates = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True)
        self._form, self._results = (templates.get_template(f"{name}.html") for name in ("search", "search-results"))
        # One image at a time: memory stays bounded, and no time shown is that of two searches at once.
        self._worker = ThreadPoolExecutor(1)
        self._room = UploadBudget(ROOM)
        blank = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(blank, "WEBP")  # loads every reader of Pillow, as a PNG does not
        # What a thread does at its first call only would otherwise stand in the first times shown.
        self._worker.submit(self._look_up, blank.getvalue()).result()

    async def show(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = f"{_POLICY}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' blob: data:"
        names = [searcher.name for searcher in self._searchers]
        text = self._form.render(nonce=nonce, models=names, gallery=len(self._gallery), max_bytes=MAX_BYTES)
        return HTMLResponse(text, headers={"content-security-policy": f"{policy}; connect-src 'self'"})

    async def search(self, request: Request) -> Response:
        own = f"http://{request.headers['host']}"
        if request.headers.get("origin", own) != own:
            raise HTTPException(403, "another site's page may not search here")
        # A slow upload holds the room of its own bytes alone, so that it keeps few others waiting.
        async with self._room.take(_size_said(request)):
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    data = await request.body()
            except TimeoutError:
                raise HTTPException(408, f"the upload took more than {UPLOAD_SECONDS} s: try again") from None
            found = await self._work(lambda: self._look_up(data))
        columns = [self._column(place, found) for place in range(len(found))]
        return HTMLResponse(self._results.render(columns=columns, agreement=agreement(found)))

    async def image(self, request: Request) -> Response:
        row = request.path_params["row"]
        if not re.fullmatch("[0-9]{1,9}", row) or int(row) >= len(self._gallery):
            raise HTTPException(404, "the gallery has no such row")
        return Response(await self._work(lambda: self._thumbnail(int(row))), media_type="image/webp")

    async def _work(self, call: Callable[[], _Answer]) -> _Answer:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call)

    def _look_up(self, data: bytes) -> list[SearchResult]:
        return [one.search_bytes(data, self._top) for one in self._searchers]

    def _thumbnail(self, row: int) -> bytes:
        try:
            image = decode(self._gallery.path(row), self._gallery.box(row), _THUMBNAIL)
        except ImageRejected as error:
            raise HTTPException(404, f"gallery image {row} cannot be shown: {error.reason}") from None
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=80)
        return stream.getvalue()

    def _column(self, place: int, found: list[SearchResult]) -> dict[str, Any]:
        others = [one.rows.tolist() for number, one in enumerate(found) if number != place]
        hits = [
            {
                "row": row,
                "product": self._gallery.products[row],
                "category": self._gallery.categories[row],
                "score": score,
                # Its places in the other lists: none, one, or None where there is no other list.
                "elsewhere": [other.index(row) + 1 for other in others if row in other] if others else None,
            }
            for row, score in zip(found[place].rows.tolist(), found[place].scores.tolist(), strict=True)
        ]
        return {"name": self._searchers[place].name, "milliseconds": found[place].milliseconds, "hits": hits}


def _size_said(request: Request) -> int:
    """Bytes that an upload says it has; where it does not, all that is allowed, as more is cut off."""
    said = request.headers.get("content-length", "")
    # In pieces a body may have any length, whatever else the head says.
    whole = "transfer-encoding" not in request.headers and re.fullmatch("[0-9]{1,18}", said)
    return min(int(said), MAX_BYTES) if whole else MAX_BYTES


def _with_headers(app: ASGIApp) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await app(scope, receive, send_guarded)

    return answer


# As coroutines, these answer without a thread of their own.
async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ImageRejected)
    return PlainTextResponse(f"{error.reason}: choose another image ({', '.join(FORMATS)})", status_code=422)


async def _failed(_: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), status_code=500)


async def _gone(_: Request, __: Exception) -> Response:
    return PlainTextResponse("the upload broke off", status_code=400)
