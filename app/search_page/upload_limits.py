"""The HTTP server of a page on this machine, and what it lets clients have of it: connections, time, memory."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from vpr.common.errors import UserError

ADDRESS = "127.0.0.1"
CONNECTIONS = 256  # more are answered 503
LINGER_SECONDS = 2.0  # that a client is read, and not heard, after its last answer
HEAD_SECONDS = 10.0  # from a connection's first moment, or its last answer, to a whole request head


def listen(port: int) -> socket.socket:
    """A socket of this machine alone; :class:`UserError` where the port is taken. 0 takes a free one."""
    try:
        return socket.create_server((ADDRESS, port))
    except OSError as error:
        raise UserError(
            f"port: {port}: {os.strerror(error.errno or 0)}: choose another with --port, or 0 for a free one"
        ) from None


def make_server(app: ASGIApp) -> uvicorn.Server:
    """The HTTP server, with its limits."""
    logging.getLogger("uvicorn.error").addFilter(_is_fault)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=2,
        )
    )


def _is_fault(record: logging.LogRecord) -> bool:
    """Whether an error that uvicorn logs is one: that requests are left when the server is ended is none."""
    cancelled = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cancelled and not str(record.msg).startswith("Cancel %s running task(s)")


class _Lingering:
    """A transport that is closed in two steps, so that the last answer arrives (RFC 9112, 9.6).

    A socket that is closed while the rest of an upload lies unread in it resets its connection, and a reset takes back
    an answer that the client has not read yet: the word that its upload is too large.

    Args:
        transport: of the connection.
        loop: that it runs in.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Say that nothing follows, and wait for the client to close, or for some seconds."""
        if not self.is_closing():
            self.lingers = True
            self._loop.call_later(LINGER_SECONDS, self._transport.abort)
            with suppress(OSError):  # the client has left, which the loop has not been told yet
                self._transport.write_eof()
            self._transport.resume_reading()


class Connection(H11Protocol):
    """A connection that is closed when no whole request comes: uvicorn would wait for ever for the rest of one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request is awaited from now on."""
        self._limit = self.loop.call_later(HEAD_SECONDS, self._close_idle)
        super().connection_made(transport)
        self._ending = _Lingering(transport, self.loop)
        self.transport = self._ending  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """A part of a request, or what is sent after the last one."""
        if not self._ending.lingers:
            super().data_received(data)

    def on_response_complete(self) -> None:
        """The next request is awaited from now on."""
        self._limit.cancel()
        self._limit = self.loop.call_later(HEAD_SECONDS, self._close_idle)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._limit.cancel()
        super().connection_lost(exc)

    def _close_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()  # also where the answer is not taken


class UploadBudget:
    """Bytes of memory that uploads share."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Hold so many of them, once they are there."""
        async with self._freed:
            await self._freed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            async with self._freed:
                self._left += size
                self._freed.notify_all()
