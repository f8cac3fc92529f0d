from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from vpr.data import golden
from vpr.imaging.decode import decode_bytes
from vpr.imaging.pipelines import (
    DEPARTURES,
    Pipeline,
    client_pipelines,
    departures,
    describe,
    equivalent_pipelines,
)
from vpr.imaging.preprocess import Preprocess

FILES = {name: (golden.FOLDER / name).read_bytes() for name in golden.IMAGES}
SQUASH = Preprocess(size=64)
CROP = Preprocess(size=64, resize="shortest", crop="center", crop_pct=0.9, interpolation="bilinear")


def apply(preprocess: Preprocess, name: str, **changes: str) -> np.ndarray:
    return Pipeline(**changes).apply(FILES[name], name, preprocess)


@pytest.mark.parametrize("preprocess", [SQUASH, CROP])
@pytest.mark.parametrize("name", golden.IMAGES)
def test_unchanged_pipeline_is_the_preprocessing(preprocess: Preprocess, name: str) -> None:
    image = decode_bytes(FILES[name], name, shortest=preprocess.size)
    expected = preprocess.normalise(preprocess.pixels(image)[None])[0]
    np.testing.assert_array_equal(Pipeline().apply(FILES[name], name, preprocess), expected)


@pytest.mark.parametrize("preprocess", [SQUASH, CROP, Preprocess(size=224)])
def test_each_departure_changes_an_image(preprocess: Preprocess) -> None:
    card = {name: Pipeline().apply(data, name, preprocess) for name, data in FILES.items()}
    for key, pipeline in departures(preprocess).items():
        inputs = {name: pipeline.apply(data, name, preprocess) for name, data in FILES.items()}
        assert all(values.shape == (3, preprocess.size, preprocess.size) for values in inputs.values()), key
        assert all(values.dtype == np.float32 for values in inputs.values()), key
        assert any(np.abs(inputs[name] - card[name]).max() > 0.02 for name in FILES), key


def test_departures_leave_out_what_the_card_says() -> None:
    known = {f"{step}.{value}" for step, values in DEPARTURES.items() for value in values}
    assert known - set(departures(SQUASH)) == {"geometry.squash", "resize.bicubic", "normalisation.clip"}
    assert known - set(departures(CROP)) == {"resize.bilinear", "normalisation.clip"}
    changed = departures(SQUASH, Pipeline(colour="bgr"))
    assert not [name for name in changed if name.startswith("colour.")]
    assert changed["layout.transposed"] == Pipeline(colour="bgr", layout="transposed")


def test_exif_changes_the_turned_image_only() -> None:
    for name in FILES:
        same = np.array_equal(apply(SQUASH, name, orientation="ignored"), apply(SQUASH, name))
        assert same == (name != "4-exif-turned.jpg")
    stored = Image.open(io.BytesIO(FILES["4-exif-turned.jpg"])).resize((64, 64), Image.Resampling.BICUBIC)
    expected = SQUASH.normalise(np.asarray(stored).transpose(2, 0, 1)[None])[0]
    actual = apply(SQUASH, "4-exif-turned.jpg", decoder="full", orientation="ignored")
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_transparency_changes_the_image_with_alpha_only() -> None:
    for value in DEPARTURES["transparency"]:
        for name in FILES:
            same = np.array_equal(apply(SQUASH, name, transparency=value), apply(SQUASH, name))
            assert same == (name != "6-alpha.png")
    bare = Image.open(io.BytesIO(FILES["6-alpha.png"])).convert("RGB")
    expected = SQUASH.normalise(SQUASH.pixels(bare)[None])[0]
    np.testing.assert_array_equal(apply(SQUASH, "6-alpha.png", transparency="dropped"), expected)


@pytest.mark.parametrize(
    ("kernel", "mode", "antialias"),
    [
        ("bilinear-aliased", v2.InterpolationMode.BILINEAR, False),
        ("bicubic-aliased", v2.InterpolationMode.BICUBIC, False),
        ("tensor", v2.InterpolationMode.BICUBIC, True),
    ],
)
def test_kernels_are_those_of_torchvision(kernel: str, mode: v2.InterpolationMode, antialias: bool) -> None:
    tensor = pil_to_tensor(Image.open(io.BytesIO(FILES["3-png.png"])))
    resized = v2.Resize([64, 64], mode, antialias=antialias)(tensor).numpy()
    difference = np.abs(apply(SQUASH, "3-png.png", resize=kernel) - SQUASH.normalise(resized[None])[0])
    np.testing.assert_allclose(difference, 0, atol=1e-6)


def test_geometry_is_that_of_pillow_and_torchvision() -> None:
    image = Image.open(io.BytesIO(FILES["3-png.png"]))
    bicubic = v2.InterpolationMode.BICUBIC
    expected = {
        "letterbox-black": ImageOps.pad(image, (64, 64), Image.Resampling.BICUBIC, "black"),
        "letterbox-white": ImageOps.pad(image, (64, 64), Image.Resampling.BICUBIC, "white"),
        "crop": v2.Compose([v2.Resize(64, bicubic), v2.CenterCrop(64)])(image),
        "crop-0.875": v2.Compose([v2.Resize(73, bicubic), v2.CenterCrop(64)])(image),
    }
    for geometry, picture in expected.items():
        pixels = np.asarray(picture).transpose(2, 0, 1)
        np.testing.assert_array_equal(
            apply(SQUASH, "3-png.png", geometry=geometry), SQUASH.normalise(pixels[None])[0], err_msg=geometry
        )


def test_normalisation_is_that_of_torchvision() -> None:
    image = Image.open(io.BytesIO(FILES["3-png.png"])).resize((64, 64), Image.Resampling.BICUBIC)
    scaled = pil_to_tensor(image).float() / 255
    expected = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(scaled).numpy()
    np.testing.assert_allclose(apply(SQUASH, "3-png.png", normalisation="imagenet"), expected, atol=1e-5)
    np.testing.assert_allclose(apply(SQUASH, "3-png.png", normalisation="unit"), scaled.numpy(), atol=1e-6)
    raw = 255 * scaled.numpy()
    np.testing.assert_allclose(apply(SQUASH, "3-png.png", normalisation="none"), raw, atol=1e-3)


def test_equivalent_pipelines_differ_by_rounding_or_decoding_scale_only() -> None:
    preprocess = Preprocess(size=224)  # no golden image is decoded at a reduced scale for it
    for pipeline in equivalent_pipelines():
        assert not pipeline.departures
        for name, data in FILES.items():
            difference = np.abs(pipeline.apply(data, name, preprocess) - apply(preprocess, name))
            assert difference.mean() < 0.5 / 255 / 0.26, (pipeline, name)  # half a grey level


def test_a_very_long_image_is_shortened_before_a_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, sizes, resize = io.BytesIO(), [], Image.Image.resize
    Image.new("RGB", (20_000, 8), "red").save(stream, "PNG")

    def record(image: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", record)
    pipeline = Pipeline(geometry="crop", resize="lanczos", normalisation="none")
    values = pipeline.apply(stream.getvalue(), "long.png", SQUASH)
    assert sizes == [(256, 64)]
    np.testing.assert_allclose(values, np.broadcast_to(np.array([255, 0, 0])[:, None, None], (3, 64, 64)), atol=1e-3)


def test_client_pipelines_start_with_the_card_and_are_described() -> None:
    known = client_pipelines(CROP)
    assert next(iter(known.items())) == ("card", Pipeline())
    assert known["resize.nearest"] == Pipeline(decoder="full", resize="nearest")
    assert known["decoder.reduced"] == Pipeline(decoder="reduced")
    assert [name for name, pipeline in known.items() if not pipeline.departures] == [
        "card",
        "decoder.full",
        "resize.tensor",
    ]
    for pipeline in known.values():
        assert all(describe(step, value) for step, value in pipeline.changes.items())
