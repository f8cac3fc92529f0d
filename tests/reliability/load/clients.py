"""Clients of the search page with known answers: quick, slow and aborted uploads."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from app.search_page.upload_limits import ADDRESS

_ROW = re.compile(r'src="/image/(\d+)"')
_SCORE = re.compile(r"<b>\d+\. (-?\d\.\d{3})</b>")
_SCORE_TOLERANCE = 0.0011  # the page shows three digits
_PIECES, _PAUSE = 16, 0.25  # number of pieces of a slow upload, and seconds between them
_MAX_WAIT = 300.0  # seconds

Way = Literal["at once", "in chunks", "slowly", "then stalls", "then breaks off", "then leaves"]
Verdict = Literal["right", "lost", "mixed up", "wrong"]


@dataclass(frozen=True)
class Expected:
    """Correct answer.

    Attributes:
        status: HTTP status; 0 for a client that leaves before the answer.
        rows: Rows of the gallery, nearest first.
        scores: Cosines of the rows.
        text: Start of the text of an answer without rows.
    """

    status: int
    rows: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Upload:
    """Upload of a client.

    Attributes:
        kind: Name for the table.
        body: Body of the request.
        expected: Correct answer.
        way: Way to send it.
        size: Size in the header; None for the size of the body.
    """

    kind: str
    body: bytes
    expected: Expected
    way: Way = "at once"
    size: int | None = None


@dataclass(frozen=True)
class Outcome:
    """Answer to an upload.

    Attributes:
        kind: Kind of the upload.
        verdict: ``lost`` for no answer or another status, ``mixed up`` for the correct answer of another image.
        seconds: Time from the first byte sent to the last byte received.
        detail: Description of a wrong answer.
    """

    kind: str
    verdict: Verdict
    seconds: float
    detail: str = ""


def judge(upload: Upload, status: int, text: str, others: frozenset[tuple[int, ...]]) -> tuple[Verdict, str]:
    """Compare an answer with the expected one; ``others`` are the rows of the correct answers of all images."""
    expected = upload.expected
    if status != expected.status:
        return "lost", f"status {status}: {text[:200]}"
    if not expected.rows:
        return ("right", "") if text.startswith(expected.text) else ("wrong", text[:200])
    rows = tuple(map(int, _ROW.findall(text)))
    scores = tuple(map(float, _SCORE.findall(text)))
    if rows != expected.rows:
        return ("mixed up" if rows in others else "wrong"), f"expected rows {expected.rows}, got {rows}"
    is_close = len(scores) == len(rows) and all(
        abs(a - b) < _SCORE_TOLERANCE for a, b in zip(scores, expected.scores, strict=True)
    )
    return ("right", "") if is_close else ("wrong", f"expected scores {expected.scores}, got {scores}")


async def run_clients(port: int, plans: list[list[Upload]]) -> list[Outcome]:
    """Run all clients, each with its uploads one after another; they start together once all are connected."""
    others = frozenset(upload.expected.rows for plan in plans for upload in plan if upload.expected.rows)
    all_connected = asyncio.Barrier(len(plans))

    async def client(plan: list[Upload]) -> list[Outcome]:
        first = await _connect(port)
        await all_connected.wait()
        outcomes = [await _upload(first, plan[0], others)]
        for upload in plan[1:]:
            outcomes.append(await _upload(await _connect(port), upload, others))
        return outcomes

    return [outcome for of_client in await asyncio.gather(*map(client, plans)) for outcome in of_client]


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connect(port: int) -> Connection:
    return await asyncio.open_connection(ADDRESS, port)


async def _upload(connection: Connection, upload: Upload, others: frozenset[tuple[int, ...]]) -> Outcome:
    reader, writer = connection
    start = time.perf_counter()
    try:
        async with asyncio.timeout(_MAX_WAIT):
            sending = asyncio.create_task(_send(writer, upload))
            if upload.expected.status == 0:
                await sending
                return Outcome(upload.kind, "right", time.perf_counter() - start)
            answer = await reader.read()  # to the end: the request has "Connection: close"
            sending.cancel()
        head, _, text = answer.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        verdict, detail = judge(upload, int(status[1]) if status else 0, text.decode("utf-8", "replace"), others)
    except (OSError, TimeoutError) as error:
        verdict, detail = "lost", repr(error)
    finally:
        writer.close()
    return Outcome(upload.kind, verdict, time.perf_counter() - start, detail)


async def _send(writer: asyncio.StreamWriter, upload: Upload) -> None:
    with suppress(ConnectionError):  # a server that rejected an upload need not read all of it
        await _send_all(writer, upload)


async def _send_all(writer: asyncio.StreamWriter, upload: Upload) -> None:
    length = len(upload.body) if upload.size is None else upload.size
    length_header = "Transfer-Encoding: chunked" if upload.way == "in chunks" else f"Content-Length: {length}"
    writer.write(f"POST /search HTTP/1.1\r\nHost: {ADDRESS}\r\nConnection: close\r\n{length_header}\r\n\r\n".encode())
    half = upload.body[: len(upload.body) // 2]
    step = -(-len(upload.body) // _PIECES)
    pieces = [upload.body[start : start + step] for start in range(0, len(upload.body), step)]
    match upload.way:
        case "in chunks":
            for piece in pieces:
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            writer.write(b"0\r\n\r\n")
        case "slowly":
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(_PAUSE)
        case "then stalls":
            writer.write(half)
        case "then breaks off":
            writer.write(half)
            await writer.drain()
            _reset(writer)
        case "then leaves":
            writer.write(upload.body)
            await writer.drain()
            _reset(writer)
        case "at once":
            writer.write(upload.body)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Reset the connection and drop unsent data, as a killed process does."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
