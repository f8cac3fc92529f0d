"""A served model of a few weights, and the client in the README of its hand-off."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper, numpy_helper

from tests.vpr.gallery.shop import Vectors
from vpr.artifacts.card import Embedding, TensorSpec
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.imaging.preprocess import Preprocess

PREPROCESS = Preprocess(size=16)


def write_served_model(folder: Path, dim: int) -> str:
    """Write ``student`` and its graph ``fp32``: the mean colour times a matrix, normalised."""
    with write_artifact(folder / "student", "student", {}) as draft:
        (draft.path / "weights").write_text("student")
        draft.preprocess, draft.embedding = PREPROCESS, Embedding(dim=dim, normalised=True, dtype="float32")
    student = load_artifact(folder / "student")
    weight = np.random.default_rng(0).normal(size=(3, dim)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["product"]),
        helper.make_node("LpNormalization", ["product"], ["embedding"], axis=1, p=2),
    ]
    weights = [numpy_helper.from_array(np.array([2, 3]), "axes"), numpy_helper.from_array(weight, "weight")]
    shapes: dict[str, list[int | str]] = {"pixels": ["batch", 3, 16, 16], "embedding": ["batch", dim]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(nodes, "mean", [values["pixels"]], [values["embedding"]], weights)
    with write_artifact(folder / "fp32", "onnx", {}, [student.as_parent("student")]) as draft:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, draft.path / "model.onnx")
        draft.preprocess, draft.embedding = student.card.preprocess, student.card.embedding
        draft.inputs, draft.outputs = ([TensorSpec(name=n, dtype="float32", shape=shapes[n])] for n in shapes)
    return str(folder / "fp32")


def run_client(output: Path, queries: Vectors) -> list[Any]:
    """Run the client in a hand-off's README with the embeddings of the queries; return what it prints."""

    class Server:
        def __init__(self, url: str) -> None:
            assert url == "localhost:8001"

        def infer(self, name: str, inputs: list[triton.InferInput]) -> Server:
            assert (name, inputs[0].name(), inputs[0].shape()) == ("fp32", "pixels", [len(queries), 3, 16, 16])
            return self

        def as_numpy(self, name: str) -> Vectors:
            assert name == "embedding"
            return queries

    code = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[0]
    printed: list[Any] = []
    batch = np.zeros((len(queries), 3, 16, 16), dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "InferenceServerClient", Server)
        patch.chdir(output)
        exec(code, {"batch": batch, "print": printed.append})
    return printed[0]
