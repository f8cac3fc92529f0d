"""With this folder on ``PYTHONPATH``, Python reaches this machine alone: any other address is refused and written down.

Python imports ``sitecustomize`` when it starts, so a process's own children are held to it too. Audit hooks cannot be
taken off again. What is refused is added to the file ``NO_NETWORK_LOG``, since a library may pass over the error.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import sys
from typing import Any

_RESOLVE = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
_SEND = ("socket.connect", "socket.sendto", "socket.sendmsg")


def _is_here(host: Any) -> bool:
    """Whether a host is this machine by its own addresses; a name would have to be asked for."""
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if host in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _RESOLVE:
        host = arguments[0][0] if event == "socket.getnameinfo" else arguments[0]
    elif event in _SEND and isinstance(arguments[1], tuple):  # text is a socket in the file system
        host = arguments[1][0]
    else:
        return
    if not _is_here(host):
        with open(os.environ["NO_NETWORK_LOG"], "a", encoding="utf-8") as log:
            log.write(f"{event} {host}\n")
        raise OSError(errno.ENETUNREACH, f"no network here, but {event} of {host}")


sys.addaudithook(_refuse)
