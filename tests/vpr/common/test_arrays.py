"""NumPy files whose headers say more than the files have."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from vpr.common.arrays import read_array


def _file(path: Path, header: str, version: bytes = b"\x01\x00", size: int | None = None) -> Path:
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header) if size is None else size)
    path.write_bytes(b"\x93NUMPY" + version + length + header.encode() + b"\0" * 64)
    return path


@pytest.mark.parametrize("order", ["C", "F"])
def test_saved_array_is_read(tmp_path: Path, order: str) -> None:
    array = np.asarray(np.arange(6, dtype=np.float32).reshape(2, 3), order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), array)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy", "r"), array)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 16)}", "the file has 64"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-8, -16)}", "expected an array of numbers"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 16)}", "expected an array of numbers"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (8,)}", "expected an array of numbers"),
        ("{'descr': '<f4', 'shape': (((8,", "a broken header"),
        ("(" + "-" * 9000 + "1)", "a broken header"),
    ],
)
def test_wrong_header(header: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_array(_file(tmp_path / "a.npy", header))
    assert caught.value.__context__ is None  # a MemoryError of the parser is not the machine's


def test_long_header_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a header of 4294967295 bytes, expected at most 10000"):
        read_array(_file(tmp_path / "a.npy", "{}", b"\x02\x00", 2**32 - 1))
