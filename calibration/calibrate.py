"""``vpr calibrate``: run training pictures through the FP32 graph and record INT8 ranges."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq

from calibration.ranges import MagnitudeHistogram, Method, threshold
from calibration.select import select_pictures
from vpr.artifact import find_current, load_artifact, plain, reading, write_artifact
from vpr.catalog import Catalog, load_catalog
from vpr.console import say
from vpr.embeddings import read_batches
from vpr.errors import UserError
from vpr.images import Preprocess

_BATCH = 16


@dataclass(frozen=True)
class CalibrateConfig:
    """A calibration.

    Attributes:
        onnx: FP32 ``onnx`` artifact.
        catalog: catalogue artifact; only its ``train`` split is used.
        output: where the ranges are written.
        count: pictures.
        method: how a range is chosen from what was seen.
        percentile: in percent, for the method of that name.
        seed: of the draw of pictures.
    """

    onnx: str
    catalog: str
    output: str
    count: int = 256
    method: Method = "mse"
    percentile: float = 99.99
    seed: int = 0


def calibrate(config: CalibrateConfig) -> Path:
    """Measure the inputs of every linear and write an artifact of kind ``ranges``."""
    model, catalog = load_artifact(config.onnx, "onnx"), load_catalog(config.catalog)
    if model.card.config.get("precision") != "fp32" or model.card.preprocess is None:
        raise UserError(f"{config.onnx}: ranges are measured on the FP32 graph: export it with --precision fp32")
    # The student too: its finishing asks whether the ranges are its own.
    parents = [model.as_parent("onnx"), *(one for one in model.card.parents if one.role == "student")]
    if catalog.artifact:
        parents.append(catalog.artifact.as_parent("catalog"))
    if find_current(config.output, "ranges", plain(config), parents):
        say(f"{config.output}: up to date")
        return Path(config.output)
    training = catalog.select(split="train")
    rows = select_pictures(training, config.count, config.seed)
    pictures = Catalog(training.table.take(pa.array(rows)), training.root, training.artifact)
    with reading(model):
        graph = onnx.load(model.file("model.onnx"), load_external_data=False)
    histograms = measure(graph, pictures, model.card.preprocess)
    readers: dict[str, list[str]] = {}
    for node in linear_nodes(graph):
        readers.setdefault(node.input[0], []).append(module_name(node))
    ranges = {
        name: {
            "threshold": threshold(histogram, config.method, config.percentile),
            "largest": histogram.largest,
            "linears": readers[name],
        }
        for name, histogram in histograms.items()
    }
    with write_artifact(config.output, "ranges", plain(config), parents) as draft:
        (draft.path / "ranges.json").write_text(json.dumps(ranges, indent=1), encoding="utf-8")
        pq.write_table(pictures.table.select(["image", "product", "sha256"]), draft.path / "pictures.parquet")
        draft.catalog = catalog.summary()
        draft.metrics = {"pictures": len(pictures), "tensors": len(ranges)}
    say(f"{config.output}: ranges of {len(ranges)} tensors from {len(pictures)} training pictures, by {config.method}")
    return Path(config.output)


def linear_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products with a constant matrix: what INT8 is about in a ViT."""
    constants = {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) == 2}
    return [n for n in graph.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]


def module_name(node: onnx.NodeProto) -> str:
    """The PyTorch module that a node of our export comes from, such as ``vit.transformer.layers.0.0.to_qkv``."""
    return node.name.rpartition("/")[0]


def measure(graph: onnx.ModelProto, pictures: Catalog, preprocess: Preprocess) -> dict[str, MagnitudeHistogram]:
    """Histograms of the inputs of all linears, by tensor name, batch by batch."""
    import onnxruntime as ort

    names = list(dict.fromkeys(node.input[0] for node in linear_nodes(graph)))
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    present = {value.name for value in watched.graph.output}
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in present
    )
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = session.get_inputs()[0].name
    histograms = {name: MagnitudeHistogram() for name in names}
    for batch in read_batches(pictures, preprocess, _BATCH):
        for name, values in zip(names, session.run(names, {pixels: batch}), strict=True):
            try:
                histograms[name].add(np.asarray(values))
            except ValueError:
                raise UserError(f"calibration: tensor '{name}' is not finite: check the student's weights") from None
    return histograms
