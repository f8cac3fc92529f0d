from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import v2

from vpr.imaging.preprocess import Preprocess


def _image(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (224, 224), (33, 200), (333, 77), (101, 100), (32, 32)])
def test_shortest_and_center_equal_torchvision(size: tuple[int, int], crop_pct: float) -> None:
    image, shorter = _image(*size), int(32 / crop_pct)
    preprocess = Preprocess(size=32, resize="shortest", crop="center", crop_pct=crop_pct)
    transform = v2.Compose([v2.Resize(shorter, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.PILToTensor()])
    difference = np.abs(preprocess.pixels(image).astype(int) - transform(image).numpy().astype(int))
    # A long image differs by two grey levels: the same filter with one more rounding of its weights in each direction.
    assert difference.max() <= (2 if max(size) > 4 * min(size) else 0)


def test_very_long_image_needs_little_memory() -> None:
    long = Image.new("RGB", (200_000, 20), (10, 20, 30))
    assert Preprocess(size=224, resize="shortest", crop="center").pixels(long)[:, 0, 0].tolist() == [10, 20, 30]


def test_squash_and_normalisation_equal_torchvision() -> None:
    image, preprocess = _image(), Preprocess(size=32)
    transform = v2.Compose(
        [
            v2.Resize((32, 32), v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    normalised = preprocess.normalise(preprocess.pixels(image)[None])[0]
    np.testing.assert_allclose(normalised, transform(image).numpy(), atol=2e-6)


def test_training_and_serving_normalise_alike() -> None:
    from vpr.data.loaders import Normalise

    preprocess = Preprocess(size=32)
    pixels = preprocess.pixels(_image())[None]
    in_training = Normalise(preprocess)(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(in_training, preprocess.normalise(pixels), atol=1e-6)


@pytest.mark.parametrize(
    "numbers", [{"mean": (0.5, float("nan"), 0.5)}, {"std": (0.2, 0.0, 0.2)}, {"std": (0.2, float("inf"), 0.2)}]
)
def test_normalisation_to_infinite_inputs_is_rejected(numbers: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValidationError, match="Input should be"):
        Preprocess(size=32, **numbers)
