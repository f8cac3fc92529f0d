"""ONNX graphs of ours: read with suspicion, and run by ONNX Runtime.

The libraries that parse and compile graphs are written for graphs that are well-formed. So an artifact's graph is
checked before one of them sees it, and what they refuse all the same becomes one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto

from vpr.artifacts.store import Artifact, Card, reraise_as_artifact_error
from vpr.common.errors import UserError, explain_system_error
from vpr.inference.onnx_session import CPU, INPUT, OUTPUT, open_session

_DOMAINS = ("", "ai.onnx")
_BODIES = (AttributeProto.GRAPH, AttributeProto.GRAPHS, AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS)


def load_graph(artifact: Artifact) -> onnx.ModelProto:
    """The checked graph of an ``onnx`` artifact; :class:`UserError` where it is none that an export writes."""
    with reraise_as_artifact_error(artifact):
        # External data would be read from wherever the file says; our graphs have none.
        graph = onnx.load(artifact.file("model.onnx"), load_external_data=False)
        check_graph(graph, artifact.card)
    return graph


def check_graph(graph: onnx.ModelProto, card: Card) -> None:
    """Refuse a graph that is not well-formed, has what no export of ours has, or does not do what its card says.

    Raises:
        UserError: weights in other files, loops, functions, operators of other domains, or other inputs and outputs.
        onnx.checker.ValidationError: by ONNX's own rules.
        onnx.shape_inference.InferenceError: shapes that contradict each other.
    """
    body = graph.graph
    attributes = [attribute for node in body.node for attribute in node.attribute]
    tensors = [tensor for attribute in attributes for tensor in (attribute.t, *attribute.tensors)]
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in (*body.initializer, *tensors)):
        raise UserError("a weight lies in another file")
    if graph.functions or body.sparse_initializer or any(attribute.type in _BODIES for attribute in attributes):
        raise UserError("it has functions, loops or sparse weights")
    # OpenVINO 2026.4 searches for ever for the operators of an opset that is yet to come.
    latest = onnx.defs.onnx_opset_version()
    if any(one.domain not in _DOMAINS or not 1 <= one.version <= latest for one in graph.opset_import):
        raise UserError(f"it needs an opset other than ONNX's 1 to {latest}")
    if stranger := next((node for node in body.node if node.domain not in _DOMAINS), None):
        raise UserError(f"node '{stranger.name}' ({stranger.op_type}) is of the domain '{stranger.domain}'")
    texts = [text for node in body.node for text in (node.name, node.op_type, *node.input, *node.output)]
    try:
        "".join([*texts, *(tensor.name for tensor in body.initializer)]).encode()
    except (TypeError, UnicodeEncodeError):  # what protobuf makes of bytes that are no UTF-8
        raise UserError("a name in it is no text") from None
    onnx.checker.check_model(graph, full_check=True)
    names = [*(one.name for one in body.input), *(one.name for one in body.initializer)]
    names += [name for node in body.node for name in node.output if name]
    if len(set(names)) != len(names):
        raise UserError("two tensors have the same name")
    if card.preprocess is None or card.embedding is None:
        raise UserError("its card has no preprocessing or no embedding")
    _check_interface(body.input, INPUT, [3, card.preprocess.size, card.preprocess.size])
    _check_interface(body.output, OUTPUT, [card.embedding.dim])


def _check_interface(values: Sequence[onnx.ValueInfoProto], name: str, shape: list[int]) -> None:
    kinds = [value.type.tensor_type for value in values]
    found = [
        (value.name, kind.elem_type, [dim.dim_value for dim in kind.shape.dim[1:]], kind.shape.dim[0].dim_value)
        for value, kind in zip(values, kinds, strict=True)
        if kind.shape.dim
    ]
    if len(found) != len(values) or found != [(name, TensorProto.FLOAT, shape, 0)]:
        wanted = ", ".join(map(str, ["batch", *shape]))
        raise UserError(f"its card asks for the one tensor '{name}' of ({wanted}) float32, the graph has another")


class GraphSession:
    """An ONNX Runtime session, whose refusals are lines.

    Args:
        graph: to run.
        threads: on the CPU; 0 is one per core.
        provider: ONNX Runtime's name of what runs it.

    Raises:
        UserError: ONNX Runtime does not take the graph, or does not have the provider
            (:class:`vpr.inference.onnx_session.ProviderMissing`).
    """

    def __init__(self, graph: onnx.ModelProto, threads: int = 0, provider: str = CPU) -> None:
        fp8 = any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in graph.graph.initializer)
        with reraise_as_graph_error("onnxruntime"):
            self._session = open_session(graph.SerializeToString(), threads, provider, fp8 and provider == CPU)

    def run(self, names: Sequence[str], inputs: Mapping[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Some of the graph's outputs, in the order of their names; :class:`UserError` where it fails."""
        with reraise_as_graph_error("onnxruntime"):
            return self._session.run(list(names), dict(inputs))

    def embed(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, 3, size, size) float32 to the graph's (n, dim) float32."""
        return self.run([OUTPUT], {INPUT: batch})[0]


def session_with_outputs(graph: onnx.ModelProto, names: Iterable[str]) -> GraphSession:
    """A session of a graph that gives some of its inner tensors too.

    Args:
        graph: not changed; of a tensor whose type it does not tell, FP32 is taken.
        names: of the tensors.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    present = {value.name for value in watched.graph.output}
    kinds = {value.name: value.type.tensor_type.elem_type for value in watched.graph.value_info}
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None)
        for name in names
        if name not in present
    )
    return GraphSession(watched)


@contextmanager
def reraise_as_graph_error(library: str) -> Iterator[None]:
    """Turn what a library, or a change of ours, says of a graph into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # their exceptions have no base of their own
        if explain_system_error(error):  # what the machine lacks is no fault of the graph
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{library}: cannot run the graph ({reason}): export the student again") from None
