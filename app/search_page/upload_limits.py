"""HTTP server of the local page, with limits on connections, time and memory."""

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
MAX_CONNECTIONS = 256  # further connections get status 503
LINGER_SECONDS = 2.0  # input is read and discarded for this time after the last answer
HEAD_SECONDS = 10.0  # from the start of a connection, or its last answer, to a complete request head


def listen(port: int) -> socket.socket:
    """Return a socket that only this machine can reach; :class:`UserError` if the port is taken. 0 takes a free one."""
    try:
        return socket.create_server((ADDRESS, port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"port: cannot listen on {port} ({reason}). Pass another --port; 0 takes a free one.") from None


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Return the HTTP server with its limits."""
    logging.getLogger("uvicorn.error").addFilter(_is_failure)
    limits: dict[str, Any] = {"limit_concurrency": MAX_CONNECTIONS, "timeout_graceful_shutdown": 2}
    quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    return uvicorn.Server(uvicorn.Config(app, http=Connection, ws="none", lifespan="off", **quiet, **limits))


def _is_failure(record: logging.LogRecord) -> bool:
    """Return whether a log record is a failure; requests that are cancelled by the shutdown are none."""
    cancelled = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cancelled and not str(record.msg).startswith("Cancel %s running task(s)")


class _Lingering:
    """Transport that closes in two steps, so that the last answer arrives (RFC 9112, 9.6).

    Closing a socket with unread input resets the connection. A reset discards an answer that the client has not read
    yet, such as the answer that its upload is too large.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self.is_lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.is_lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close the sending side, and the connection when the client closes or after some seconds."""
        if not self.is_closing():
            self.is_lingering = True
            self._loop.call_later(LINGER_SECONDS, self._transport.abort)
            with suppress(OSError):  # the client is gone, and the loop has not noticed yet
                self._transport.write_eof()
            self._transport.resume_reading()


class Connection(H11Protocol):
    """Connection with a time limit for a request head, which uvicorn would await for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request."""
        self._timeout = self.loop.call_later(HEAD_SECONDS, self._close_idle)
        super().connection_made(transport)
        self._ending = _Lingering(transport, self.loop)
        self.transport = self._ending  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Handle input; discard it after the last answer."""
        if not self._ending.is_lingering:
            super().data_received(data)

    def on_response_complete(self) -> None:
        """Start the time limit of the next request."""
        self._timeout.cancel()
        self._timeout = self.loop.call_later(HEAD_SECONDS, self._close_idle)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time limit."""
        self._timeout.cancel()
        super().connection_lost(exc)

    def _close_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()  # even if the client does not read the answer


class UploadBudget:
    """Memory in bytes that uploads share."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Reserve bytes, and wait until they are free."""
        async with self._freed:
            await self._freed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            async with self._freed:
                self._free += size
                self._freed.notify_all()
