"""``vpr search serve``: a local page that searches by image with one or two models or galleries side by side.

``POST /embed`` answers with the embedding of an image as JSON. Requests write nothing to disk. An image is the request
body itself, because a form parser would spool its parts to files. It is decoded from memory, and gallery images are
addressed by row only. The query string has the box that was drawn on the image, and the filter. The page sends the
original file and a box, not a crop: a crop of the browser would be decoded and compressed in another way.
"""

import asyncio
import io
import re
import secrets
from collections.abc import Callable, Sequence
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
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.config import ServeConfig
from app.search_page.gallery_lookup import load_gallery_searchers
from app.search_page.images import GalleryImages
from app.search_page.lookup import Searcher, SearchResult, load_searchers
from app.search_page.results import describe_agreement, make_columns
from app.search_page.upload import MAX_FILTER, BadRequest, Upload, read_upload
from app.search_page.upload_limits import ADDRESS, UploadBudget, listen, make_server
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.gallery.store import InvalidCondition
from vpr.imaging.decode import ImageRejected
from vpr.imaging.formats import FORMATS

log = get_logger(__name__)

MAX_BYTES = 16 << 20
UPLOAD_SECONDS = 20
MAX_UPLOAD_MEMORY = 8 * MAX_BYTES  # bytes of all uploads; a request waits until enough is free
_TEMPLATES = Path(__file__).parent / "templates"
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_Result = TypeVar("_Result")


def serve(config: ServeConfig) -> None:
    """Serve the page until an interrupt.

    Raises:
        UserError: The port is taken, or a model, a gallery or a catalogue is invalid.
    """
    with listen(config.port) as listener:
        app = make_app(*_load(config), config.top)
        log.info(f"http://{ADDRESS}:{listener.getsockname()[1]}: open it in a browser, Ctrl-C stops the server")
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
            make_server(app).run(sockets=[listener])
    log.info("server stopped")


def _load(config: ServeConfig) -> tuple[Sequence[Searcher], GalleryImages]:
    if config.galleries:
        return load_gallery_searchers(config.models, config.galleries, config.catalogs, config.threshold, config.probes)
    searchers, gallery = load_searchers(
        config.models, config.catalog, config.split, config.embeddings, config.threshold
    )
    return searchers, GalleryImages([gallery])


def make_app(searchers: Sequence[Searcher], images: GalleryImages, top: int) -> ASGIApp:
    """Return the app: page, search, embeddings and gallery images, with the checks that every request passes."""
    page = _Page(searchers, images, top)
    app = Starlette(
        routes=[
            Route("/", page.show),
            Route("/search", page.search, methods=["POST"]),
            Route("/embed", page.embed, methods=["POST"]),
            Route("/image/{row}", page.image),
        ],
        middleware=[
            # The name of another site may resolve to this address (DNS rebinding); its pages must not read the gallery.
            Middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"], www_redirect=False),
            Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BYTES),
        ],
        exception_handlers={
            ImageRejected: _answer_rejected,
            BadRequest: _answer_bad_request,
            InvalidCondition: _answer_bad_request,
            UserError: _answer_failed,
            ClientDisconnect: _answer_disconnected,
        },
    )
    return _with_headers(app)


class _Page:
    def __init__(self, searchers: Sequence[Searcher], images: GalleryImages, top: int) -> None:
        self._searchers, self._images, self._top = searchers, images, top
        templates = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True)
        self._form, self._results = (templates.get_template(f"{name}.html") for name in ("search", "search-results"))
        # One image at a time bounds the memory, and concurrent searches cannot distort the displayed times.
        self._worker = ThreadPoolExecutor(1)
        self._budget = UploadBudget(MAX_UPLOAD_MEMORY)
        blank = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(blank, "WEBP")  # unlike PNG, WebP loads all readers of Pillow
        # Warm up: the first call of a thread is slower and would distort the first displayed times.
        self._worker.submit(self._search_all, Upload(blank.getvalue())).result()

    async def show(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = f"{_POLICY}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' blob: data:"
        limits = {"max_bytes": MAX_BYTES, "max_filter": MAX_FILTER}
        text = self._form.render(nonce=nonce, **await self._run_in_worker(self._describe_all), **limits)
        return HTMLResponse(text, headers={"content-security-policy": f"{policy}; connect-src 'self'"})

    async def search(self, request: Request) -> Response:
        results = await self._answer_upload(request, self._search_all)
        columns = make_columns(results)
        return HTMLResponse(self._results.render(columns=columns, agreement=describe_agreement(results)))

    async def embed(self, request: Request) -> Response:
        return JSONResponse({"models": await self._answer_upload(request, self._embed_all)})

    async def image(self, request: Request) -> Response:
        row = request.path_params["row"]
        if not re.fullmatch("[0-9]{1,9}", row) or int(row) >= len(self._images):
            raise HTTPException(404, "the gallery has no such row")
        try:
            data = await self._run_in_worker(lambda: self._images.thumbnail(int(row)))
        except ImageRejected as error:
            raise HTTPException(404, f"gallery image {row} cannot be shown: {error.reason}") from None
        return Response(data, media_type="image/webp")

    async def _answer_upload(self, request: Request, work: Callable[[Upload], _Result]) -> _Result:
        """Read the image, the box and the filter of a request, and return the work's result."""
        origin = f"http://{request.headers['host']}"
        if request.headers.get("origin", origin) != origin:
            raise HTTPException(403, "pages of other sites may not search here")
        # A slow upload only reserves memory for its declared bytes, so few other uploads wait for it.
        async with self._budget.reserve(_declared_size(request)):
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    data = await request.body()
            except TimeoutError:
                raise HTTPException(408, f"the upload took more than {UPLOAD_SECONDS} s: try again") from None
            upload = read_upload(data, request.query_params)
            return await self._run_in_worker(lambda: work(upload))

    async def _run_in_worker(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call)

    def _describe_all(self) -> dict[str, Any]:
        """Return the texts of the galleries, and the columns of all of them."""
        columns = {name: kind for searcher in self._searchers for name, kind in searcher.columns().items()}
        return {"galleries": [searcher.describe() for searcher in self._searchers], "columns": columns}

    def _search_all(self, upload: Upload) -> list[SearchResult]:
        return [searcher.search(upload, self._top) for searcher in self._searchers]

    def _embed_all(self, upload: Upload) -> list[dict[str, Any]]:
        return [
            {"name": searcher.name, "sha256": searcher.sha256, "embedding": searcher.embed(upload).tolist()}
            for searcher in (searcher.current() for searcher in self._searchers)
        ]


def _declared_size(request: Request) -> int:
    """Return the declared bytes of an upload, limited to the maximum; the maximum if it declares none."""
    length = request.headers.get("content-length", "")
    # A chunked body may have any length, even if the head declares one.
    is_declared = "transfer-encoding" not in request.headers and re.fullmatch("[0-9]{1,18}", length)
    return min(int(length), MAX_BYTES) if is_declared else MAX_BYTES


def _with_headers(app: ASGIApp) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await app(scope, receive, send_with_headers)

    return answer


# Coroutines, because Starlette runs plain functions in a thread.
async def _answer_rejected(_: Request, error: Exception) -> Response:
    assert isinstance(error, ImageRejected)
    return PlainTextResponse(f"{error.reason}. Choose another image ({', '.join(FORMATS)}).", status_code=422)


async def _answer_bad_request(_: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), status_code=400)


async def _answer_failed(_: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), status_code=500)


async def _answer_disconnected(_: Request, __: Exception) -> Response:
    return PlainTextResponse("the upload was interrupted", status_code=400)
