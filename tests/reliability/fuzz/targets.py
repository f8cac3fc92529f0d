"""Fuzz targets: parsers of cards, CSV tables, ranges, and graphs that take Q/DQ.

A target is a function of a folder to write to and of bytes. It returns for well-formed bytes and raises
:class:`UserError` for rejected bytes; anything else is a fault. :mod:`tests.reliability.fuzz.guided` searches for such
bytes. The tests give the stored ones (``tests/reliability/fuzz/corpus``) to the same functions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from calibration.smoothquant import smooth
from export.fp16 import to_fp16
from export.qdq import quantise, quantised_nodes
from teacher.config import RunsConfig
from teacher.runs import runs
from vpr.artifacts.card import Card, Embedding, FileEntry, Kind
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import check_output, find_up_to_date
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog, rows_to_table
from vpr.data.config import ReadOptions
from vpr.data.division import Shares, split_by_product
from vpr.data.identities import clean_ids, reject_invalid
from vpr.data.readers import READERS
from vpr.data.splits import find_leaks
from vpr.imaging.preprocess import Preprocess
from vpr.inference.int8 import Ranges, read_ranges
from vpr.inference.onnx_graph import check_graph, load_graph
from vpr.inference.onnx_session import INPUT, OUTPUT

_SIDE, _DIM = 16, 6
_EMPTY = hashlib.sha256(b"").hexdigest()


def read_card(folder: Path, data: bytes) -> None:
    """Read ``card.json``, next to an empty ``model.onnx``, by every reader of cards."""
    path = folder / "artifact"
    path.mkdir(exist_ok=True)
    (path / "card.json").write_bytes(data)
    (path / "model.onnx").touch()
    if b"teacher" in data:  # the command lists teachers only
        with redirect_stdout(StringIO()):
            runs(RunsConfig(str(folder)))
    try:
        artifact = load_artifact(path)
    finally:
        with suppress(UserError):
            check_output(path, "report")
    card = artifact.card
    assert all((path / name).resolve().is_relative_to(path.resolve()) for name in card.files), "a file outside"
    find_up_to_date(path, card.kind, card.config, card.parents)


def read_table(folder: Path, data: bytes) -> None:
    """Read a CSV table with the reader of its columns, and split it."""
    path, kind = folder / "table.csv", "csv"
    if b"img_path" in data[:256]:
        kind = "aicrowd"
        (folder / "gallery.csv").write_bytes(data)
        path = folder / "queries.csv"
    elif b"class" in data[:256]:
        kind, path = "products10k", folder / "train.csv"
    path.write_bytes(data)
    cleaned, _ = clean_ids(list(READERS[kind](path if kind == "csv" else folder, ReadOptions())), "table")
    images, _ = reject_invalid(cleaned, False, "table")
    rows = [{**row, "sha256": str(number)} for number, row in enumerate(images)]
    if not rows:
        raise UserError("no images")
    for row in rows:
        assert row["product"], "a row without a product"
        assert (folder / row["image"]).resolve().is_relative_to(folder.resolve()), "an image outside"
        assert row["box"] is None or all(math.isfinite(side) for side in row["box"].values()), "an infinite box"
    division = split_by_product(rows_to_table(rows), Shares(test=0.5, seed=4, resplit=True))
    if division.unmet:
        raise UserError(division.unmet[0])
    catalog = Catalog(division.table, folder)
    assert catalog.summary()["images"]["test"] >= 2, "a test split without a query and its gallery"
    assert find_leaks(catalog, allow=True) == {}, "a product or an image in two splits"


def read_ranges_files(folder: Path, data: bytes) -> None:
    """Read ``ranges.json`` up to a zero byte and ``adjustments.safetensors`` after it, and quantise a graph."""
    text, _, arrays = data.partition(b"\0")
    (folder / "ranges.json").write_bytes(text)
    (folder / "adjustments.safetensors").write_bytes(arrays or save({"bias:vit.first": np.ones(4, np.float32)}))
    graph, files = sample_graph(), ("ranges.json", "adjustments.safetensors")
    quantised = _quantise(graph, read_ranges(_artifact(folder, "ranges", files)))
    scales = [numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer if tensor.name.endswith("_scale")]
    assert all(np.isfinite(np.float16(scale)).all() and (scale > 0).all() for scale in scales), "an invalid scale"
    check_graph(quantised, _card("onnx", ()))


def read_graph(folder: Path, data: bytes) -> None:
    """Load ``model.onnx``, and quantise it if possible."""
    (folder / "model.onnx").write_bytes(data)
    artifact = _artifact(folder, "onnx", ("model.onnx",))
    loaded = load_graph(artifact)
    thresholds = {name: 1.0 for node in loaded.graph.node for name in node.input}
    quantised = _quantise(loaded, Ranges(thresholds, {}, {}, {}))
    with reraise_as_artifact_error(artifact):
        check_graph(quantised, artifact.card)


def _quantise(graph: onnx.ModelProto, ranges: Ranges) -> onnx.ModelProto:
    """Quantise as ``vpr export int8`` does."""
    smoothed = smooth(graph, ranges.smoothing)
    layers = list(quantised_nodes(smoothed, (), "full-mha"))
    return to_fp16(quantise(smoothed, ranges.thresholds, layers, "int8", ranges.corrections))


@cache
def _card(kind: Kind, files: tuple[str, ...]) -> Card:
    return Card(
        schema=1,
        kind=kind,
        name="fuzz",
        created="",
        code_version="",
        config={"precision": "fp32"},
        preprocess=Preprocess(size=_SIDE),
        embedding=Embedding(dim=_DIM, normalised=True, dtype="float32"),
        files={name: FileEntry(size=0, sha256=_EMPTY) for name in files},
    )


def _artifact(folder: Path, kind: Kind, files: tuple[str, ...]) -> Artifact:
    """Return an artifact of the folder, whose checksums are not compared."""
    return Artifact(folder, _card(kind, files), _EMPTY)


@cache
def sample_graph() -> onnx.ModelProto:
    """Return a graph with a LayerNormalization, linears as MatMul and as Gemm, and an attention."""
    rng = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    def node(kind: str, module: str, inputs: list[str], output: str, **values: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=f"{module}/{kind}", **values)

    nodes = [
        node("ReduceMean", "vit", [INPUT, "axes"], "mean", keepdims=0),
        node("LayerNormalization", "vit.norm", ["mean", "norm.weight", "norm.bias"], "normed"),
        node("MatMul", "vit.first", ["normed", "first.weight"], "product"),
        node("Add", "vit.first", ["product", "first.bias"], "first"),
        node("Reshape", "vit.split", ["first", "square"], "heads"),
        node("MatMul", "vit.attend", ["heads", "heads"], "attended"),
        node("Reshape", "vit.join", ["attended", "flat"], "joined"),
        node("Gemm", "vit.last", ["joined", "last.weight", "last.bias"], OUTPUT, transB=1),
    ]
    constants = [constant("norm.weight", 3), constant("norm.bias", 3), constant("first.weight", 3, 4)]
    constants += [constant("first.bias", 4), constant("last.weight", _DIM, 4), constant("last.bias", _DIM)]
    shapes = {"axes": [2, 3], "square": [-1, 2, 2], "flat": [-1, 4]}
    constants += [numpy_helper.from_array(np.array(values), name) for name, values in shapes.items()]
    model_input = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, _SIDE, _SIDE])
    model_output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", _DIM])
    body = helper.make_graph(nodes, "sample", [model_input], [model_output], constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@dataclass(frozen=True)
class Target:
    """Target of the fuzzer.

    Attributes:
        run: Function that returns, or raises :class:`UserError`.
        suffix: Suffix of the file format, which determines the mutations; empty for mutations of bytes.
        max_size: Maximum size of an input, in bytes.
    """

    run: Callable[[Path, bytes], None]
    suffix: str
    max_size: int


TARGETS = {
    "card": Target(read_card, "json", 1 << 15),
    "table": Target(read_table, "", 1 << 12),
    "ranges": Target(read_ranges_files, "", 1 << 13),
    "graph": Target(read_graph, "onnx", 1 << 14),
}
