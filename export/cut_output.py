"""Embeddings cut to their first dimensions inside a graph."""

import numpy as np
import onnx

from vpr.inference.onnx_file import check_well_formed

_SMALLEST_LENGTH = 1e-12  # as in torch.nn.functional.normalize


def cut_output(graph: onnx.ModelProto, dimensions: int) -> onnx.ModelProto:
    """Return the graph with the first ``dimensions`` of its (batch, dim) output, scaled to length 1."""
    cut = onnx.ModelProto()
    cut.CopyFrom(graph)
    body, (output,) = cut.graph, cut.graph.output
    full, constants = "cut/embedding", {"start": [0], "end": [dimensions], "axis": [1]}
    for node in body.node:
        for names in (node.input, node.output):
            names[:] = [full if name == output.name else name for name in names]
    for name, value in constants.items():
        body.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), f"cut/{name}"))
    smallest = np.array(_SMALLEST_LENGTH, np.float32)
    body.initializer.append(onnx.numpy_helper.from_array(smallest, "cut/smallest"))
    operators = (
        ("Slice", [full, "cut/start", "cut/end", "cut/axis"], "cut/prefix"),
        ("ReduceL2", ["cut/prefix", "cut/axis"], "cut/length"),
        ("Max", ["cut/length", "cut/smallest"], "cut/divisor"),
        ("Div", ["cut/prefix", "cut/divisor"], output.name),
    )
    for operator, inputs, name in operators:
        body.node.append(onnx.helper.make_node(operator, inputs, [name], f"cut/{operator}"))
    output.type.tensor_type.shape.dim[1].dim_value = dimensions
    check_well_formed(cut)
    return cut
