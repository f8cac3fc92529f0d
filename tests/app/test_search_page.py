from __future__ import annotations

import asyncio
import csv
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from starlette.requests import Request

from app.config import ServeConfig
from app.search_page import server as search_page
from app.search_page import upload_limits as http_limits
from app.search_page.lookup import load_searchers
from app.search_page.server import MAX_BYTES, serve
from app.search_page.upload_limits import ADDRESS, UploadBudget
from export.config import EmbedConfig, OnnxConfig
from export.embed import embed_catalog
from export.to_onnx import export_onnx
from tests.app.page import TOP, Lists, Site, jpeg, queries, serving
from tests.reliability.hostile.images import promised_png
from vpr.artifacts.card import Parent
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.config import SearchConfig
from vpr.retrieval.embeddings import load_embeddings
from vpr.retrieval.open_set import Probability
from vpr.retrieval.search_command import search_gallery
from vpr.retrieval.threshold_command import StoredThreshold


def path_of(catalog: Catalog) -> str:
    assert catalog.artifact is not None
    return str(catalog.artifact.path)


@pytest.fixture(scope="module")
def models(student_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    output = tmp_path_factory.mktemp("models") / "fp32"
    return str(student_artifact), str(export_onnx(OnnxConfig(str(student_artifact), str(output))))


@pytest.fixture(scope="module")
def site(models: tuple[str, str], catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("stored")
    stored = (str(folder / "student"), str(folder / "fp32"))
    with serving(*load_searchers(models, path_of(catalog), "test", stored), stored) as served:
        yield served


def test_results_equal_those_of_vpr_search(site: Site, catalog: Catalog, tmp_path: Path) -> None:
    for index, stored in enumerate(site.embeddings):
        output = tmp_path / f"{index}.csv"
        search_gallery(SearchConfig(stored, stored, output=str(output), k=TOP))
        expected: dict[str, list[dict[str, str]]] = {}
        with output.open(newline="") as stream:
            for row in csv.DictReader(stream):
                expected.setdefault(row["query"], []).append(row)
        for name, data in queries(catalog)[:6]:
            lists = Lists(site.request("POST", "/search", data))
            images = [site.gallery.table["image"][row].as_py() for row in lists.rows[index]]
            assert images == [row["image"] for row in expected[name]]
            assert lists.scores[index] == pytest.approx([float(row["score"]) for row in expected[name]], abs=6e-4)


def test_page_reports_the_agreement_of_two_lists(site: Site, catalog: Catalog) -> None:
    rotated = replace(site.searchers[1], vectors=np.roll(site.searchers[1].vectors, 1, axis=0), name="rotated")
    with serving([site.searchers[0], rotated], site.gallery) as other:
        answer = other.request("POST", "/search", queries(catalog)[0][1])
    lists = Lists(answer)
    both = set(lists.rows[0]) & set(lists.rows[1])
    assert lists.rows[0][0] != lists.rows[1][0]
    assert f"Different first images; {len(both)} of {TOP} are in both lists." in lists.text
    assert answer.text.count("only here") == 2 * (TOP - len(both))
    same = Lists(site.request("POST", "/search", queries(catalog)[0][1]))
    assert f"Same first image; {TOP} of {TOP} are in both lists." in same.text
    with serving(site.searchers[:1], site.gallery) as single:
        lists = Lists(single.request("POST", "/search", queries(catalog)[0][1]))
    assert len(lists.rows) == 1
    assert "only here" not in lists.text
    for step in ("decode + preprocess", "embed", "search"):
        assert re.search(rf"{re.escape(step)} \d+\.\d ms", lists.text)


def test_concurrent_clients_get_their_answers(site: Site, catalog: Catalog) -> None:
    images = [data for _, data in queries(catalog)]
    images = [images[n % len(images)] for n in range(20)] if len(images) < 20 else images[:20]
    expected = [Lists(site.request("POST", "/search", data)).rows for data in images]
    assert len({str(rows) for rows in expected}) > 10
    barrier = threading.Barrier(20)

    def search(data: bytes) -> list[list[int]]:
        barrier.wait()
        return Lists(site.request("POST", "/search", data)).rows

    with ThreadPoolExecutor(20) as clients:
        assert list(clients.map(search, images)) == expected


def test_embed_answers_with_the_vector_of_each_model(site: Site, catalog: Catalog) -> None:
    gallery = catalog.select(split="test", role="gallery")
    answer = site.request("POST", "/embed", gallery.path(2).read_bytes())
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    models = json.loads(answer.data)["models"]
    assert [model["name"] for model in models] == [searcher.name for searcher in site.searchers]
    for model, searcher, path in zip(models, site.searchers, site.embeddings, strict=True):
        assert model["sha256"] == load_embeddings(path).model.sha256 == searcher.sha256
        np.testing.assert_allclose(model["embedding"], searcher.vectors[2], atol=1e-5)
    assert site.request("POST", "/embed", b"text").status == 422
    assert site.request("POST", "/embed", jpeg(), {"Origin": "http://evil.example"}).status == 403
    assert site.request("GET", "/embed").status == 405


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "not an image"),
        (b"<!doctype html><script>alert(1)</script>", "not an image"),
        (jpeg()[:900], "truncated or broken image"),
        (promised_png(12_000, 8, 2), "12000x12000 pixels, more than 50000000"),
        (promised_png(50_000, 8, 2), "truncated or broken image (Image size (2500000000 pixels) exceeds limit"),
    ],
    ids=["empty", "text", "svg", "html", "truncated", "144 megapixels", "2500 megapixels"],
)
def test_unusable_upload_gives_one_line(site: Site, data: bytes, expected: str) -> None:
    answer = site.request("POST", "/search", data, {"Content-Type": "image/jpeg"})
    assert answer.status == 422
    assert answer.text.startswith(expected)
    assert "\n" not in answer.text
    assert answer.headers["content-type"].startswith("text/plain")


def test_form_is_not_an_image(site: Site) -> None:
    part = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' + jpeg() + b"\r\n--B--\r\n"
    answer = site.request("POST", "/search", part, {"Content-Type": "multipart/form-data; boundary=B"})
    assert (answer.status, answer.text.partition(".")[0]) == (422, "not an image")


@pytest.mark.parametrize("ranges", ["bytes=5-4", "bytes=0-9", "bytes=99999-", "bytes=0-0,2-2", "items=x"])
def test_ranges_are_ignored(site: Site, ranges: str) -> None:
    answer = site.request("GET", "/image/0", headers={"Range": ranges})
    assert (answer.status, answer.data) == (200, site.request("GET", "/image/0").data)


def test_head_has_the_length_of_get(site: Site) -> None:
    head, get = site.request("HEAD", "/image/0"), site.request("GET", "/image/0")
    assert (head.status, head.data, int(head.headers["content-length"])) == (200, b"", len(get.data))


def test_upload_that_waits_for_permission(site: Site) -> None:
    image = jpeg()
    with socket.create_connection((ADDRESS, site.port), timeout=10) as client:
        head = f"POST /search HTTP/1.1\r\nHost: {ADDRESS}\r\nContent-Length: {len(image)}\r\n"
        client.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 100 ")
        client.sendall(image)
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "head",
    ["GET /\N{EXTRATERRESTRIAL ALIEN} HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET / HTTP/1.1\r\n\r\n"],
    ids=["emoji", "no host"],
)
def test_broken_request_is_answered(site: Site, head: str) -> None:
    with socket.create_connection((ADDRESS, site.port), timeout=10) as client:
        client.sendall(head.encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert site.request("GET", "/").status == 200


def test_large_body_is_rejected_before_it_arrives(site: Site) -> None:
    with socket.create_connection((ADDRESS, site.port), timeout=10) as client:
        head = f"POST /search HTTP/1.1\r\nHost: {ADDRESS}\r\nContent-Length: {MAX_BYTES + 1}\r\n\r\n"
        client.sendall(head.encode() + b"a few bytes")
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_rejection_reaches_a_sending_client(site: Site) -> None:
    with socket.create_connection((ADDRESS, site.port), timeout=10) as client:
        head = (
            f"POST /search HTTP/1.1\r\nHost: {ADDRESS}\r\nConnection: close\r\nContent-Length: {MAX_BYTES + 1}\r\n\r\n"
        )
        client.sendall(head.encode() + bytes(1 << 20))
        time.sleep(0.3)
        client.sendall(bytes(1 << 20))
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert answer.endswith(b"Content Too Large")


def test_close_after_client_reset_raises_nothing() -> None:
    """The socket may be reset before the loop notices; nothing can be sent then."""
    client, server = socket.socketpair()

    async def close() -> bool:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=server)
        transport.write_eof = lambda: server.shutdown(99)  # type: ignore[method-assign]
        lingering = http_limits._Lingering(transport, loop)
        lingering.close()
        is_closing = lingering.is_closing()
        lingering.close()
        transport.abort()
        return is_closing

    with client:
        assert asyncio.run(close())


def test_endless_client_is_cut_off_after_its_answer(site: Site) -> None:
    with socket.create_connection((ADDRESS, site.port), timeout=10) as client:
        client.sendall(f"GET /absent HTTP/1.1\r\nHost: {ADDRESS}\r\nConnection: close\r\n\r\n".encode())
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 404 ")
        time.sleep(http_limits.LINGER_SECONDS + 0.5)
        with suppress(ConnectionError):
            client.sendall(b"more")
        time.sleep(0.2)
        with pytest.raises(ConnectionError):
            client.sendall(b"more")


def test_body_without_length_is_cut_off(site: Site) -> None:
    sent = 0
    with socket.create_connection((ADDRESS, site.port), timeout=10) as client:
        client.sendall(f"POST /search HTTP/1.1\r\nHost: {ADDRESS}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b"\0" * 0x10000 + b"\r\n"
        client.settimeout(0.001)
        answer = b""
        while not answer and sent < 4 * MAX_BYTES:
            client.settimeout(10)
            client.sendall(chunk)
            sent += 0x10000
            client.settimeout(0.001)
            try:
                answer = client.recv(4096)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent < 2 * MAX_BYTES


def test_stalled_or_interrupted_upload_ends(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_page, "UPLOAD_SECONDS", 0.2)
    head = f"POST /search HTTP/1.1\r\nHost: {ADDRESS}\r\nContent-Length: 99\r\n\r\n".encode()
    with socket.create_connection((ADDRESS, site.port), timeout=10) as client:
        client.sendall(head)
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")
    monkeypatch.undo()
    with socket.create_connection((ADDRESS, site.port), timeout=10) as client:
        client.sendall(head)
    assert site.request("POST", "/search", jpeg()).status == 200
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8000", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example:8000", 400),
        ("evil.example@127.0.0.1", 400),
        ("0.0.0.0", 400),
        ("", 400),
        ("[::1]:8000", 400),
        ("[", 400),
    ],
)
def test_only_local_host_names_are_answered(site: Site, host: str, status: int) -> None:
    for path in ("/", "/image/0"):
        assert site.request("GET", path, headers={"Host": host}).status == status


def test_pages_of_other_sites_may_not_search(site: Site) -> None:
    headers = {"Host": f"localhost:{site.port}", "Origin": f"http://localhost:{site.port}"}
    assert site.request("POST", "/search", jpeg(), headers).status == 200
    for origin in ("http://evil.example", "null", f"https://localhost:{site.port}", "http://localhost:1"):
        assert site.request("POST", "/search", jpeg(), {**headers, "Origin": origin}).status == 403


@pytest.mark.parametrize(
    "path",
    [
        *("/image/16", "/image/-1", "/image/1.5", "/image/x", "/image/" + "9" * 5000, "/image/%D9%A1"),
        *("/image/../../../etc/passwd", "/image/%2e%2e%2fcard.json", "/image//etc/passwd", "/image/0/../1"),
        *("/../etc/passwd", "//etc/passwd", "/benchmarks/templates/search.html", "/image/0%00", "/image/"),
    ],
)
def test_images_are_addressed_by_row_only(site: Site, path: str) -> None:
    assert len(site.gallery) == 16
    answer = site.request("GET", path)
    assert answer.status == 404
    assert "root:" not in answer.text


def test_gallery_images_are_small_new_files(site: Site, tmp_path: Path) -> None:
    plain = site.request("GET", "/image/3")
    assert plain.headers["content-type"] == "image/webp"
    Image.new("RGB", (3000, 500), "red").save(tmp_path / "large.jpg", exif=b"Exif\0\0secret")
    rows = [{**site.gallery.table.to_pylist()[0], "image": name} for name in ("large.jpg", "missing.jpg")]
    gallery = Catalog(pa.Table.from_pylist(rows, schema=site.gallery.table.schema), tmp_path)
    with serving(site.searchers, gallery) as other:
        large, missing = other.request("GET", "/image/0"), other.request("GET", "/image/1")
    assert Image.open(io.BytesIO(large.data)).size == (240, 40)
    assert b"secret" not in large.data
    assert (missing.status, missing.text) == (404, "gallery image 1 cannot be shown: No such file or directory")


def test_names_from_data_are_escaped(site: Site, catalog: Catalog) -> None:
    evil = '"><script>alert(1)</script>'
    column = pa.array([evil] * len(site.gallery))
    table = site.gallery.table
    for name in ("product", "category"):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    hostile = Catalog(table, site.gallery.root)
    named = [replace(searcher, name=evil, gallery=hostile) for searcher in site.searchers]
    with serving(named, hostile) as other:
        page, answer = other.request("GET", "/"), other.request("POST", "/search", queries(catalog)[0][1])
    lists = Lists(answer)
    assert "script" not in lists.tags
    assert lists.text.count(evil) == 2 * (2 * TOP + 1)
    assert evil not in page.text
    assert page.text.count("<script") == 1


def test_page_needs_no_network_and_its_policy_blocks_it(site: Site) -> None:
    first, second = site.request("GET", "/"), site.request("GET", "/")
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]+", first.text)
    assert not re.findall(r"//[a-z0-9-]+\.", first.text)
    policy = dict(part.strip().split(" ", 1) for part in first.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    nonces = [re.findall(r'nonce="([^"]+)"', answer.text) for answer in (first, second)]
    assert policy["script-src"] == policy["style-src"] == f"'nonce-{nonces[0][0]}'"
    assert len(set(nonces[0])) == 1
    assert nonces[0] != nonces[1]
    for path in ("/", "/image/0", "/nothing", "/image/99"):
        headers = site.request("GET", path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_connections_above_the_limit_get_503(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "MAX_CONNECTIONS", 16)
    with serving(site.searchers, site.gallery) as other:
        idle = [socket.create_connection((ADDRESS, other.port), timeout=10) for _ in range(16)]
        assert other.request("GET", "/").status == 503
        for connection in idle:
            connection.close()
        deadline = time.monotonic() + 10
        while (status := other.request("GET", "/").status) != 200:
            assert time.monotonic() < deadline, status


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /sea",
        b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\nGET /half-a-second-request",
        # Its answer comes before its body, which never ends.
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\nbytes",
    ],
    ids=["a head", "a second head", "the body of a rejected upload"],
)
def test_incomplete_request_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", 0.5)
    with socket.create_connection((ADDRESS, site.port), timeout=0.05) as client:
        client.sendall(sent)
        deadline = time.monotonic() + 10
        with suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() < deadline:
                client.send(b"x")  # more input does not keep the connection open
                with suppress(TimeoutError):
                    if not client.recv(1 << 16):
                        break
    assert time.monotonic() < deadline


def test_slow_uploads_do_not_block_others(site: Site) -> None:
    head = f"POST /search HTTP/1.1\r\nHost: {ADDRESS}\r\nContent-Length: 100000\r\n\r\n".encode()
    slow = [socket.create_connection((ADDRESS, site.port), timeout=10) for _ in range(40)]
    for client in slow:
        client.sendall(head + b"a few bytes")
    assert site.request("POST", "/search", jpeg(), timeout=search_page.UPLOAD_SECONDS / 4).status == 200
    for client in slow:
        client.close()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content-length": "1000"}, 1000),
        ({"content-length": str(10 * MAX_BYTES)}, MAX_BYTES),
        ({"content-length": "-1"}, MAX_BYTES),
        ({"transfer-encoding": "chunked"}, MAX_BYTES),
        ({"transfer-encoding": "chunked", "content-length": "5"}, MAX_BYTES),
    ],
)
def test_upload_reserves_its_declared_size(headers: dict[str, str], expected: int) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert search_page._declared_size(Request({"type": "http", "headers": raw})) == expected


def test_upload_budget_is_never_exceeded() -> None:
    reserved, peak = 0, 0

    async def hold(budget: UploadBudget, size: int) -> None:
        nonlocal reserved, peak
        async with budget.reserve(size):
            reserved += size
            peak = max(peak, reserved)
            await asyncio.sleep(0.001)
            reserved -= size

    async def all_at_once() -> None:
        budget = UploadBudget(100)
        holders = [asyncio.create_task(hold(budget, size)) for size in [60, 1, 100, 30, 41] * 20]
        holders[3].cancel()
        await asyncio.wait(holders, timeout=10)
        assert all(holder.done() for holder in holders)

    asyncio.run(all_at_once())
    assert 90 <= peak <= 100


def test_requests_write_no_file(site: Site, catalog: Catalog, tmp_path: Path) -> None:
    large = jpeg(2000)  # a form parser would spool this to a file
    assert len(large) > 2 << 20
    uploads = [data for _, data in queries(catalog)[:3]] + [large, jpeg()[:900], b"<html>"]
    site.request("POST", "/search", jpeg())  # warm up the imports of the first call
    written: list[object] = []
    is_recording = [True]

    def record_writes(event: str, values: tuple[object, ...]) -> None:
        if is_recording[0] and (
            (event == "open" and isinstance(values[1], str) and set("wax+") & set(values[1]))
            or (event == "open" and isinstance(values[2], int) and values[2] & 0o3)
            or event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "tempfile.mkstemp", "tempfile.mkdtemp")
        ):
            written.append((event, values))

    sys.addaudithook(record_writes)  # a hook cannot be removed
    for data in uploads:
        site.request("POST", "/search", data)
    for path in ("/", "/image/0", "/image/99", "/../../tmp/x"):
        site.request("GET", path)
    assert written == []
    (tmp_path / "seen").write_bytes(b"")  # shows that the hook records writes
    is_recording[0] = False
    assert len(written) == 1


def test_stored_embeddings_must_match_model_and_gallery(
    site: Site, models: tuple[str, str], catalog: Catalog, tmp_path: Path
) -> None:
    before = [Path(path, "card.json").read_bytes() for path in site.embeddings]
    again, gallery = load_searchers(models, path_of(catalog), "test", site.embeddings)
    assert [Path(path, "card.json").read_bytes() for path in site.embeddings] == before
    stored = load_embeddings(site.embeddings[0])
    np.testing.assert_array_equal(again[0].vectors, stored.vectors[stored.roles == "gallery"])
    fresh, _ = load_searchers(models[:1], path_of(catalog), "test", ())
    np.testing.assert_allclose(fresh[0].vectors, again[0].vectors, atol=1e-5)
    with pytest.raises(UserError, match="these embeddings are not of .*fp32"):
        load_searchers(models[1:], path_of(catalog), "test", site.embeddings[:1])
    with pytest.raises(UserError, match="these embeddings are of another gallery"):
        load_searchers(models[:1], path_of(catalog), "validation", site.embeddings[:1])
    with pytest.raises(UserError, match="split 'train' has no gallery images"):
        load_searchers(models[:1], path_of(catalog), "train", ())
    cut = str(embed_catalog(EmbedConfig(models[0], path_of(catalog), str(tmp_path / "cut"), "test", dimensions=8)))
    with pytest.raises(UserError, match=r"cut: 8 dimensions, .* gives 32\. Embed it without --dimensions"):
        load_searchers(models[:1], path_of(catalog), "test", (cut,))
    assert gallery.table.equals(site.gallery.table)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"models": ()}, "models: .*got 0"),
        ({"models": ("a", "b", "c")}, "models: .*got 3"),
        ({"models": ("a", "b"), "embeddings": ("e",)}, "embeddings: expected 2.*got 1"),
        ({"models": ("a",), "top": 0}, "top: .*got 0"),
        ({"models": ("a",), "port": 65536}, "port: .*got 65536"),
    ],
)
def test_invalid_serve_config_is_rejected(values: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        ServeConfig(**{"catalog": "c", **values})


def test_taken_port_is_reported(models: tuple[str, str], catalog: Catalog) -> None:
    with socket.create_server((ADDRESS, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port: cannot listen on {port} \(Address already in use\). Pass another --port"
        ):
            serve(ServeConfig(models, path_of(catalog), port=port))


def test_command_prints_its_address_and_stops_on_interrupt(models: tuple[str, str], catalog: Catalog) -> None:
    arguments = ["search", "serve", "--models", models[1], "--catalog", path_of(catalog), "--port", "0"]
    process = subprocess.Popen([sys.executable, "-m", "vpr", *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("http://"):
            break
    address = re.match(r"http://127\.0\.0\.1:(\d+): open it in a browser", lines[-1])
    assert address, lines
    connection = http.client.HTTPConnection(ADDRESS, int(address[1]), timeout=30)  # kept open, as a browser would
    connection.request("GET", "/")
    assert re.search(r">fp32 \(\S+\): \d+ gallery images", connection.getresponse().read().decode())
    upload = socket.create_connection((ADDRESS, int(address[1])))  # one that is not done
    upload.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\nabc")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[1]
    assert (process.returncode, rest) == (0, "server stopped\n")
    connection.close()
    upload.close()


def test_page_says_whether_there_is_a_match(site: Site) -> None:
    """The probability is .5 for every image, so one threshold answers and the other does not."""
    even = Probability(0.0, 0.0, 0.0)
    values = {"accepts": 0.5, "rejects": 0.51}
    searchers = [
        replace(searcher, name=name, threshold=StoredThreshold("probability", value, even, 1))
        for searcher, (name, value) in zip(site.searchers, values.items(), strict=True)
    ]
    with serving(searchers, site.gallery) as served:
        answer = served.request("POST", "/search", site.gallery.path(0).read_bytes())
    accepted, rejected = answer.text.split("<h2>rejects</h2>")
    assert '<p class="match">Match (probability 0.50)</p>' in accepted
    assert '<p class="no-match">No match: the nearest images are below the threshold (probability 0.50)</p>' in rejected
    assert [len(rows) for rows in Lists(answer).rows] == [TOP, TOP]
    plain = site.request("POST", "/search", site.gallery.path(0).read_bytes())
    assert "atch (probability" not in plain.text


def test_threshold_of_another_model_is_rejected(models: tuple[str, str], catalog: Catalog, tmp_path: Path) -> None:
    parents = [Parent(role="model", name="other", sha256="0")]
    with write_artifact(tmp_path / "threshold", "threshold", {}, parents) as draft:
        (draft.path / "threshold.json").write_text("{}")
    with pytest.raises(UserError, match="threshold: .* is of model 'other'"):
        load_searchers(models[:1], path_of(catalog), "test", (), (str(tmp_path / "threshold"),))
    with pytest.raises(UserError, match="threshold: expected 2, one for each model"):
        ServeConfig(models, "c", threshold=("a",))
