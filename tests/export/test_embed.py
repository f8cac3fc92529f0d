"""One command that embeds with every kind of model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.random_teacher import write_random_teacher
from export import embed as embed_module
from export.backends.registry import models_of
from export.config import EmbedConfig, EngineConfig, OnnxConfig, ServingConfig
from export.embed import choose_backend, embed_catalog
from export.serving import export_serving
from export.tensorrt.build import build_engine
from export.to_onnx import export_onnx
from student.embed import embed_catalog as embed_with_student
from teacher.config import TowerConfig
from teacher.embed import embed_catalog as embed_with_teacher
from vpr.artifacts.store import load_artifact
from vpr.cli import main
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.config import EmbedConfig as ShortConfig
from vpr.retrieval.embeddings import load_embeddings


@pytest.fixture(scope="module")
def images(catalog: Catalog) -> str:
    assert catalog.artifact is not None
    return str(catalog.artifact.path)


@pytest.fixture(scope="module")
def graph(student_artifact: Path) -> Path:
    return export_onnx(OnnxConfig(str(student_artifact), str(student_artifact.parent / "embedding"), images=1))


def test_short_forms_write_the_same_artifact(student_artifact: Path, images: str, tmp_path: Path) -> None:
    teacher = write_random_teacher(tmp_path / "teacher", TowerConfig("sample-vit", "", image_size=32))
    for model, short in ((student_artifact, embed_with_student), (teacher, embed_with_teacher)):
        output = tmp_path / f"{model.name}-vectors"
        short(ShortConfig(str(model), images, str(output), split="test"))
        before = (output / "card.json").stat().st_mtime_ns
        embed_catalog(EmbedConfig(str(model), images, str(output), split="test"))
        assert (output / "card.json").stat().st_mtime_ns == before


def test_graph_gives_the_embeddings_of_its_student(
    student_artifact: Path, graph: Path, images: str, tmp_path: Path
) -> None:
    expected = load_embeddings(
        embed_with_student(ShortConfig(str(student_artifact), images, str(tmp_path / "student"), split="test"))
    )
    for backend in ("onnxruntime-cpu", "openvino"):
        output = tmp_path / backend
        words = ["embed", "--model", str(graph), "--catalog", images, "--split", "test", "--backend", backend]
        main([*words, "--batch-size", "4", "--images-per-part", "4", "--output", str(output)])
        vectors = load_embeddings(output)
        np.testing.assert_allclose(vectors.vectors, expected.vectors, atol=1e-5)
        assert vectors.model == load_artifact(graph).as_parent("model")
        assert vectors.artifact.card.config["backend"] == backend
    served = export_serving(ServingConfig(str(graph), str(output), str(tmp_path / "serving"), device="cpu"))
    assert (served / "gallery" / "index.faiss").is_file()


def test_uint8_graph_embeds_and_serves(student_artifact: Path, images: str, tmp_path: Path) -> None:
    config = OnnxConfig(str(student_artifact), str(tmp_path / "uint8"), images=1, input="uint8", layout="NHWC")
    uint8 = export_onnx(config)
    vectors = embed_catalog(EmbedConfig(str(uint8), images, str(tmp_path / "vectors"), split="test"))
    expected = embed_with_student(ShortConfig(str(student_artifact), images, str(tmp_path / "student"), split="test"))
    np.testing.assert_allclose(load_embeddings(vectors).vectors, load_embeddings(expected).vectors, atol=1e-5)
    export_serving(ServingConfig(str(uint8), str(expected), str(tmp_path / "serving"), device="cpu"))


def test_int8_is_not_left_to_openvino_where_it_saturates(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = load_artifact(graph)
    int8 = SimpleNamespace(card=artifact.card.model_copy(update={"config": {"precision": "int8"}}), path=graph)
    monkeypatch.setattr(embed_module, "models_of", lambda _, names: models_of(artifact, names))
    for lacks_vnni, expected in ((True, "onnxruntime-cpu"), (False, "openvino")):
        monkeypatch.setattr(embed_module, "lacks_vnni", lambda lacks=lacks_vnni: lacks)
        assert choose_backend(int8).backend == expected  # type: ignore[arg-type]
        assert choose_backend(artifact).backend == "openvino"


def test_split_without_images_is_named(student_artifact: Path, images: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split: .* has no images in split 'tset', but in: .*test"):
        embed_catalog(EmbedConfig(str(student_artifact), images, str(tmp_path / "vectors"), split="tset"))


def test_backend_that_cannot_run_the_model_is_rejected(
    student_artifact: Path, graph: Path, images: str, tmp_path: Path
) -> None:
    def embed(model: Path, backend: str = "auto") -> None:
        embed_catalog(EmbedConfig(str(model), images, str(tmp_path / "vectors"), backend=backend))

    with pytest.raises(UserError, match="backend: torch runs no artifacts of kind onnx"):
        embed(graph, "torch")
    with pytest.raises(UserError, match="backend: openvino runs no artifacts of kind student"):
        embed(student_artifact, "openvino")
    with pytest.raises(UserError, match="backend: unknown backend 'onnx'. Choose from auto, torch"):
        embed(graph, "onnx")
    half = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp16"), precision="fp16", images=1))
    engine = build_engine(EngineConfig(str(half), str(tmp_path / "engine"), "tensorrt-rtx", "sm86"))
    with pytest.raises(UserError, match=r"engine: no backend can run it here \(tensorrt-rtx: "):
        embed(engine)
    assert not (tmp_path / "vectors").exists()
