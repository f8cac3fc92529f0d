"""The serving artifact, read as Triton and a client without this toolkit read it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
import onnxruntime as ort
import pyarrow.parquet as pq
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelInstanceGroup

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.random_student import write_random_student
from export import serving
from export.config import EngineConfig, Int8Config, OnnxConfig, ServingConfig
from export.int8 import export_int8
from export.serving import export_serving
from export.tensorrt.build import build_engine
from export.to_onnx import export_onnx, run_graph
from export.triton import Enumerator, to_text
from student.embed import EmbedConfig, embed_catalog
from tests.conftest import small_student
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.cli import main
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.config import SearchConfig
from vpr.retrieval.embeddings import load_embeddings, write_embeddings
from vpr.retrieval.search import search
from vpr.retrieval.search_command import search_gallery

VERSION = "11.4.0.106"


@pytest.fixture(scope="module")
def graph(student_artifact: Path) -> Path:
    """The student's FP32 graph."""
    return export_onnx(OnnxConfig(str(student_artifact), str(student_artifact.parent / "fp32"), images=1))


@pytest.fixture(scope="module")
def ranges(graph: Path, catalog: Catalog) -> Path:
    assert catalog.artifact is not None
    return calibrate(CalibrateConfig(str(graph), str(catalog.artifact.path), str(graph.parent / "ranges"), count=16))


@pytest.fixture(scope="module")
def gallery(student_artifact: Path, catalog: Catalog) -> Path:
    """The test split's embeddings by the student."""
    assert catalog.artifact is not None
    output = str(student_artifact.parent / "embeddings")
    return embed_catalog(EmbedConfig(str(student_artifact), str(catalog.artifact.path), output, split="test"))


@pytest.fixture
def write_engine(graph: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """Write an engine artifact as TensorRT's builder does, with arbitrary bytes as its plan."""
    source = load_artifact(graph)

    def make(profile: tuple[int, int, int] = (1, 8, 64), **config: Any) -> Artifact:
        min_batch, opt_batch, max_batch = profile
        values = {"onnx": str(graph), "backend": "tensorrt", "builder_version": VERSION}
        values |= {"min_batch": min_batch, "opt_batch": opt_batch, "max_batch": max_batch, **config}
        parents = [source.as_parent("onnx"), *source.parents("student")]
        with write_artifact(tmp_path / "engine", "engine", values, parents) as draft:
            (draft.path / "engine.plan").write_bytes(b"plan" * 100)
            draft.preprocess, draft.embedding = source.card.preprocess, source.card.embedding
            draft.inputs, draft.outputs = source.card.inputs, source.card.outputs
            draft.metrics = {
                "precision": "fp16",
                "builder": f"tensorrt {VERSION}",
                "targets": ["sm89"],
                "profile": list(profile),
            }
        return load_artifact(tmp_path / "engine")

    return make


def read_config(path: Path, name: str) -> ModelConfig:
    """Parse the configuration by Triton's schema, which rejects unknown fields."""
    return text_format.Parse((path / "model_repository" / name / "config.pbtxt").read_text(), ModelConfig())


def preprocess_by(config: ModelConfig, path: Path) -> NDArray[np.float32]:
    """Preprocess an image with torchvision by the configuration's parameters."""
    values = {key: value.string_value for key, value in config.parameters.items()}
    assert (values["preprocess.colour"], values["preprocess.value"]) == ("RGB", "(pixel / 255 - mean) / std")
    assert (values["preprocess.layout"], values["preprocess.dtype"]) == ("NCHW", "float32")
    size, filter = int(values["preprocess.size"]), v2.InterpolationMode(values["preprocess.interpolation"])
    resize = {
        ("squash", "none"): [v2.Resize((size, size), filter)],
        ("shortest", "center"): [v2.Resize(size, filter), v2.CenterCrop(size)],
    }[values["preprocess.resize"], values["preprocess.crop"]]
    image = np.asarray(v2.Compose(resize)(Image.open(path).convert("RGB")), dtype=np.float64)
    mean, std = json.loads(values["preprocess.mean"]), json.loads(values["preprocess.std"])
    return ((image / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)


def test_client_finds_what_vpr_search_finds(graph: Path, gallery: Path, catalog: Catalog, tmp_path: Path) -> None:
    output = export_serving(ServingConfig(str(graph), str(gallery), str(tmp_path / "serving"), name="student"))
    config = read_config(output, "student")
    part = catalog.select(split="test")
    queries = np.flatnonzero(part.roles == "query")
    batch = np.stack([preprocess_by(config, part.path(row)) for row in queries.tolist()])
    assert batch.shape[1:] == tuple(config.input[0].dims)
    model = ort.InferenceSession(output / "model_repository" / "student" / "1" / "model.onnx")
    (vectors,) = model.run([config.output[0].name], {config.input[0].name: batch})
    scores, ids = faiss.read_index(str(output / "gallery" / "index.faiss")).search(vectors, 5)
    images = np.array(pq.read_table(output / "gallery" / "rows.parquet")["image"].to_pylist())[ids]

    search_gallery(SearchConfig(str(gallery), str(gallery), output=str(tmp_path / "results.csv"), k=5))
    with (tmp_path / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = np.array([float(row["score"]) for row in rows]).reshape(-1, 5)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    names = np.array([row["image"] for row in rows]).reshape(-1, 5)
    # Rounding may swap neighbours with almost equal scores.
    is_apart = np.abs(np.diff(expected, axis=1, prepend=2, append=-2)) > 2e-5
    is_clear = is_apart[:, :-1] & is_apart[:, 1:]
    is_clear[:, -1] = False  # the sixth is unknown
    assert is_clear.mean() > 0.5
    np.testing.assert_array_equal(images[is_clear], names[is_clear])


def test_gallery_is_complete_and_ordered_as_index(graph: Path, gallery: Path, tmp_path: Path) -> None:
    output = export_serving(ServingConfig(str(graph), str(gallery), str(tmp_path / "serving"))) / "gallery"
    embeddings = load_embeddings(gallery)
    is_gallery = embeddings.roles == "gallery"
    assert 0 < is_gallery.sum() < len(is_gallery)
    vectors = np.load(output / "vectors.npy", allow_pickle=False)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, embeddings.vectors[is_gallery])
    table = pq.read_table(output / "rows.parquet")
    assert table.column_names == ["id", "image", "product", "category"]
    assert table["id"].to_pylist() == list(range(len(vectors)))
    assert table["image"].to_pylist() == embeddings.images[is_gallery].tolist()
    assert table["product"].to_pylist() == embeddings.products[is_gallery].tolist()
    index = faiss.read_index(str(output / "index.faiss"))
    assert (index.ntotal, index.metric_type) == (len(vectors), faiss.METRIC_INNER_PRODUCT)
    np.testing.assert_array_equal(index.reconstruct_n(0, index.ntotal), vectors)


def test_centre_crop_is_documented(
    graph: Path, student_artifact: Path, gallery: Path, catalog: Catalog, tmp_path: Path
) -> None:
    source, student = load_artifact(graph), load_artifact(student_artifact)
    cropped = Preprocess(size=32, resize="shortest", crop="center")
    with write_artifact(tmp_path / "cropped", "onnx", source.card.config, source.card.parents) as draft:
        (draft.path / "model.onnx").write_bytes((graph / "model.onnx").read_bytes())
        draft.preprocess, draft.embedding = cropped, source.card.embedding
        draft.inputs, draft.outputs = source.card.inputs, source.card.outputs
    changed = Artifact(student.path, student.card.model_copy(update={"preprocess": cropped}), student.sha256)
    vectors = load_embeddings(gallery).vectors
    written = write_embeddings(str(tmp_path / "e"), vectors, catalog.select(split="test"), changed, {})
    output = export_serving(ServingConfig(str(tmp_path / "cropped"), str(written), str(tmp_path / "serving")))
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((140, 90), Image.Resampling.BICUBIC)
    image.save(tmp_path / "wide.png")
    expected = cropped.normalise(cropped.pixels(image)[None])[0]
    actual = preprocess_by(read_config(output, "cropped"), tmp_path / "wide.png")
    np.testing.assert_allclose(actual, expected, atol=2.5 / 255 / 0.26)  # two of 255 levels
    assert "Resize the shorter side to 32 pixels: bicubic" in (output / "README.md").read_text()


def test_approximate_index_records_its_overlap(graph: Path, gallery: Path, tmp_path: Path) -> None:
    config = ServingConfig(str(graph), str(gallery), str(tmp_path / "serving"), index="hnsw")
    output = export_serving(config)
    index = faiss.read_index(str(output / "gallery" / "index.faiss"))
    assert isinstance(index, faiss.IndexHNSW)
    vectors = np.load(output / "gallery" / "vectors.npy")
    embeddings = load_embeddings(gallery)
    queries = embeddings.vectors[embeddings.roles == "query"]
    exact = np.argsort(-queries.astype(np.float64) @ vectors.T, axis=1, kind="stable")[:, :10]
    approximate = index.search(queries, 10)[1]
    share = np.mean([np.isin(a, b).mean() for a, b in zip(exact, approximate, strict=True)])
    assert load_artifact(output, "serving").card.metrics["index_top10_overlap"] == pytest.approx(share, abs=0.02)
    assert share > 0.8


def test_overlap_is_measured_with_images_that_the_index_lacks(gallery: Path) -> None:
    """A gallery without queries gives them: they leave the index, whose links would lead to their neighbours."""
    embeddings = load_embeddings(gallery)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(embeddings.roles), 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float32)
    rows = np.arange(len(vectors))
    alone = replace(embeddings, vectors=vectors, roles=np.full(len(vectors), "gallery"))
    index = serving._link(vectors)
    searched: list[tuple[np.ndarray, np.ndarray]] = []

    def record(queries: np.ndarray, stored: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        searched.append((queries, stored))
        return search(queries, stored, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "search", record)
        overlap = serving._measure_overlap(alone, rows, vectors, index)
        is_query = embeddings.roles == "query"
        serving._measure_overlap(replace(embeddings, vectors=vectors), rows[~is_query], vectors[~is_query], index)
    (queries, stored), (others, images) = searched
    assert len(queries) == len(vectors) // 2
    assert len(queries) + len(stored) == len(vectors)
    assert (queries @ stored.T).max() < 0.999
    assert overlap is not None
    assert 0.8 < overlap <= 1
    assert (len(others), len(images)) == (is_query.sum(), (~is_query).sum())


def test_graph_configuration(graph: Path, gallery: Path, tmp_path: Path) -> None:
    output = export_serving(
        ServingConfig(
            *(str(graph), str(gallery), str(tmp_path / "serving")),
            max_batch=16,
            preferred_batches=(4, 8),
            queue_delay_us=250,
            instances=2,
            device="cpu",
        )
    )
    config = read_config(output, "fp32")
    assert (config.name, config.platform, config.backend) == ("fp32", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 16
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert [(group.kind, group.count) for group in config.instance_group] == [(ModelInstanceGroup.KIND_CPU, 2)]
    assert config.input[0].format == ModelInput.FORMAT_NCHW
    session = ort.InferenceSession(output / "model_repository" / "fp32" / "1" / "model.onnx")
    for written, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(spec.name, list(spec.dims)) for spec in written] == [(spec.name, spec.shape[1:]) for spec in real]
        assert {spec.type for spec in real} == {"tensor(float)"}
        assert {spec.data_type for spec in written} == {11}  # TYPE_FP32
    assert [(request.batch_size, request.inputs["pixels"].dims) for request in config.model_warmup] == [
        (1, config.input[0].dims),
        (16, config.input[0].dims),
    ]
    assert not config.HasField("optimization")
    assert config.parameters["embedding.dim"].string_value == "32"
    assert config.parameters["artifact.card_sha256"].string_value == load_artifact(graph).sha256
    text = (output / "README.md").read_text()
    assert "Resize to 32 x 32 pixels, ignoring the aspect ratio: bicubic" in text
    assert "{{" not in text


def test_an_int8_graph_is_known_by_its_student(graph: Path, ranges: Path, gallery: Path, tmp_path: Path) -> None:
    mixed = Int8Config(
        str(graph), str(ranges), str(tmp_path / "int8"), base="fp32", exclude_layers=("vit.transformer.layers.0",)
    )
    int8 = export_int8(mixed)
    assert load_artifact(int8).card.metrics["precision"] == "int8-mixed"
    output = export_serving(ServingConfig(str(int8), str(gallery), str(tmp_path / "serving")))
    assert "VNNI" not in (output / "README.md").read_text()
    cpu = export_serving(ServingConfig(str(int8), str(gallery), str(tmp_path / "cpu"), device="cpu"))
    assert "Serve this model on processors with VNNI" in (cpu / "README.md").read_text()
    assert read_config(output, "int8").max_batch_size == 32
    stored = output / "model_repository" / "int8" / "1" / "model.onnx"
    # ONNX Runtime 1.20 loads at most opset 21 and IR version 10.
    handed_off, exported = onnx.load(stored), onnx.load(int8 / "model.onnx")
    assert exported.opset_import[0].version > 21
    assert handed_off.opset_import[0].version <= 21
    assert handed_off.ir_version <= 10
    assert "The graph needs ONNX Runtime 1.20 or newer." in (output / "README.md").read_text()
    assert "ORT_DISABLE_TELEMETRY=1" in (output / "README.md").read_text()
    x = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(run_graph(handed_off, x), run_graph(exported, x), atol=1e-3)


def test_engine_configuration(write_engine: Callable[..., Artifact], gallery: Path, tmp_path: Path) -> None:
    engine = write_engine()
    output = export_serving(ServingConfig(str(engine.path), str(gallery), str(tmp_path / "serving")))
    config = read_config(output, "engine")
    assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "tensorrt", 64)
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 64]
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_GPU
    assert config.optimization.cuda.graphs
    assert config.parameters["engine.builder"].string_value == f"tensorrt {VERSION}"
    assert config.parameters["engine.targets"].string_value == "sm89"
    plan = output / "model_repository" / "engine" / "1" / "model.plan"
    assert plan.read_bytes() == b"plan" * 100
    assert f"built by tensorrt {VERSION} for sm89" in (output / "README.md").read_text()
    assert "--backend-config" not in (output / "README.md").read_text()
    assert "ORT_DISABLE_TELEMETRY" not in (output / "README.md").read_text()


def test_smaller_max_batch_is_the_preferred_batch(
    write_engine: Callable[..., Artifact], gallery: Path, tmp_path: Path
) -> None:
    engine = write_engine(version_compatible=True)
    output = export_serving(ServingConfig(str(engine.path), str(gallery), str(tmp_path / "s"), max_batch=4))
    assert list(read_config(output, "engine").dynamic_batching.preferred_batch_size) == [4]
    assert "--backend-config=tensorrt,version-compatible=true" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ({"backend": "tensorrt-rtx"}, {}, r"Triton loads TensorRT engines only\. Use the graph .*fp32, or"),
        ({"backend": "tensorrt-rtx"}, {}, r"rebuild where TensorRT is installed: vpr .* --backend tensorrt"),
        ({"weight_stripped": True}, {}, r"has no weights, and Triton adds none\. Rebuild: vpr export engine"),
        ({"profile": (4, 8, 8)}, {}, r"smallest batch is 4, .*\. Rebuild: vpr export engine"),
        ({}, {"device": "cpu"}, r"device: an engine needs a GPU, got cpu\. Use the graph"),
        ({}, {"max_batch": 65}, r"max_batch: expected 1 to 64 for .*engine, got 65"),
        ({}, {"preferred_batches": (8, 65)}, r"preferred_batches: expected sizes from 1 to 64 .*, got \(8, 65\)"),
    ],
)
def test_engine_that_triton_cannot_run_is_rejected(
    write_engine: Callable[..., Artifact],
    gallery: Path,
    engine: dict[str, Any],
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    built = write_engine(**engine)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        export_serving(ServingConfig(str(built.path), str(gallery), str(tmp_path / "serving"), **changes))
    assert sorted(tmp_path.iterdir()) == before


def test_real_tensorrt_rtx_engine_is_rejected(graph: Path, ranges: Path, gallery: Path, tmp_path: Path) -> None:
    int8 = export_int8(Int8Config(str(graph), str(ranges), str(tmp_path / "int8")))
    engine = build_engine(EngineConfig(str(int8), str(tmp_path / "engine"), backend="tensorrt-rtx"))
    assert load_artifact(engine).parents("student") == load_artifact(graph).parents("student")
    with pytest.raises(UserError, match=rf"built by tensorrt-rtx, .*\. Use the graph {int8}"):
        export_serving(ServingConfig(str(engine), str(gallery), str(tmp_path / "serving")))


def test_graph_that_onnxruntime_rejects_is_an_error(graph: Path, ranges: Path, gallery: Path, tmp_path: Path) -> None:
    fp8 = export_int8(Int8Config(str(graph), str(ranges), str(tmp_path / "fp8"), base="fp32", dtype="fp8"))
    with pytest.raises(UserError, match=r"fp8: ONNX Runtime cannot load it .*\. Build an engine from it"):
        export_serving(ServingConfig(str(fp8), str(gallery), str(tmp_path / "serving")))


def test_gallery_of_another_model_is_rejected(graph: Path, gallery: Path, catalog: Catalog, tmp_path: Path) -> None:
    config = small_student("patch")
    other = write_random_student(tmp_path / "other", config)
    assert catalog.artifact is not None
    foreign = embed_catalog(EmbedConfig(str(other), str(catalog.artifact.path), str(tmp_path / "e"), split="test"))
    with pytest.raises(UserError, match="embedded with 'other', but the model is of student 'student'"):
        export_serving(ServingConfig(str(graph), str(foreign), str(tmp_path / "serving")))


@pytest.mark.parametrize("change", ["preprocess", "dimension"])
def test_mismatching_gallery_card_is_rejected(
    graph: Path, student_artifact: Path, gallery: Path, catalog: Catalog, change: str, tmp_path: Path
) -> None:
    """Cards that name the right student but have other values, written by hand or by an older version."""
    student, embeddings = load_artifact(student_artifact), load_embeddings(gallery)
    vectors, preprocess = embeddings.vectors, student.card.preprocess
    if change == "preprocess":
        preprocess = Preprocess(size=32, interpolation="bilinear")
    else:
        vectors = vectors[:, :16] / np.linalg.norm(vectors[:, :16], axis=1, keepdims=True)
    changed = Artifact(student.path, student.card.model_copy(update={"preprocess": preprocess}), student.sha256)
    written = write_embeddings(str(tmp_path / "e"), vectors, catalog.select(split="test"), changed, {})
    with pytest.raises(
        UserError, match={"preprocess": "preprocessing differs", "dimension": "embedding dimension differs"}[change]
    ):
        export_serving(ServingConfig(str(graph), str(written), str(tmp_path / "serving")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--name", "a/b"], "got 'a/b'. Set --name."),
        (["--name", ".."], "got '..'. Set --name."),
        (["--name", "a\nb"], "got 'a\\nb'. Set --name."),
        (["--max-batch", "0"], "max_batch: "),
        (["--queue-delay-us", "-1"], "queue_delay_us: "),
        (["--instances", "0"], "instances: "),
        (["--preferred-batches", "0"], "preferred_batches: expected 1 to 1024, got [0]"),
        (["--index", "ivf"], "vpr export serving --help"),
        (["--model", "GALLERY"], "expected an artifact of kind onnx or engine, got embeddings"),
        (["--gallery", "MODEL"], "expected an artifact of kind embeddings, got onnx"),
        (["--output", "MODEL"], "holds an artifact of kind onnx, expected serving"),
    ],
)
def test_bad_input_is_one_line_without_output(
    flags: list[str],
    message: str,
    graph: Path,
    gallery: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"MODEL": str(graph), "GALLERY": str(gallery)}
    valid = ["--model", str(graph), "--gallery", str(gallery), "--output", str(tmp_path / "serving")]
    with pytest.raises(SystemExit) as caught:
        main(["export", "serving", *valid, *[paths.get(flag, flag) for flag in flags]])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not list(tmp_path.iterdir())


def test_invalid_artifact_name_asks_for_name(graph: Path, gallery: Path, tmp_path: Path) -> None:
    artifact = load_artifact(graph)
    with write_artifact(tmp_path / "my model", "onnx", artifact.card.config, artifact.card.parents) as draft:
        (draft.path / "model.onnx").write_bytes((graph / "model.onnx").read_bytes())
        draft.preprocess, draft.embedding = artifact.card.preprocess, artifact.card.embedding
    with pytest.raises(UserError, match="got 'my model'. Set --name"):
        export_serving(ServingConfig(str(tmp_path / "my model"), str(gallery), str(tmp_path / "serving")))


def test_card_without_inputs_is_rejected(graph: Path, gallery: Path, tmp_path: Path) -> None:
    artifact = load_artifact(graph)
    with write_artifact(tmp_path / "bare", "onnx", artifact.card.config, artifact.card.parents) as draft:
        (draft.path / "model.onnx").write_bytes((graph / "model.onnx").read_bytes())
        draft.preprocess, draft.embedding = artifact.card.preprocess, artifact.card.embedding
    with pytest.raises(UserError, match="bare: the card lists no input and output of any batch size"):
        export_serving(ServingConfig(str(tmp_path / "bare"), str(gallery), str(tmp_path / "serving")))


def test_unchanged_export_is_skipped(
    graph: Path, gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ServingConfig(str(graph), str(gallery), str(tmp_path / "serving"))
    first = load_artifact(export_serving(config), "serving")
    assert load_artifact(export_serving(config)).sha256 == first.sha256
    assert "up to date" in capsys.readouterr().err
    assert [parent.role for parent in first.card.parents] == ["onnx", "embeddings"]


def test_text_format_round_trip() -> None:
    fields = {
        "name": 'quotes " and \\ and\nlines',
        "max_batch_size": 3,
        "input": [{"name": "a", "dims": [3, -1], "data_type": Enumerator("TYPE_FP16"), "optional": True}],
        "parameters": [{"key": "k", "value": {"string_value": "[0.1, 0.2]"}}],
    }
    config = text_format.Parse(to_text(fields), ModelConfig())
    assert config.name == 'quotes " and \\ and\nlines'
    assert (config.input[0].dims, config.input[0].data_type, config.input[0].optional) == ([3, -1], 10, True)
    assert config.parameters["k"].string_value == "[0.1, 0.2]"
    with pytest.raises(text_format.ParseError):
        text_format.Parse(to_text({"max_batch": 3}), ModelConfig())
