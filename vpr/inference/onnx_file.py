"""Graphs of any size: how they are written, read, checked and given shapes.

Protobuf serialises no message above 2 GiB. A larger graph is written as two files of its artifact: ``model.onnx`` has
the nodes and small constants, ``model.weights`` the large tensors. In memory a graph always holds all its weights.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError

MODEL_FILE, WEIGHTS_FILE = "model.onnx", "model.weights"
MAX_INLINE_BYTES = 2_000_000_000  # below protobuf's limit of 2 GiB, with room for the nodes
_MIN_EXTERNAL_BYTES = 1024  # smaller tensors may be shapes, which shape inference and parsers read
_ALIGNMENT = 4096  # runtimes map the file of weights by pages


def is_large(graph: onnx.ModelProto) -> bool:
    """Return whether protobuf cannot serialise a graph with its weights."""
    return sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > MAX_INLINE_BYTES


def save_graph(graph: onnx.ModelProto, folder: Path) -> None:
    """Write a graph into a folder, as ``model.onnx`` and, above 2 GB, ``model.weights``."""
    if not is_large(graph):
        onnx.save(graph, folder / MODEL_FILE)
        return
    with (folder / WEIGHTS_FILE).open("wb") as stream:
        outline = _copy_without_weights(graph)
        for tensor in graph.graph.initializer:
            if _is_small(tensor):
                outline.graph.initializer.append(tensor)
                continue
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            outline.graph.initializer.append(_external_entry(tensor, stream.tell()))
            stream.write(tensor.raw_data)
    onnx.save(outline, folder / MODEL_FILE)


def read_graph(artifact: Artifact) -> onnx.ModelProto:
    """Read the graph of an ``onnx`` artifact with all its weights.

    Raises:
        UserError: A weight is stored outside the artifact, or does not fit the file of weights.
        google.protobuf.message.DecodeError: The file is no graph.
    """
    graph = onnx.load(artifact.file(MODEL_FILE), load_external_data=False)
    external = [tensor for tensor in graph.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    if not external:
        return graph
    offsets = [_checked_offset(tensor, artifact) for tensor in external]
    size = artifact.card.files[WEIGHTS_FILE].size
    # Entries that share bytes would let a small file fill the memory.
    if sum(_tensor_bytes(tensor) for tensor in external) > size:
        raise UserError(f"its weights take more than the {size} bytes of {WEIGHTS_FILE}")
    with artifact.file(WEIGHTS_FILE).open("rb") as stream:
        for tensor, offset in zip(external, offsets, strict=True):
            stream.seek(offset)
            tensor.raw_data = stream.read(_tensor_bytes(tensor))
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return graph


def check_well_formed(graph: onnx.ModelProto) -> None:
    """Check a graph by ONNX's rules, with shapes; raise :class:`onnx.checker.ValidationError` or InferenceError."""
    for tensor in graph.graph.initializer if is_large(graph) else ():
        if not _is_small(tensor) and len(tensor.raw_data) != _tensor_bytes(tensor):
            raise onnx.checker.ValidationError(f"'{tensor.name}' has {len(tensor.raw_data)} bytes")
    onnx.checker.check_model(_outline(graph) if is_large(graph) else graph, full_check=True)


def infer_shapes(graph: onnx.ModelProto, strict: bool = False, data: bool = False) -> onnx.ModelProto:
    """Return a copy of a graph with the inferred types and shapes of its tensors.

    ``strict`` raises :class:`onnx.shape_inference.InferenceError` for contradictions; ``data`` propagates the values of
    shapes too.
    """
    options: dict[str, Any] = {"strict_mode": strict, "data_prop": data}
    if not is_large(graph):
        return onnx.shape_inference.infer_shapes(graph, **options)
    inferred = onnx.shape_inference.infer_shapes(_outline(graph), **options)
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for field in ("value_info", "output"):
        copy.graph.ClearField(field)
        getattr(copy.graph, field).extend(getattr(inferred.graph, field))
    return copy


def infer_types(graph: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inferred types and shapes of the inputs, the inner tensors and the outputs, without a copy."""
    outline = _outline(graph) if is_large(graph) else graph
    inferred = onnx.shape_inference.infer_shapes(outline, strict_mode=True).graph
    return [*inferred.input, *inferred.value_info, *inferred.output]


def detach_weights(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Return a graph that can be serialised, and the weights that it lacks as arrays by name; none up to 2 GB."""
    if not is_large(graph):
        return graph, {}
    outline = _copy_without_weights(graph)
    weights: dict[str, Any] = {}
    for tensor in graph.graph.initializer:
        if _is_small(tensor):
            outline.graph.initializer.append(tensor)
        else:
            outline.graph.initializer.append(_external_entry(tensor, 0))
            weights[tensor.name] = onnx.numpy_helper.to_array(tensor)
    return outline, weights


def _outline(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose large weights are inputs, for checks that need types and shapes only."""
    outline = _copy_without_weights(graph)
    for tensor in graph.graph.initializer:
        if _is_small(tensor):
            outline.graph.initializer.append(tensor)
        else:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            outline.graph.input.append(value)
    return outline


def _copy_without_weights(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Copy all fields but the weights, without a copy of the weights in between."""
    copy = onnx.ModelProto()
    _copy_fields(graph, copy, "graph")
    _copy_fields(graph.graph, copy.graph, "initializer")
    return copy


def _copy_fields(source: Any, target: Any, left_out: str) -> None:
    for field, value in source.ListFields():
        if field.name == left_out:
            continue
        if hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        elif hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)


def _is_small(tensor: TensorProto) -> bool:
    return len(tensor.raw_data) < _MIN_EXTERNAL_BYTES


def _external_entry(tensor: TensorProto, offset: int) -> TensorProto:
    entry = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    entry.data_location = TensorProto.EXTERNAL
    values = {"location": WEIGHTS_FILE, "offset": str(offset), "length": str(len(tensor.raw_data))}
    for key, value in values.items():
        entry.external_data.add(key=key, value=value)
    return entry


def _checked_offset(tensor: TensorProto, artifact: Artifact) -> int:
    """Return where a weight starts in the artifact's file of weights; :class:`UserError` if it is not stored there."""
    values: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    location, listed = values.get("location", ""), artifact.card.files
    if location != WEIGHTS_FILE or location not in listed:
        raise UserError(f"it stores weight '{tensor.name[:100]}' outside the artifact, in '{location[:100]}'")
    numbers = [values.get("offset", "0"), values.get("length", "")]
    if not all(number.isdecimal() and len(number) < 20 for number in numbers):
        raise UserError(f"the place of weight '{tensor.name[:100]}' in {WEIGHTS_FILE} is not a number")
    offset, length = map(int, numbers)
    size = _tensor_bytes(tensor)
    if length != size or offset + length > listed[WEIGHTS_FILE].size:
        problem = f"weight '{tensor.name[:100]}' needs {size} bytes, {WEIGHTS_FILE} gives other bytes"
        raise UserError(problem)
    return offset


def _tensor_bytes(tensor: TensorProto) -> int:
    """Return the bytes of a tensor's values."""
    if any(dim < 0 for dim in tensor.dims):
        raise UserError(f"weight '{tensor.name[:100]}' has a negative dimension")
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
