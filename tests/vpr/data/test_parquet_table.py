"""Parquet tables whose small files would decode to large ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.figures import ROOT
from vpr.common.errors import UserError
from vpr.data.parquet_table import read_parquet_rows, read_text_columns

_LONG = "x" * (1 << 20)
_DENSE: dict[str, Any] = {"use_dictionary": False}
_PREFIXES: dict[str, Any] = {"column_encoding": {"image": "DELTA_BYTE_ARRAY", "product": "PLAIN"}} | _DENSE
_LENGTHS: dict[str, Any] = {"column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY", "product": "PLAIN"}} | _DENSE

_READ = """
import resource, sys
from pathlib import Path
from vpr.common.errors import UserError
from vpr.data.parquet_table import read_parquet_rows
small, path = map(Path, sys.argv[1:])
columns = ["image", "product"]
list(read_parquet_rows(small, columns))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    list(read_parquet_rows(path, columns))
except UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def _write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, compression="zstd", **options)
    return path


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 40), (_DENSE, 40), (_LENGTHS, 40), (_PREFIXES, 110)],
    ids=["dict", "plain", "len", "prefix"],
)
def test_small_file_of_long_texts_takes_little_memory(tmp_path: Path, options: dict[str, Any], most: int) -> None:
    """64 texts of a megabyte; a batch of prefixes has at most 64 times the size of their column."""
    small = _write(tmp_path / "small.parquet", {"image": ["a"], "product": ["b"]}, **options)
    path = _write(tmp_path / "t.parquet", {"image": [_LONG] * 64, "product": ["a", "b"] * 32}, **options)
    command = [sys.executable, "-c", _READ, str(small), str(path)]  # a process of its own has a peak of its own
    error, grown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert error.startswith(f"{path}: ")
    assert error.endswith(f"too many for a file of {path.stat().st_size} bytes. Write it as CSV.")
    assert int(grown) <= most


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a", "y" * (5 << 20)]}, "row 2: 'image' has more than 1048576 characters. Write the row again."),
        ({"image": ["a", "y" * (40 << 20)]}, "row group 0 has .* bytes, too many"),
        (
            {"image": ["a"], "bbox": pa.ListArray.from_arrays([0, 5_000_000], np.ones(5_000_000))},
            "row group 0 has .* bytes, too many",
        ),
        ({"image": pa.array(["a"]).take(pa.array([0] * 1_100_000))}, "it has 1100000 rows, too many"),
        ({"image": [b"a"]}, "column 'image' has the type binary. Write it as text, and a box as a list of numbers."),
        ({"image": [{"a": 1}]}, "column 'image' has the type struct"),
        ({"image": [["a"]]}, "column 'image' has the type list"),
    ],
)
def test_large_and_strange_columns_are_rejected(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = _write(tmp_path / "t.parquet", columns)
    with pytest.raises(UserError, match=message):
        list(read_parquet_rows(path, list(columns)))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1 << 62, pa.timestamp("us")),
        (-(1 << 50), pa.timestamp("ms")),
        (1 << 30, pa.date32()),
        (1 << 62, pa.duration("s")),
        (1, pa.timestamp("ns")),
        (1, pa.timestamp("us", tz="Mars/Base")),
    ],
    ids=str,
)
def test_dates_without_a_value_in_python_are_rejected(tmp_path: Path, value: int, kind: pa.DataType) -> None:
    path = _write(
        tmp_path / "t.parquet",
        {"image": ["a"], "split": pa.array([value], pa.int32() if kind == pa.date32() else pa.int64()).view(kind)},
    )
    with pytest.raises(
        UserError, match=r"t.parquet: column 'split' of type .* cannot be read .*\. Write it as text\.$"
    ):
        list(read_parquet_rows(path, ["image", "split"]))


@pytest.mark.parametrize("options", [{}, _DENSE, {"row_group_size": 700}], ids=["dict", "plain", "groups"])
def test_values_equal_those_of_pyarrow(tmp_path: Path, options: dict[str, Any]) -> None:
    count = 2500
    columns: dict[str, Any] = {
        "image": [f"é/{row}.jpg" for row in range(count)],
        "product": pa.array([None if row % 9 == 0 else f"p{row % 50}" for row in range(count)], pa.large_string()),
        "category": pa.array([f"c{row // 100}" for row in range(count)]).dictionary_encode(),
        "code": pa.array([row % 9 or None for row in range(count)]).dictionary_encode(),
        "number": [row if row % 7 else None for row in range(count)],
        "bbox": [None if row % 3 else [1.0, 2.0, 3.0, row] for row in range(count)],
    }
    path = _write(tmp_path / "t.parquet", columns, **options)
    rows = list(read_parquet_rows(path, list(columns)))
    assert [number for number, _ in rows] == list(range(1, count + 1))
    assert [values for _, values in rows] == pa.table(columns).to_pylist()


def test_long_rows_of_a_large_file_are_read(tmp_path: Path) -> None:
    """A batch of long texts that fits the file is decoded row by row."""
    texts = [f"{row:020}" * 30_000 for row in range(40)]
    path = _write(tmp_path / "t.parquet", {"image": texts}, **_DENSE)
    assert [values["image"] for _, values in read_parquet_rows(path, ["image"])] == texts


def test_text_columns(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.parquet", {"image": ["a", "bc"], "product": ["x", "y"]})
    image, product = read_text_columns(path, ["image", "product"])
    assert (image.tolist(), product.tolist()) == (["a", "bc"], ["x", "y"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([["a"], ["b"]], "is not text|has the type"),
        (["a", None], "column 'image' is not text in every row"),
        (["x" * 900_000, *["a"] * 4000], "with the length of the longest one, its texts have 14403600000 bytes"),
    ],
)
def test_text_that_no_array_can_hold(values: list[Any], message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "t.parquet", {"image": values})
    with pytest.raises(UserError, match=message):
        read_text_columns(path, ["image"])
