"""Clients of the search page that know their answers: quick and slow ones, and those whose uploads break off."""

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
_NEAR = 0.0011  # of scores that are shown with three digits
_PIECES, _PAUSE = 16, 0.25  # of a slow upload: how many, and seconds between
_PATIENCE = 300.0

Way = Literal["at once", "in chunks", "slowly", "then stalls", "then breaks off", "then leaves"]
Verdict = Literal["right", "lost", "mixed up", "wrong"]


@dataclass(frozen=True)
class Expected:
    """A right answer.

    Attributes:
        status: of HTTP; 0 where the client leaves before there is one.
        rows: of the gallery, nearest first.
        scores: their cosines.
        said: what the text begins with, where there are no rows.
    """

    status: int
    rows: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    said: str = ""


@dataclass(frozen=True)
class Upload:
    """What a client sends.

    Attributes:
        kind: name, for the table.
        body: of the request.
        expected: known before it is sent.
        way: how it is sent.
        size: that its head says it has; None is that of the body.
    """

    kind: str
    body: bytes
    expected: Expected
    way: Way = "at once"
    size: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a client got.

    Attributes:
        kind: of the upload.
        verdict: ``lost`` is no answer or one of another status, ``mixed up`` the right one of another image.
        seconds: from the first byte sent to the last one received.
        detail: of what is not right.
    """

    kind: str
    verdict: Verdict
    seconds: float
    detail: str = ""


def judge(upload: Upload, status: int, text: str, others: frozenset[tuple[int, ...]]) -> tuple[Verdict, str]:
    """Compare an answer with what was expected; ``others`` are the rows of all images' right answers."""
    expected = upload.expected
    if status != expected.status:
        return "lost", f"status {status}: {text[:200]}"
    if not expected.rows:
        return ("right", "") if text.startswith(expected.said) else ("wrong", text[:200])
    rows = tuple(map(int, _ROW.findall(text)))
    scores = tuple(map(float, _SCORE.findall(text)))
    if rows != expected.rows:
        return ("mixed up" if rows in others else "wrong"), f"rows {rows} where {expected.rows} are right"
    near = len(scores) == len(rows) and all(abs(a - b) < _NEAR for a, b in zip(scores, expected.scores, strict=True))
    return ("right", "") if near else ("wrong", f"scores {scores} where {expected.scores} are right")


async def run_clients(port: int, plans: list[list[Upload]]) -> list[Outcome]:
    """Each client does its uploads one after the other; all begin together, when every one is connected."""
    others = frozenset(upload.expected.rows for plan in plans for upload in plan if upload.expected.rows)
    together = asyncio.Barrier(len(plans))

    async def client(plan: list[Upload]) -> list[Outcome]:
        first = await _connect(port)
        await together.wait()
        outcomes = [await _ask(first, plan[0], others)]
        for upload in plan[1:]:
            outcomes.append(await _ask(await _connect(port), upload, others))
        return outcomes

    return [outcome for some in await asyncio.gather(*map(client, plans)) for outcome in some]


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connect(port: int) -> Ends:
    return await asyncio.open_connection(ADDRESS, port)


async def _ask(ends: Ends, upload: Upload, others: frozenset[tuple[int, ...]]) -> Outcome:
    reader, writer = ends
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(_PATIENCE):
            sending = asyncio.create_task(_send(writer, upload))
            if upload.expected.status == 0:
                await sending
                return Outcome(upload.kind, "right", time.perf_counter() - begun)
            answer = await reader.read()  # to the end: the head asks for it
            sending.cancel()
        head, _, text = answer.partition(b"\r\n\r\n")
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        verdict, detail = judge(upload, int(found[1]) if found else 0, text.decode("utf-8", "replace"), others)
    except (OSError, TimeoutError) as error:
        verdict, detail = "lost", repr(error)
    finally:
        writer.close()
    return Outcome(upload.kind, verdict, time.perf_counter() - begun, detail)


async def _send(writer: asyncio.StreamWriter, upload: Upload) -> None:
    with suppress(ConnectionError):  # who has refused an upload need not take all of it
        await _send_all(writer, upload)


async def _send_all(writer: asyncio.StreamWriter, upload: Upload) -> None:
    length = len(upload.body) if upload.size is None else upload.size
    told = "Transfer-Encoding: chunked" if upload.way == "in chunks" else f"Content-Length: {length}"
    writer.write(f"POST /search HTTP/1.1\r\nHost: {ADDRESS}\r\nConnection: close\r\n{told}\r\n\r\n".encode())
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
    """End the connection as a process that is killed does: by a reset, with whatever was not yet sent."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
