"""Golden vectors, read by a client without this toolkit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
import pytest

from experiments.serving.clients import TEN_LINES
from export.config import EngineConfig, Int8Config, OnnxConfig
from export.diagnosis import PipelineVectors, diagnose
from export.golden import load_golden
from export.int8 import export_int8
from export.tensorrt.build import build_engine
from export.to_onnx import export_onnx, load_onnx
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data import golden
from vpr.imaging.decode import decode
from vpr.imaging.pipelines import departures
from vpr.inference.onnx_graph import GraphSession


def test_client_reproduces_the_golden_vectors(fp32: Path) -> None:
    artifact = load_artifact(fp32)
    folder = fp32 / "golden"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    assert tuple(names) == golden.IMAGES
    assert {f"golden/{name}" for name in names} <= set(artifact.card.files)
    inputs, embeddings = (np.load(folder / name) for name in ("inputs.npy", "embeddings.npy"))
    session = ort.InferenceSession(fp32 / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"pixels": inputs})[0], embeddings, atol=1e-5)
    preprocess = artifact.card.preprocess
    assert preprocess is not None
    for row, name in enumerate(names):
        pixels = preprocess.pixels(decode(folder / name, shortest=preprocess.size))
        np.testing.assert_array_equal(inputs[row], preprocess.normalise(pixels[None])[0])
    own = np.stack([TEN_LINES.input((folder / name).read_bytes(), preprocess) for name in names])
    cosines = (session.run(None, {"pixels": own})[0] * embeddings).sum(axis=1)
    assert cosines.min() > 0.99


def test_quantised_graph_has_vectors_of_its_values(fp32: Path, ranges: Path, tmp_path: Path) -> None:
    path = export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "int8"), base="fp32"))
    quantised, original = load_golden(load_artifact(path)), load_golden(load_artifact(fp32))
    np.testing.assert_array_equal(quantised.inputs, original.inputs)
    cosines = (quantised.embeddings * original.embeddings).sum(axis=1)
    assert 0.9 < cosines.min() < cosines.max() < 1 - 1e-7
    engine = build_engine(EngineConfig(str(path), str(tmp_path / "engine"), backend="tensorrt-rtx"))
    copied = load_golden(load_artifact(engine))
    np.testing.assert_array_equal(copied.embeddings, quantised.embeddings)
    assert copied.images == quantised.images


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_graph_of_uint8_has_inputs_of_its_own_kind(
    student_artifact: Path, tmp_path: Path, layout: Literal["NCHW", "NHWC"]
) -> None:
    """The same images; a client's mistake is named as for a graph of floats, except normalisation, which is inside."""
    path = export_onnx(
        OnnxConfig(str(student_artifact), str(tmp_path / "graph"), images=1, input="uint8", layout=layout)
    )
    artifact = load_artifact(path)
    preprocess, vectors = artifact.card.preprocess, load_golden(artifact)
    assert preprocess is not None
    assert vectors.inputs.dtype == np.uint8
    assert vectors.inputs.shape == (len(golden.IMAGES), *preprocess.input_shape)
    floats = load_golden(load_artifact(export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "f"), images=1))))
    np.testing.assert_allclose((vectors.embeddings * floats.embeddings).sum(axis=1), 1, atol=1e-5)
    session = ort.InferenceSession(path / "model.onnx")
    swapped = vectors.inputs[..., ::-1] if layout == "NHWC" else vectors.inputs[:, ::-1]
    client = session.run(None, {"pixels": np.ascontiguousarray(swapped)})[0]
    run = GraphSession(load_onnx(path)[0]).embed
    known = PipelineVectors(vectors, preprocess, run)
    assert diagnose(vectors, client, known).pipeline.departures == {"colour": "bgr"}
    assert diagnose(vectors, floats.embeddings, known).agrees
    assert not [name for name in departures(preprocess) if name.startswith("normalisation")]


@pytest.fixture
def rewrite(fp32: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """Write the graph again with other golden files."""
    source = load_artifact(fp32)

    def make(**files: np.ndarray) -> Artifact:
        with write_artifact(tmp_path / "changed", "onnx", source.card.config, source.card.parents) as draft:
            draft.preprocess, draft.embedding = source.card.preprocess, source.card.embedding
            for name in source.card.files:
                (draft.path / name).parent.mkdir(exist_ok=True)
                (draft.path / name).write_bytes(source.file(name).read_bytes())
            for name, values in files.items():
                np.save(draft.path / "golden" / f"{name}.npy", values)
        return load_artifact(tmp_path / "changed")

    return make


@pytest.mark.parametrize(
    "files",
    [
        {"embeddings": np.ones((8, 3), np.float32)},
        {"embeddings": np.zeros((8, 32), np.float32)},
        {"inputs": np.ones((8, 3, 32, 32), np.float64)},
        {"inputs": np.ones((7, 3, 32, 32), np.float32)},
    ],
)
def test_vectors_that_contradict_the_card_are_rejected(
    rewrite: Callable[..., Artifact], files: dict[str, np.ndarray]
) -> None:
    with pytest.raises(UserError, match=r"changed: not a usable onnx \(.*\)\. Make it again\."):
        load_golden(rewrite(**files))


def test_artifact_of_an_earlier_version_is_an_error(fp32: Path, tmp_path: Path) -> None:
    source = load_artifact(fp32)
    with write_artifact(tmp_path / "old", "onnx", source.card.config, source.card.parents) as draft:
        (draft.path / "model.onnx").write_bytes((fp32 / "model.onnx").read_bytes())
        draft.preprocess, draft.embedding = source.card.preprocess, source.card.embedding
    with pytest.raises(UserError, match="old: it has no golden vectors, .*Export the model again to another --output"):
        load_golden(load_artifact(tmp_path / "old"))
