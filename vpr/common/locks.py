"""One writer at a time: locks that end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def file_lock(path: Path, busy: str = "") -> Iterator[None]:
    """Hold a lock file, which is there only while it is held (an empty one is left by a kill, and of no consequence).

    It is a record lock of POSIX: the system ends it with its process however that ends, forked children do not keep it,
    and network file systems know it. It is no lock between threads.

    Args:
        path: of the lock file; its folder exists.
        busy: what to say where another process holds it; without it that process is waited for.

    Raises:
        UserError: another process holds it.
    """
    while True:
        stream = path.open("ab")
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except OSError as error:
            stream.close()
            if error.errno in _HELD:
                raise UserError(busy) from None
            if error.errno not in _NO_LOCKS:
                raise
            log.info(f"{path.parent}: this file system has no locks: let no two processes write there")
            break
        if _is_at(path, stream.fileno()):
            break
        stream.close()  # its holder removed it while we waited: another one may be there now
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
