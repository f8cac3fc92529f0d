"""Memory, threads and open files of a process."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Footprint:
    """Resources of one process, as Linux counts them.

    Attributes:
        resident: Bytes in RAM, mapped files included.
        anonymous: Bytes in RAM that belong to no file or shared segment: heaps and stacks.
        threads: Number of threads.
        files: Number of open descriptors, sockets included.
    """

    resident: int
    anonymous: int
    threads: int
    files: int


def measure_footprint(pid: int | None = None) -> Footprint:
    """Return the footprint of a process; of the calling process without ``pid``."""
    process = psutil.Process(pid)
    with process.oneshot():
        memory = process.memory_info()
        return Footprint(memory.rss, memory.rss - memory.shared, process.num_threads(), process.num_fds())


def heap_in_use() -> int:
    """Return the bytes that this process has allocated from the C library's heaps."""
    heap = psutil.heap_info()
    return int(heap.heap_used + heap.mmap_used)
