"""The ensemble that takes image files: its configuration by Triton's schema, its Python model outside Triton."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from experiments.serving.triton_model import PythonModel
from export.config import OnnxConfig, ServingConfig
from export.golden import load_golden, model_inputs
from export.serving import export_serving
from export.to_onnx import export_onnx
from export.triton import Scheduling, preprocess_config, to_text
from export.verify import verify
from export.verify_config import VerifyConfig
from student.embed import EmbedConfig, embed_catalog
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.imaging import limits
from vpr.imaging.formats import FORMATS
from vpr.imaging.preprocess import Preprocess

_STRING, _FP32 = 13, 11  # of Triton's enumeration DataType
SCHEDULING = Scheduling(max_batch=8, preferred=(), queue_delay_us=0, instances=1, device="cpu")


@pytest.fixture(scope="module")
def graph(student_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(OnnxConfig(str(student_artifact), str(tmp_path_factory.mktemp("ensemble") / "fp32"), images=1))


@pytest.fixture(scope="module")
def serving(graph: Path, student_artifact: Path, catalog: Catalog) -> Path:
    assert catalog.artifact is not None
    gallery = str(graph.parent / "embeddings")
    embed_catalog(EmbedConfig(str(student_artifact), str(catalog.artifact.path), gallery, split="test"))
    config = ServingConfig(str(graph), gallery, str(graph.parent / "serving"), "shop", instances=2, accept_images=True)
    return export_serving(config)


def read_config(serving: Path, name: str) -> ModelConfig:
    """Parse a configuration by Triton's schema, which rejects unknown fields."""
    return text_format.Parse((serving / "model_repository" / name / "config.pbtxt").read_text(), ModelConfig())


def test_repository_has_three_models(serving: Path) -> None:
    names = sorted(path.name for path in (serving / "model_repository").iterdir())
    assert names == ["shop", "shop-images", "shop-preprocess"]
    for name in names:
        assert read_config(serving, name).name == name
        assert list((serving / "model_repository" / name / "1").iterdir())
    readme = (serving / "README.md").read_text()
    assert 'infer("shop-images", [files])' in readme
    assert "--endpoint http://localhost:8000/v2/models/shop-images" in readme
    assert "{{" not in readme


def test_ensemble_connects_tensors_of_its_steps(serving: Path) -> None:
    ensemble, model = read_config(serving, "shop-images"), read_config(serving, "shop")
    preprocessing = read_config(serving, "shop-preprocess")
    assert (ensemble.platform, preprocessing.backend) == ("ensemble", "python")
    assert {config.max_batch_size for config in (ensemble, model, preprocessing)} == {32}
    assert [(spec.name, spec.data_type, list(spec.dims)) for spec in ensemble.input] == [("image", _STRING, [1])]
    assert ensemble.input == preprocessing.input
    assert ensemble.output == model.output
    ((output,), (pixels,)) = preprocessing.output, model.input
    assert (output.name, output.data_type, list(output.dims)) == (pixels.name, _FP32, list(pixels.dims))
    first, second = ensemble.ensemble_scheduling.step
    assert (first.model_name, first.model_version) == ("shop-preprocess", -1)
    assert (second.model_name, second.model_version) == ("shop", -1)
    assert dict(first.input_map) == {"image": "image"}
    assert dict(first.output_map) == {output.name: "pixels"}
    assert dict(second.input_map) == {pixels.name: "pixels"}
    assert dict(second.output_map) == {model.output[0].name: ensemble.output[0].name}
    (group,) = preprocessing.instance_group
    assert (group.kind, group.count) == (ModelInstanceGroup.KIND_CPU, 2)


def test_image_files_give_the_golden_embeddings(serving: Path, graph: Path) -> None:
    golden = load_golden(load_artifact(serving))
    inputs = PythonModel(serving / "model_repository" / "shop-preprocess").infer(list(golden.images.values()))
    np.testing.assert_array_equal(inputs, golden.inputs)
    session = ort.InferenceSession(serving / "model_repository" / "shop" / "1" / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"pixels": inputs})[0], golden.embeddings, atol=1e-5)
    vectors = str(graph / "golden" / "embeddings.npy")
    assert min(verify(VerifyConfig(str(serving), vectors)).cosines.values()) > 0.99999


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(size=224),
        Preprocess(size=64, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        Preprocess(size=48, resize="shortest", crop="center", crop_pct=0.875),
        Preprocess(size=160, resize="shortest", crop="center", crop_pct=0.95, interpolation="bilinear"),
    ],
)
def test_pixels_are_those_of_the_toolkit(preprocess: Preprocess, graph: Path, tmp_path: Path) -> None:
    artifact = load_artifact(graph)
    (tmp_path / "1").mkdir()
    fields = preprocess_config("p", artifact, preprocess, SCHEDULING)
    (tmp_path / "config.pbtxt").write_text(to_text(fields), encoding="utf-8")
    source = Path(__file__).parents[2] / "export" / "triton_preprocess.py"
    (tmp_path / "1" / "model.py").write_bytes(source.read_bytes())
    images = {**load_golden(artifact).images, **_more_images()}
    actual = PythonModel(tmp_path).infer(list(images.values()))
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, model_inputs(images, preprocess))


def _more_images() -> dict[str, bytes]:
    """Return files of other formats and modes: palettes, 16 bits, orientations, a long image."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (50, 70), dtype=np.uint16))
    cases = {
        "palette.gif": (noise.quantize(16), {"transparency": 3}),
        "deep.png": (deep, {}),
        "grey-alpha.png": (noise.convert("LA"), {}),
        "photo.webp": (noise, {"quality": 70}),
        "long.png": (noise.resize((900, 60)), {}),
        "cmyk.jpg": (noise.convert("CMYK"), {}),
        "large.jpg": (noise.resize((1200, 900)), {"quality": 60}),
    }
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases[f"turned-{orientation}.png"] = (noise, {"exif": exif})
    files = {}
    for name, (image, options) in cases.items():
        stream = io.BytesIO()
        image.save(stream, {"jpg": "JPEG"}.get(name[-3:], name.rpartition(".")[2].upper()), **options)
        files[name] = stream.getvalue()
    return files


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff\xd8\xff\xe0" + bytes(10)])
def test_a_file_that_is_no_image_is_an_error_response(serving: Path, data: bytes) -> None:
    model = PythonModel(serving / "model_repository" / "shop-preprocess")
    with pytest.raises(UserError, match="image: cannot be read"):
        model.infer([data])
    image = (serving / "golden" / "3-png.png").read_bytes()
    assert model.infer([image]).shape == (1, 3, 32, 32)


def test_large_images_are_rejected_before_they_are_decoded(serving: Path) -> None:
    model = PythonModel(serving / "model_repository" / "shop-preprocess")
    stream = io.BytesIO()
    Image.new("1", (12_000, 10_000)).save(stream, "PNG")
    with pytest.raises(UserError, match="12000x10000 pixels, more than 100000000"):
        model.infer([stream.getvalue()])
    module = vars(type(model.model))["preprocess"].__globals__
    assert (module["MAX_BYTES"], module["MAX_PIXELS"]) == (limits.MAX_FILE_BYTES, limits.MAX_PIXELS)
    assert module["FORMATS"] == FORMATS


def test_option_is_part_of_the_identity_only_when_set(
    serving: Path, graph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery, output = str(graph.parent / "embeddings"), str(graph.parent / "plain")
    plain = ServingConfig(str(graph), gallery, output, "shop", instances=2)
    export_serving(plain)
    assert "accept_images" not in load_artifact(output).card.config
    assert load_artifact(serving).card.config["accept_images"] is True
    assert not (Path(output) / "model_repository" / "shop-images").exists()
    capsys.readouterr()
    export_serving(plain)
    assert "up to date" in capsys.readouterr().err


def test_a_name_that_leaves_no_room_is_an_error(graph: Path, tmp_path: Path) -> None:
    gallery = str(graph.parent / "embeddings")
    config = ServingConfig(str(graph), gallery, str(tmp_path / "s"), "n" * 120, accept_images=True)
    with pytest.raises(UserError, match=r"name: expected 1 to 128 of .*n-preprocess'"):
        export_serving(config)


def test_pixels_for_a_model_that_normalises_inside(serving: Path, tmp_path: Path) -> None:
    golden = load_golden(load_artifact(serving))
    source = serving / "model_repository" / "shop-preprocess"
    text = (source / "config.pbtxt").read_text(encoding="utf-8")
    text = re.sub(r'(key: "preprocess.dtype"\n *value \{\n *string_value: )"float32"', r'\1"uint8"', text).replace(
        '"NCHW"', '"NHWC"'
    )
    assert '"uint8"' in text
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.py").write_bytes((source / "1" / "model.py").read_bytes())
    (tmp_path / "config.pbtxt").write_text(text, encoding="utf-8")
    pixels = PythonModel(tmp_path).infer(list(golden.images.values()))
    assert (pixels.shape, pixels.dtype) == ((8, 32, 32, 3), np.uint8)
    preprocess = load_artifact(serving).card.preprocess
    assert preprocess is not None
    np.testing.assert_array_equal(preprocess.normalise(pixels.transpose(0, 3, 1, 2)), golden.inputs)
