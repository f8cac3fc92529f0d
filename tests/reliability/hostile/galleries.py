"""Hostile galleries, tables of metadata and ids, conditions in SQL, and teachers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.reliability.hostile.command_routes import GIVEN, edit_json
from tests.reliability.hostile.inputs import Data, Hostile, write

_READERS = ("gallery search", "gallery verify", "gallery info", "gallery export", "gallery compact")
_TABLE = "stock/vectors/images.lance"
_QUOTES = ("'; DROP TABLE images; --", "' OR '1'='1", "\\' OR 1=1 --", "a''b'", "%", "\u202e", "a\0b", "\x1b[2J")


def galleries() -> Iterator[Hostile]:
    """Yield galleries with hostile cards and files of LanceDB."""
    cards: dict[str, Callable[[Any], object]] = {
        "schema 3": lambda card: card.update(schema=3),
        "no columns": lambda card: card["config"].pop("columns"),
        "columns of numbers": lambda card: card["config"].update(columns=[1, 2]),
        "columns of SQL": lambda card: card["config"].update(columns=["a); DROP TABLE images; --"]),
        "100,000 columns": lambda card: card["config"].update(columns=[f"c{n}" for n in range(100_000)]),
        "a column that the table lacks": lambda card: card["config"].update(columns=["price:number", "name", "x"]),
        "an address in a folder": lambda card: card["config"].update(address="/tmp"),
        "an address of another scheme": lambda card: card["config"].update(address="file:///etc"),
        "an address of a list": lambda card: card["config"].update(address=["s3://x"]),
        "no embedding": lambda card: card.update(embedding=None),
        "another dimension": lambda card: card["embedding"].update(dim=65536),
        "no model": lambda card: card.update(parents=[]),
    }
    for name, change in cards.items():
        put = partial(edit_json, "stock/card.json", change)
        yield Hostile("gallery", f"a card with {name}", "rejected", _READERS, put)
    for name, threshold in {"NaN": {"score": "margin", "value": float("nan")}, "a list": [], "no value": {}}.items():
        change = partial(_set_threshold, threshold)
        put = partial(edit_json, "stock/card.json", change)
        yield Hostile("gallery", f"a threshold of {name}", "rejected", ("gallery search", "gallery info"), put)
    for name, put in _lance_files().items():
        yield Hostile("gallery", name, "rejected", _READERS, put)
    for name, put in _rows().items():
        yield Hostile("gallery", name, "rejected", ("gallery verify",), put)


def _set_threshold(value: Any, card: Any) -> None:
    card["config"]["threshold"] = value


def _lance_files() -> dict[str, Callable[[Path], None]]:
    return {
        "no table": lambda folder: shutil.rmtree(folder / _TABLE),
        "no versions": lambda folder: shutil.rmtree(folder / _TABLE / "_versions"),
        "an empty manifest": partial(_change_files, "_versions/*.manifest", lambda data: b""),
        "half of a manifest": partial(_change_files, "_versions/*.manifest", lambda data: data[: len(data) // 2]),
        "a manifest of ones": partial(_change_files, "_versions/*.manifest", lambda data: b"\xff" * len(data)),
        "no data file": partial(_change_files, "data/*.lance", None),
        "half of a data file": partial(_change_files, "data/*.lance", lambda data: data[: len(data) // 2]),
        "a data file of zeros": partial(_change_files, "data/*.lance", lambda data: bytes(len(data))),
        "a data file that is the manifest": _swap_files,
        "a data file that is a link": partial(_link_files, "data/*.lance"),
        "a manifest that is a link": partial(_link_files, "_versions/*.manifest"),
        "a folder of data that is a link": partial(_link_folder, "data"),
        "a table that is a link": partial(_link_folder, ""),
        "a table with other columns": partial(_replace_table, lambda table: table.drop_columns(["digest"])),
        "a table of another dimension": partial(_replace_table, _halve_vectors),
        "a table with a broken model": partial(_replace_schema, {b"model": b"[" * 5000}),
        "a table with a model of 100 KB": partial(_replace_schema, {b"model": b"x" * 100_000}),
        "a table with text as the number of partitions": partial(_replace_schema, {b"partitions": b"many"}),
        "a table of -1 partitions": partial(_replace_schema, {b"partitions": b"-1"}),
        "a table of 10^30 partitions": partial(_replace_schema, {b"partitions": b"1" + b"0" * 30}),
    }


def _rows() -> dict[str, Callable[[Path], None]]:
    def with_nulls(name: str) -> Callable[[pa.Table], pa.Table]:
        return lambda table: _set_column(table, name, pa.nulls(len(table), table.schema.field(name).type))

    return {
        "missing products": partial(_replace_table, with_nulls("product")),
        "missing images": partial(_replace_table, with_nulls("image")),
        "missing vectors": partial(_replace_table, with_nulls("vector")),
        "missing checksums": partial(_replace_table, with_nulls("digest")),
        "vectors of the largest numbers": partial(_replace_table, partial(_fill_vectors, 3.4e38)),
        "each row twice": partial(_replace_table, lambda table: pa.concat_tables([table, table])),
        "products with control codes": partial(
            _replace_table, lambda table: _set_column(table, "product", pa.array(["\x1b[2J\n"] * len(table)))
        ),
        "a product of 1 MB": partial(
            _replace_table, lambda table: _set_column(table, "product", pa.array(["x" * (1 << 20)] * len(table)))
        ),
    }


def metadata_tables() -> Iterator[Hostile]:
    """Yield tables of metadata in Parquet, JSON lines and CSV."""
    routes = ("gallery create", "gallery update")
    one = pa.array(["1"])
    tables: dict[str, dict[str, pa.Array]] = {
        "prices that are lists": {"product": one, "price": pa.array([["1"]]), "name": one},
        "prices that are structs": {"product": one, "price": pa.array([{"a": 1}]), "name": one},
        "prices that are dates": {"product": one, "price": pa.array([2**60], pa.timestamp("ns")), "name": one},
        "prices that are truths": {"product": one, "price": pa.array([True]), "name": one},
        "prices that are NaN": {"product": one, "price": pa.array([float("nan")]), "name": one},
        "names that are bytes": {"product": one, "price": one, "name": pa.array([b"\xff"])},
        "names that are nested lists": {"product": one, "price": one, "name": pa.array([[[[[1]]]]])},
        "products that are missing": {"product": pa.nulls(1, pa.string()), "price": one, "name": one},
        "no product": {"price": one, "name": one},
        "2000 columns": {"product": one, "price": one, "name": one, **{f"c{n}": one for n in range(2000)}},
    }
    for name, columns in tables.items():
        yield Hostile("metadata", name, "rejected", routes, partial(_put_parquet, columns))
    texts: dict[str, Data] = {
        "csv: a price of NaN": "product,price,name\n1,nan,x\n",
        "csv: a price of 1e999": "product,price,name\n1,1e999,x\n",
        "csv: a price of code": "product,price,name\n1,__import__('os'),x\n",
        "csv: a name twice": "product,price,name,name\n1,1,a,b\n",
        "csv: a product twice": "product,price,name\n1,1,a\n1,2,b\n",
        "csv: odd columns": "product,_rowid,vector,digest\n1,1,1,1\n",
        "csv: a name of 5 MB": "product,price,name\n1,1," + "x" * (5 << 20),
        "csv: an unknown product of SQL": 'product,price,name\n"\'; DROP TABLE images; --",1,x\n',
        "jsonl: 100,000 brackets": "[" * 100_000,
        "jsonl: a repeated key": '{"product": "1", "price": 1, "price": 2, "name": "x"}\n',
        "jsonl: a price of 10^400": '{"product": "1", "price": 1' + "0" * 400 + ', "name": "x"}\n',
        "jsonl: a price of a list": '{"product": "1", "price": [1], "name": "x"}\n',
        "jsonl: half a surrogate": '{"product": "1", "price": 1, "name": "\\ud800"}\n',
        "parquet: text": "text",
    }
    for name, text in texts.items():
        put = partial(_put_table, "metadata", name.partition(":")[0], text)
        yield Hostile("metadata", name, "rejected", routes, put)


def ids() -> Iterator[Hostile]:
    """Yield ids of products to remove, which a gallery does not have."""
    for value in (*_QUOTES, "x" * 1_000_000):
        if "\0" in value or len(value) > 9999:
            continue
        put = partial(write, f"{GIVEN}/products.json", json.dumps([value]))
        yield Hostile("ids", ascii(value[:30]), "accepted", ("gallery remove",), put)
    tables: dict[str, tuple[str, Any]] = {
        "100,000 ids of SQL": ("accepted", "product\n" + '"\'; DROP TABLE images; --"\n' * 100_000),
        "an id of 1 MB": ("accepted", "product\n" + "x" * 1_000_000 + "\n"),
        "an id with a zero byte": ("rejected", "product\na\0b\n"),
        "no ids": ("rejected", "price\n1\n"),
        "an empty id": ("rejected", 'product\n""\n'),
        "a billion bytes of ids": ("rejected", "product\n" + "x" * (20 << 20)),
    }
    for name, (expected, text) in tables.items():
        put = partial(_put_table, "ids", "csv", text)
        yield Hostile(
            "ids", name, "accepted" if expected == "accepted" else "rejected", ("gallery remove, table",), put
        )


def conditions() -> Iterator[Hostile]:
    """Yield conditions in SQL that compute without end, read other tables or are no condition."""
    deep = {
        "100,000 brackets": "(" * 100_000 + "true" + ")" * 100_000,
        "10,000 negations": "NOT " * 10_000 + "true",
        "2000 cases": "CASE WHEN " * 2000 + "true" + " THEN true END" * 2000,
        "3000 functions": "abs(" * 3000 + "1" + ")" * 3000 + " > 0",
        "2000 additions": "1" + " + 1" * 2000 + " > 0",
        "300 indexes": "[1]" * 300 + " = 1",
        "a text of 20 MB": "product = '" + "x" * (20 << 20) + "'",
        "a text without end": "product = 'a",
    }
    texts = (
        *("1=1); DROP TABLE images; --", "product = 'x'; DROP TABLE images", "product IN (SELECT product FROM images)"),
        *("length(repeat('x', 1000000000)) > 5", "length(lpad(product, 2147483647)) > 5"),
        *("array_length(range(0, 1000000000)) > 1", "length(array_to_string(array_repeat('x', 99999999), '')) > 1"),
        *("length(replace(repeat(product, 9999), '', 'x')) > 1", "\"repeat\"(product, 1000000000) = 'a'"),
        *(
            "`repeat`(product, 1000000000) = 'a'",
            "repeat/**/(product, 1000000000) = 'a'",
            "repeat--\n(product, 9) = ''",
        ),
        *("1/0 > 1", "CAST(product AS blob) = 1", "product", "1", "--", "/*", "\0", "\udcff", ") OR (true", "a()"),
        *("read_parquet('/etc/passwd')", "version() = ''", "regexp_like(product, '(x{1000}){1000}')"),
    )
    for name, text in {**deep, **{ascii(text): text for text in texts}}.items():
        put = partial(write, f"{GIVEN}/where.txt", text)
        yield Hostile("condition", name, "rejected", ("gallery search, where",), put)
    for text in ("product = 'repeat(''x'', 9)'", "true" + " OR true" * 20_000, "lower(product) LIKE '%a%'"):
        put = partial(write, f"{GIVEN}/where.txt", text)
        yield Hostile("condition", text[:40], "accepted", ("gallery search, where",), put)


def teachers() -> Iterator[Hostile]:
    """Yield teachers whose cards contradict their networks, or describe huge ones."""
    routes = ("export onnx of a teacher", "teacher fuse", "teacher soup")
    changes: dict[str, Callable[[Any], object]] = {
        "no preprocessing": lambda card: card.update(preprocess=None),
        "images of 2048": lambda card: card["preprocess"].update(size=2048),
        "uint8 input": lambda card: card["preprocess"].update(dtype="uint8"),
        "another resize": lambda card: card["preprocess"].update(resize="shortest", crop="center"),
        "a deviation of 0": lambda card: card["preprocess"].update(std=[0, 0, 0]),
        "four channels": lambda card: card["preprocess"].update(mean=[0, 0, 0, 0]),
        "no network": lambda card: card["config"].pop("network"),
        "10^9 dimensions": lambda card: card["config"]["network"].update(embedding_dim=10**9),
        "an image size of 10^6": lambda card: card["config"]["network"].update(image_size=10**6),
        "a network of a list": lambda card: card["config"].update(network=[]),
        "a class to import": lambda card: card["config"]["network"].update(class_path="os.system"),
        "a wide tower": lambda card: card["config"]["tower_config"].update(embed_dim=10**7),
        "a tower of text": lambda card: card["config"].update(tower_config="/etc/passwd"),
    }
    for name, change in changes.items():
        yield Hostile("teacher", name, "rejected", routes, partial(edit_json, "teacher/card.json", change))
    for name, change in {
        "no embedding": lambda card: card.update(embedding=None),
        "65536 dimensions": lambda card: card["embedding"].update(dim=65536),
        "one part": lambda card: card["config"].update(parts=card["config"]["parts"][:1]),
        "parts of text": lambda card: card["config"].update(parts="abc"),
        "100,000 parts": lambda card: card["config"].update(parts=[{}] * 100_000),
        "a part without preprocessing": lambda card: card["config"]["parts"][0].pop("preprocess"),
        "a part of 10^6 pixels": lambda card: card["config"]["parts"][0]["network"].update(image_size=10**6),
    }.items():
        put = partial(edit_json, "fused/card.json", change)
        yield Hostile("teacher", f"fused: {name}", "rejected", ("teacher embed, fused",), put)
    for name, value in {"a number": 1, "an empty text": [""], "a text of 10,000": ["x" * 10_000]}.items():
        put = partial(edit_json, "teacher/card.json", lambda card, value=value: card.update(licences=value))
        yield Hostile("teacher", f"a licence that is {name}", "rejected", ("doctor",), put)
    put = partial(edit_json, "teacher/card.json", lambda card: card.update(licences=["\x1b[2J"]))
    yield Hostile("teacher", "a licence with control codes", "accepted", ("doctor",), put)


def _put_parquet(columns: dict[str, pa.Array], folder: Path) -> None:
    pq.write_table(pa.table(columns), folder / GIVEN / "metadata.parquet")
    (folder / GIVEN / "metadata.csv").unlink()


def _put_table(stem: str, suffix: str, text: Data, folder: Path) -> None:
    (folder / GIVEN / f"{stem}.csv").unlink()
    write(f"{GIVEN}/{stem}.{suffix}", text, folder)


def _change_files(pattern: str, change: Callable[[bytes], bytes] | None, folder: Path) -> None:
    for path in (folder / _TABLE).glob(pattern):
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))


def _swap_files(folder: Path) -> None:
    manifest = next((folder / _TABLE / "_versions").glob("*.manifest"))
    _change_files("data/*.lance", lambda data: manifest.read_bytes(), folder)


def _link_files(pattern: str, folder: Path) -> None:
    for path in (folder / _TABLE).glob(pattern):
        target = folder / path.name
        path.rename(target)
        path.symlink_to(target)


def _link_folder(name: str, folder: Path) -> None:
    path, target = folder / _TABLE / name, folder / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def _replace_table(change: Callable[[pa.Table], pa.Table], folder: Path) -> None:
    """Write the table again; its identity is that of the gallery, as for one that its owner wrote."""
    database = lancedb.connect(str(folder / "stock" / "vectors"))
    table = change(database.open_table("images").to_arrow())
    shutil.rmtree(folder / _TABLE)
    database.create_table("images", table, on_bad_vectors="null")


def _replace_schema(metadata: dict[bytes, bytes], folder: Path) -> None:
    _replace_table(lambda table: table.replace_schema_metadata(metadata), folder)


def _set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(name), values)


def _fill_vectors(value: float, table: pa.Table) -> pa.Table:
    kind = table.schema.field("vector").type
    values = pa.array(np.full(len(table) * kind.list_size, value, np.float32))
    return _set_column(table, "vector", pa.FixedSizeListArray.from_arrays(values, kind.list_size))


def _halve_vectors(table: pa.Table) -> pa.Table:
    values = pa.array(np.ones(len(table) * 8, np.float32) / 8**0.5)
    index = table.schema.get_field_index("vector")
    return table.set_column(index, "vector", pa.FixedSizeListArray.from_arrays(values, 8))
