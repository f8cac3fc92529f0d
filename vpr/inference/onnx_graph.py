"""Validation of untrusted ONNX graphs, and sessions that run them in ONNX Runtime.

Runtimes parse and compile graphs as if they were well-formed. So :func:`check_graph` validates an artifact's graph
first, and errors that a library raises later become one-line messages.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto

from vpr.artifacts.card import Card
from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError, explain_system_error
from vpr.imaging.preprocess import ModelInput
from vpr.inference.onnx_file import check_well_formed, detach_weights, read_graph
from vpr.inference.onnx_session import CPU, INPUT, OUTPUT, open_session

_DOMAINS = ("", "ai.onnx")
_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
_SPARSE = (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS)


def load_graph(artifact: Artifact) -> onnx.ModelProto:
    """Load the graph of an ``onnx`` artifact; raise :class:`UserError` if it is not one that an export writes."""
    with reraise_as_artifact_error(artifact):
        graph = read_graph(artifact)
        check_graph(graph, artifact.card)
    return graph


def check_graph(graph: onnx.ModelProto, card: Card) -> None:
    """Check that a graph is well-formed, has only features that exports write, and matches its card.

    Raises:
        UserError: Weights in other files, loops, functions, operators of other domains, or other inputs and outputs.
        onnx.checker.ValidationError: The graph breaks ONNX's rules.
        onnx.shape_inference.InferenceError: Shapes contradict each other.
    """
    body = graph.graph
    attributes = [attribute for node in body.node for attribute in node.attribute]
    tensors = [tensor for attribute in attributes for tensor in (attribute.t, *attribute.tensors)]
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in (*body.initializer, *tensors)):
        raise UserError("it stores a weight in another file")
    has_forbidden = any(attribute.type in (*_GRAPHS, *_SPARSE) for attribute in attributes)
    if graph.functions or body.sparse_initializer or has_forbidden:
        raise UserError("it has functions, loops or sparse weights")
    # OpenVINO 2026.4 never returns from its search for operators of an unknown opset.
    latest = onnx.defs.onnx_opset_version()
    if any(opset.domain not in _DOMAINS or not 1 <= opset.version <= latest for opset in graph.opset_import):
        raise UserError(f"it needs an opset other than ONNX's 1 to {latest}")
    if custom := next((node for node in body.node if node.domain not in _DOMAINS), None):
        raise UserError(f"node '{custom.name}' ({custom.op_type}) is of the domain '{custom.domain}'")
    texts = [text for node in body.node for text in (node.name, node.op_type, *node.input, *node.output)]
    try:
        "".join([*texts, *(tensor.name for tensor in body.initializer)]).encode()
    except (TypeError, UnicodeEncodeError):  # protobuf's result for bytes that are not UTF-8
        raise UserError("a name in it is not UTF-8 text") from None
    check_well_formed(graph)
    names = [*(value.name for value in body.input), *(tensor.name for tensor in body.initializer)]
    names += [name for node in body.node for name in node.output if name]
    if len(set(names)) != len(names):
        raise UserError("two tensors have the same name")
    if card.preprocess is None or card.embedding is None:
        raise UserError("its card has no preprocessing or no embedding")
    _check_interface(body.input, INPUT, list(card.preprocess.input_shape), card.preprocess.dtype)
    _check_interface(body.output, OUTPUT, [card.embedding.dim], "float32")


def _check_interface(values: Sequence[onnx.ValueInfoProto], name: str, shape: list[int], dtype: str) -> None:
    types = [value.type.tensor_type for value in values]
    interface = [
        (value.name, tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim[1:]], tensor.shape.dim[0].dim_value)
        for value, tensor in zip(values, types, strict=True)
        if tensor.shape.dim
    ]
    expected_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    if len(interface) != len(values) or interface != [(name, expected_type, shape, 0)]:
        expected = ", ".join(map(str, ["batch", *shape]))
        raise UserError(f"its card requires the one tensor '{name}' of ({expected}) {dtype}, the graph differs")


class GraphSession:
    """ONNX Runtime session that raises :class:`UserError` on failure.

    With 0 ``threads`` it uses one CPU thread per core. ``outputs`` names inner tensors to output too. A missing
    ``provider`` raises :class:`vpr.inference.onnx_session.ProviderMissing`.
    """

    def __init__(
        self, graph: onnx.ModelProto, threads: int = 0, provider: str = CPU, outputs: Sequence[str] = ()
    ) -> None:
        is_fp8 = any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in graph.graph.initializer)
        with reraise_as_graph_error("onnxruntime"):
            # The session reads the detached weights where they are.
            outline, self._weights = detach_weights(graph)
            content = _add_outputs(outline, outputs).SerializeToString()
            self._session = open_session(content, threads, provider, is_fp8 and provider == CPU, self._weights)

    def run(self, names: Sequence[str], inputs: Mapping[str, ModelInput]) -> list[NDArray[np.float32]]:
        """Run the graph and return the named outputs in this order; raise :class:`UserError` on failure."""
        with reraise_as_graph_error("onnxruntime"):
            return self._session.run(list(names), dict(inputs))

    def embed(self, batch: ModelInput) -> NDArray[np.float32]:
        """Embed a batch of the input that the card states as (n, dim) float32."""
        return self.run([OUTPUT], {INPUT: batch})[0]


def session_with_outputs(graph: onnx.ModelProto, names: Iterable[str]) -> GraphSession:
    """Open a session of a graph that also outputs inner tensors; those without a type count as FP32."""
    return GraphSession(graph, outputs=list(names))


def _add_outputs(graph: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of a graph with more outputs; the graph itself if there are none."""
    if not names:
        return graph
    extended = onnx.ModelProto()
    extended.CopyFrom(graph)
    outputs = {value.name for value in extended.graph.output}
    dtypes = {value.name: value.type.tensor_type.elem_type for value in extended.graph.value_info}
    for name in (name for name in names if name not in outputs):
        dtype = dtypes.get(name, TensorProto.FLOAT)
        extended.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    return extended


@contextmanager
def reraise_as_graph_error(library: str) -> Iterator[None]:
    """Raise errors of a library, or of a graph transformation, as a one-line :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries have no common base exception
        if explain_system_error(error):  # not a fault of the graph
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{library}: cannot run the graph ({reason}). Export the model again.") from None
