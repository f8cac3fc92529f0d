"""What a process holds of the machine: memory, threads, open files."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Footprint:
    """Of one process, as Linux counts it.

    Attributes:
        resident: bytes of memory that are in RAM, files mapped into it included.
        anonymous: of these, bytes that are not of files: heaps and stacks.
        threads: how many.
        files: open descriptors, sockets included.
    """

    resident: int
    anonymous: int
    threads: int
    files: int


def footprint(process: int | None = None) -> Footprint:
    """Of a process by its number; of this one without."""
    folder = Path("/proc") / str(process or os.getpid())
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines())
    kilobytes = {name: int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon")}
    # Listing the folder of this process opens it.
    files = len(os.listdir(folder / "fd")) - (process in (None, os.getpid()))
    return Footprint(kilobytes["VmRSS"] << 10, kilobytes["RssAnon"] << 10, int(fields["Threads"]), files)


def heap_in_use() -> int:
    """Bytes that glibc's heaps have lent out in this process; of another C library, which cannot tell, 0."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:
        return 0
    tell.restype = _Mallinfo
    info = tell()
    return int(info.uordblks + info.hblkhd)


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]
