"""Block and log every network access of Python beyond this machine.

Python imports ``sitecustomize`` from ``PYTHONPATH`` when it starts, so child processes are blocked too. An audit hook
cannot be removed. Each blocked attempt is added to the file ``NO_NETWORK_LOG``, since a library may hide the error.
pytest-socket blocks the pytest process only: it patches ``socket.socket`` there, and logs nothing.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import sys
from typing import Any

_RESOLVE = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
_SEND = ("socket.connect", "socket.sendto", "socket.sendmsg")


def _is_local(host: Any) -> bool:
    """Return whether a host is an address of this machine; a name needs a name server."""
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if host in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _block(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _RESOLVE:
        host = arguments[0][0] if event == "socket.getnameinfo" else arguments[0]
    elif event in _SEND and isinstance(arguments[1], tuple):  # a string is a socket in the file system
        host = arguments[1][0]
    else:
        return
    if not _is_local(host):
        with open(os.environ["NO_NETWORK_LOG"], "a", encoding="utf-8") as log:
            log.write(f"{event} {host}\n")
        raise OSError(errno.ENETUNREACH, f"no network here: {event} of {host} is blocked")


sys.addaudithook(_block)
