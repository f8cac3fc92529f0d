"""Linears before transposes, as PyTorch's attention over (tokens, batch, width) writes them the other way round.

ONNX Runtime 1.31 crashes while it loads an FP16 graph with a Transpose before a MatMul: its ``MatmulTransposeFusion``
makes an operator that has no FP16 kernel on CPUs. After the move a linear reads the LayerNormalization itself, so that
calibration can smooth it.
"""

import onnx
from onnx import helper


def move_transposes(graph: onnx.ModelProto) -> None:
    """Move every Transpose that keeps the last axis past the following product with a constant matrix, in place."""
    body = graph.graph
    matrices = {tensor.name for tensor in body.initializer if len(tensor.dims) == 2}
    transposes = {node.output[0]: node for node in body.node if node.op_type == "Transpose"}
    nodes: list[onnx.NodeProto] = []
    for node in body.node:
        nodes.append(node)
        before = transposes.get(node.input[0]) if node.op_type == "MatMul" and node.input[1] in matrices else None
        perm = [] if before is None else list(before.attribute[0].ints) if before.attribute else []
        if before is None or not perm or perm[-1] != len(perm) - 1:
            continue
        output = node.output[0]
        node.input[0], node.output[0] = before.input[0], f"{output}/straight"
        name = f"{node.name.rpartition('/')[0]}/Transpose"
        nodes.append(helper.make_node("Transpose", [node.output[0]], [output], name, perm=perm))
    used = {name for node in nodes for name in node.input} | {value.name for value in body.output}
    kept = [node for node in nodes if node.op_type != "Transpose" or node.output[0] in used]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del body.node[:]
    body.node.extend(copies)
