"""Hostile NumPy files, golden vectors, uint8 graphs and Parquet rows of embeddings."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.reliability.hostile.artifacts import PICKLE
from tests.reliability.hostile.command_routes import GIVEN, edit_json, sign_file
from tests.reliability.hostile.inputs import Data, Hostile, write, zip_file

_DIM = 16
_ALL = ("export verify", "bench storage", "search")
_CLIENTS = ("export verify", "bench storage")
_GIB = 1 << 30
_SPARSE = 3 * _GIB
_ROWS = 1 << 12


def arrays() -> Iterator[Hostile]:
    """Yield ``.npy`` files as a client's vectors, as distractors and as the vectors of embeddings."""
    for name, data in {**_headers(), **_values(), **_no_arrays()}.items():
        yield Hostile("NumPy", name, "rejected", _ALL, partial(_put_vectors, data))
    for name, array in _valid_arrays().items():
        yield Hostile("NumPy", name, "accepted", ("export verify",), partial(_put_client, array))
    yield Hostile("NumPy", "3 GB of zeros, which take no space", "rejected", ("export verify",), _put_sparse)
    for target in ("/dev/zero", "client.npy"):
        put = partial(_put_special, lambda path, target=target: path.symlink_to(target))
        yield Hostile("NumPy", f"a link to {target}", "rejected", _CLIENTS, put)
    yield Hostile("NumPy", "a folder", "rejected", _CLIENTS, partial(_put_special, Path.mkdir))
    yield Hostile("NumPy", "a pipe", "rejected", _CLIENTS, partial(_put_special, os.mkfifo))


def golden() -> Iterator[Hostile]:
    """Yield golden vectors and images that contradict the card."""
    arrays: dict[str, tuple[str, Data]] = {
        "inputs of a pickle": ("inputs.npy", npy(np.array([{}], dtype=object))),
        "inputs of 2^40 rows": ("inputs.npy", header("<f4", (2**40, 3, 32, 32))),
        "inputs with an unclosed header": ("inputs.npy", raw_header("{'descr': '<f4', 'shape': (8,\n")),
        "embeddings of zeros": ("embeddings.npy", npy(np.zeros((8, _DIM), np.float32))),
        "embeddings of NaN": ("embeddings.npy", npy(np.full((8, _DIM), np.nan, np.float32))),
        "embeddings of fewer images": ("embeddings.npy", npy(np.ones((7, _DIM), np.float32))),
        "an image of another name": ("zzz.png", b"\x89PNG\r\n\x1a\n"),
    }
    for name, (file, data) in arrays.items():
        put = partial(_put_file, "fp32", f"golden/{file}", data)
        yield Hostile("golden", name, "rejected", ("export verify",), put)
    for name, file in (("an image that is text", "1-jpeg-420.jpg"), ("another image that is text", "3-png.png")):
        put = partial(_put_file, "fp32", f"golden/{file}", b"text")  # the vectors agree, so no image is read
        yield Hostile("golden", name, "accepted", ("export verify",), put)
    yield Hostile("golden", "100 images", "rejected", ("export verify",), _put_many_images)
    yield Hostile("golden", "two images exchanged", "rejected", ("export verify",), _exchange_images)


def uint8_graphs() -> Iterator[Hostile]:
    """Yield graphs with uint8 input and a card of other preprocessing."""
    routes = ("export verify, uint8", "export parity, uint8")
    for name, change in {
        "the card says float32": {"dtype": "float32"},
        "the card says NHWC": {"layout": "NHWC"},
        "the card says another size": {"size": 2048},
        "the card says int64": {"dtype": "int64"},
        "the card has a deviation of 0": {"std": [0.0, 0.0, 0.0]},
        "the card has a mean of 1e308": {"mean": [1e308, 0.0, 0.0]},
    }.items():
        put = partial(edit_json, "uint8/card.json", lambda card, change=change: card["preprocess"].update(change))
        yield Hostile("uint8", name, "rejected", routes, put)
    put = partial(edit_json, "fp32/card.json", lambda card: card["preprocess"].update(dtype="uint8"))
    yield Hostile("uint8", "a float32 graph, the card says uint8", "rejected", ("export verify", "ONNX Runtime"), put)
    put = partial(edit_json, "uint8/card.json", lambda card: card.update(preprocess=None))
    yield Hostile("uint8", "the card says nothing", "rejected", routes, put)


def embedding_rows() -> Iterator[Hostile]:
    """Yield Parquet rows of embeddings with wrong types and with little text that becomes much."""
    routes = ("search", "gallery create", "gallery add", "gallery threshold", "gallery plan-migration")
    text = pa.array(["a"] * 32)
    columns: dict[str, Any] = {
        "products that are lists": ("product", lambda: pa.array([["a", "b"]] * 32)),
        "images that are structs": ("image", lambda: pa.array([{"a": "b"}] * 32)),
        "roles that are nested lists": ("role", lambda: pa.array([[["gallery"]]] * 32)),
        "products that are maps": ("product", lambda: pa.array([[("a", 1)]] * 32, pa.map_(pa.string(), pa.int64()))),
        "products that are bytes": ("product", lambda: pa.array([b"\xff"] * 32)),
        "products that are missing": ("product", lambda: pa.nulls(32, pa.string())),
        "images that are null": ("image", lambda: pa.nulls(32)),
        "products of 40 MB each": ("product", lambda: pa.array(["x" * (40 << 20)] * 32)),
        "a product of 40 MB": ("product", lambda: pa.array(["x" * (40 << 20), *["a"] * 31])),
        "a column of few rows": ("", lambda: text.slice(0, 31)),
        "no columns": ("", lambda: None),
    }
    for name, (column, values) in columns.items():
        yield Hostile("rows", name, "rejected", routes, partial(_put_column, column, values))
    for name, data in {"a text": b"text", "an empty file": b"", "only its magic bytes": b"PAR1PAR1"}.items():
        put = partial(_put_file, f"{GIVEN}/embeddings", "rows.parquet", data)
        yield Hostile("rows", f"{name} as Parquet", "rejected", routes, put)
    put = partial(_put_many_rows, _ROWS)
    yield Hostile("rows", "one product of 900 KB in thousands of rows", "rejected", ("search",), put)


def header(dtype: Any, shape: Any, fortran: Any = False, data: bytes = b"\0" * 64) -> bytes:
    """Return a ``.npy`` file with these values of its header, and little data."""
    return raw_header(f"{{'descr': {dtype!r}, 'fortran_order': {fortran!r}, 'shape': {shape!r}}}\n", data=data)


def raw_header(text: str, version: bytes = b"\x01\x00", length: int | None = None, data: bytes = b"") -> bytes:
    """Return a ``.npy`` file with this text as its header."""
    raw = text.encode("latin-1")
    size = len(raw) if length is None else length
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", size) + raw + data


def npy(array: Any) -> bytes:
    """Return an array as a ``.npy`` file, pickled if it has objects."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def _headers() -> dict[str, Data | Callable[[], Data]]:
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}\n"
    return {
        "a shape of 2^40 rows": header("<f4", (2**40, _DIM)),
        "a shape of 2^31 by 2^31": header("<f4", (2**31, 2**31)),
        "a shape of 10^30": header("<f4", (10**30, _DIM)),
        "a shape of 4 GB": header("<f4", (1 << 26, _DIM)),
        "a negative shape": header("<f4", (-1, _DIM)),
        "two negative numbers in a shape": header("<f4", (-8, -_DIM)),
        "a shape of text": header("<f4", "8"),
        "a shape of truths": header("<f4", (True, True)),
        "a shape of 3000 dimensions": header("<f4", (1,) * 3000),
        "an order of text": header("<f4", (8, _DIM), "yes"),
        "a type of 2 GB": header("|V2147483647", (8, _DIM)),
        "a type of text": header("<U536870911", (8, _DIM)),
        "a type of objects": header("|O", (8, _DIM), data=PICKLE),
        "a type that is unknown": header("<q9", (8, _DIM)),
        "a type that is a number": header(4, (8, _DIM)),
        "a nested type": header([("a", [("b", [("c", "<f4")])])], (8, _DIM)),
        "a type of itself": header([("a", "<f4"), ("a", "<f4")], (8, _DIM)),
        "a header of 4 GB": raw_header(text % "(8, 16)", b"\x02\x00", 2**32 - 1),
        "a header of 1 GB": raw_header(text % "(8, 16)", b"\x03\x00", _GIB),
        "a header of 60,000 blanks": raw_header(" " * 60_000),
        "a header that ends early": raw_header(text % "(8, 16)", length=9),
        "a header with an open bracket": raw_header(text % "((((8, 16)"),
        "a header with an open quote": raw_header("{'descr': '''\n"),
        "a header with a wrong indent": raw_header("  {'descr':\n 1}\n  2\n"),
        "a header of 5000 brackets": raw_header("(" * 5000),
        "a header of 9000 signs": raw_header(text % ("(" + "-" * 9000 + "8, 16)")),
        "a header of 5000 digits": raw_header(text % f"({'9' * 5000}, 16)"),
        "a header of code": raw_header("__import__('os').system('touch escaped')\n"),
        "a header with a zero byte": raw_header(text % "(8, 16)\0"),
        "a header of a list": raw_header("[]\n"),
        "a header with another key": raw_header("{'descr': '<f4', 'fortran_order': False, 'shape': (), 'x': 1}\n"),
        "version 9": raw_header(text % "(8, 16)", b"\x09\x09"),
    }


def _values() -> dict[str, Data | Callable[[], Data]]:
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((8, _DIM)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    arrays: dict[str, Any] = {
        "NaN": np.full((8, _DIM), np.nan, np.float32),
        "infinity": np.full((8, _DIM), np.inf, np.float32),
        "zeros": np.zeros((8, _DIM), np.float32),
        "the largest numbers": np.full((8, _DIM), 3.4e38, np.float32),
        "one NaN": np.where(np.eye(8, _DIM) > 0, np.nan, unit).astype(np.float32),
        "no dimensions": unit[:, :0],
        "no dimensions at all": np.float32(1),
        "three dimensions": unit[None],
        "one dimension": unit[0],
        "more dimensions": np.hstack([unit, unit]),
        "truths": unit > 0,
        "text": unit.astype("U9"),
        "bytes": unit.astype("S9"),
        "complex numbers": unit.astype(np.complex64),
        "dates": np.zeros((8, _DIM), "datetime64[s]"),
        "records": np.zeros((8, _DIM), [("a", "<f4"), ("b", "|U4")]),
        "objects": np.array([[{}] * _DIM] * 8, dtype=object),
    }
    return {name: npy(array) for name, array in arrays.items()}


def _no_arrays() -> dict[str, Data | Callable[[], Data]]:
    bomb = io.BytesIO()
    np.savez_compressed(bomb, a=np.zeros(1 << 24, np.uint8))
    return {
        "an empty file": b"",
        "a pickle": PICKLE,
        "a pickled array": pickle.dumps(np.ones((8, _DIM), np.float32)),
        "a ZIP archive": zip_file("../x.npy", b"x"),
        "an NPZ archive": bomb.getvalue(),
        "half of an array": npy(np.ones((8, _DIM), np.float32))[:200],
        "only the magic bytes": b"\x93NUMPY",
        "10 MB of text": lambda: b"x" * (10 << 20),
    }


def _valid_arrays() -> dict[str, Callable[[Any], Any]]:
    return {
        "columns first": np.asfortranarray,
        "the other order of bytes": lambda array: array.astype(">f4"),
        "numbers of 64 bits": lambda array: array.astype("<f8"),
        "numbers that are not of length 1": lambda array: 9 * array,
    }


def _put_vectors(data: Data | Callable[[], Data], folder: Path) -> None:
    write(f"{GIVEN}/client.npy", data, folder)
    write(f"{GIVEN}/embeddings/vectors.npy", data, folder)
    sign_file(folder / GIVEN / "embeddings", "vectors.npy")


def _put_client(change: Callable[[Any], Any], folder: Path) -> None:
    path = folder / GIVEN / "client.npy"
    np.save(path, change(np.load(path)))


def _put_sparse(folder: Path) -> None:
    path = folder / GIVEN / "client.npy"
    path.write_bytes(header("<f4", (_SPARSE // 4 // _DIM, _DIM), data=b""))
    os.truncate(path, path.stat().st_size + _SPARSE)


def _put_special(create: Callable[[Path], object], folder: Path) -> None:
    path = folder / GIVEN / "client.npy"
    path.unlink()
    create(path)


def _put_file(artifact: str, file: str, data: Data, folder: Path) -> None:
    write(f"{artifact}/{file}", data, folder)
    sign_file(folder / artifact, file)


def _put_many_images(folder: Path) -> None:
    data = (folder / "fp32" / "golden" / "3-png.png").read_bytes()
    for number in range(100):
        _put_file("fp32", f"golden/more-{number}.png", data, folder)


def _exchange_images(folder: Path) -> None:
    images = [folder / "fp32" / "golden" / name for name in ("3-png.png", "6-alpha.png")]
    contents = [image.read_bytes() for image in images]
    for image, data in zip(images, reversed(contents), strict=True):
        _put_file("fp32", f"golden/{image.name}", data, folder)


def _put_column(column: str, make: Callable[[], Any], folder: Path) -> None:
    """Replace a column; an empty name keeps as many rows as there are values, or no column."""
    values = make()
    path = folder / GIVEN / "embeddings" / "rows.parquet"
    table = pq.read_table(path)
    if column:
        table = table.set_column(table.schema.get_field_index(column), column, values[: len(table)])
    else:
        table = table.select([]) if values is None else table.slice(0, len(values))
    pq.write_table(table, path, compression="zstd")
    sign_file(path.parent, "rows.parquet")


def _put_many_rows(count: int, folder: Path) -> None:
    """Replace the embeddings by many rows: one has a long product, the others are short."""
    artifact = folder / GIVEN / "embeddings"
    vectors = np.tile(np.load(artifact / "vectors.npy")[:1], (count, 1))
    np.save(artifact / "vectors.npy", vectors)
    names = pa.array([f"{number}.png" for number in range(count)])
    products = pa.array(["x" * 900_000, *["a"] * (count - 1)])
    rows = pa.table({"image": names, "product": products, "role": pa.array(["gallery"] * count)})
    pq.write_table(rows, artifact / "rows.parquet", compression="zstd")
    for file in ("vectors.npy", "rows.parquet"):
        sign_file(artifact, file)
