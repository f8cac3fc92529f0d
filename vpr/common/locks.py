"""Locks between processes that end with the process that holds them."""

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
    """Hold a lock file, which exists only while it is held; a killed process may leave an empty, harmless file.

    It is a POSIX record lock. The system releases it whenever its process ends, forked children do not keep it,
    and network file systems support it. It does not exclude other threads of the same process.

    Raises:
        UserError: Another process holds the lock; the message is ``busy``. An empty one waits for that process.
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
            log.warning(f"{path.parent}: this file system has no locks. Let only one process write there.")
            break
        if _is_open_file(path, stream.fileno()):
            break
        stream.close()  # its holder removed it during the wait: another file may have its name now
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()


def _is_open_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
