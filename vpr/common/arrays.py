"""NumPy files whose header is checked before memory is allocated for it."""

from __future__ import annotations

import math
import sys
import tokenize
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

_MAX_HEADER = 10_000  # characters, numpy's limit, which it checks only after it has read as many as the file says
_FIXED = 12  # bytes before the header of version 2; version 1 has two fewer
# numpy's errors for a header that is no Python literal or has values of other types
_BROKEN = (TypeError, OverflowError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError)


def read_array(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    """Return the array of a ``.npy`` file, without unpickling.

    Args:
        path: File, which may be untrusted.
        mmap_mode: ``r`` maps the file instead of reading it.

    Raises:
        ValueError: The file is no ``.npy`` file, or shorter than its header says.
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(_FIXED)
        version = tuple(start[6:8])
        if not start.startswith(npy_format.MAGIC_PREFIX) or version not in ((1, 0), (2, 0)):
            raise ValueError("not a .npy file of version 1 or 2")
        size = int.from_bytes(start[8:10] if version == (1, 0) else start[8:12], "little")
        if size > _MAX_HEADER:
            raise ValueError(f"a header of {size} bytes, expected at most {_MAX_HEADER}")
        stream.seek(len(start[:8]))
        problem = ""  # raised below, so that numpy's MemoryError for deep brackets is not taken for the machine's
        try:
            _check_size(stream, version == (1, 0), path.stat().st_size)
        except _BROKEN as error:
            problem = type(error).__name__
    if problem:
        raise ValueError(f"a broken header ({problem})")
    return np.asarray(np.load(path, mmap_mode=mmap_mode, allow_pickle=False))


def _check_size(stream: BinaryIO, is_first: bool, size: int) -> None:
    """Raise :class:`ValueError` unless a file of ``size`` bytes has all numbers that its header says."""
    read = npy_format.read_array_header_1_0 if is_first else npy_format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject or any(type(count) is not int or not 0 <= count <= sys.maxsize for count in shape):
        raise ValueError(f"expected an array of numbers, got shape {str(shape)[:50]} of {str(dtype)[:50]}")
    if (needed := math.prod(shape) * dtype.itemsize) > size - stream.tell():
        raise ValueError(f"its header says {needed} bytes of numbers, the file has {size - stream.tell()}")
