from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.loaders import ImageDataset
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.config import ViewConfig
from vpr.imaging.preprocess import Preprocess

IDENTITY = ViewConfig(0, (1, 1), 0, 0, 0, 0, 0, 0, 0)


def _pixels(n: int, size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _views(config: ViewConfig, pixels: torch.Tensor, rows: list[int], view: int = 0, seed: int = 0) -> torch.Tensor:
    index = torch.tensor(rows)
    return apply_views(pixels[index], draw_views(config, seed, index, torch.full_like(index, view)), pixels.shape[-1])


def test_view_does_not_depend_on_its_batch() -> None:
    pixels, config = _pixels(6), ViewConfig(cutout=0.5)
    together = _views(config, pixels, [0, 1, 2, 3, 4, 5], view=3)
    for row in range(6):
        assert torch.equal(_views(config, pixels, [row], view=3)[0], together[row])


def test_seed_index_and_view_change_the_view() -> None:
    pixels, config = _pixels(1).expand(2, -1, -1, -1), ViewConfig()
    base = _views(config, pixels, [0])
    assert not torch.equal(base, _views(config, pixels, [1]))
    assert not torch.equal(base, _views(config, pixels, [0], view=1))
    assert not torch.equal(base, _views(config, pixels, [0], seed=1))


def test_zero_ranges_keep_the_image() -> None:
    pixels = _pixels(3)
    torch.testing.assert_close(_views(IDENTITY, pixels, [0, 1, 2]), pixels.float(), atol=1e-3, rtol=0)


def test_flip_mirrors() -> None:
    pixels = _pixels(2)
    flipped = _views(ViewConfig(0, (1, 1), 0, 0, 1, 0, 0, 0, 0), pixels, [0, 1])
    torch.testing.assert_close(flipped, pixels.flip(-1).float(), atol=1e-3, rtol=0)


def test_colour_equals_torchvision() -> None:
    # torchvision clamps after every step, apply_views only at the end: mid-greys keep both within 0…1.
    pixels, index = 96 + _pixels(8) // 8, torch.arange(8)
    config = ViewConfig(0, (1, 1), 0, 0, 0, brightness=0.3, contrast=0.4, saturation=0.5, tint=0)
    drawn = draw_views(config, 0, index, index)
    views = apply_views(pixels, drawn, 24) / 255
    for row in range(8):
        brightness, contrast, saturation = (float(drawn[row, column]) for column in (6, 7, 8))
        expected = tv.adjust_brightness(pixels[row].float() / 255, brightness)
        expected = tv.adjust_contrast(tv.adjust_saturation(expected, saturation), contrast)
        # torchvision's luma weights are rounded to .2989, .587, .114.
        torch.testing.assert_close(views[row], expected, atol=1e-3, rtol=0)


def test_parameters_fill_their_ranges() -> None:
    index = torch.arange(2000)
    drawn = draw_views(ViewConfig(rotate=15, scale=(0.5, 2.0)), 0, index, index).numpy()
    degrees, zoom = np.degrees(drawn[:, 0]), drawn[:, 1]
    assert np.abs(degrees).max() <= 15 + 1e-4
    assert np.abs(degrees).max() > 14.5
    assert 0.5 <= zoom.min() < 0.52
    assert 1.95 < zoom.max() <= 2.0 + 1e-5
    assert abs(np.log(zoom).mean()) < 0.05


def test_autocast_does_not_change_views() -> None:
    pixels, index = _pixels(4, 64), torch.arange(4)
    drawn = draw_views(ViewConfig(), 0, index, index)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = apply_views(pixels, drawn, 64)
    assert torch.equal(in_autocast, apply_views(pixels, drawn, 64))


def test_jitter_and_grey_have_their_probabilities() -> None:
    index = torch.arange(2000)
    drawn = draw_views(ViewConfig(jitter=0.3, grey=0.1), 0, index, index)
    assert (drawn[:, 6] != 1).float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert (drawn[:, 8] == 0).float().mean().item() == pytest.approx(0.1, abs=0.03)
    # They do not change the other parameters.
    assert torch.equal(drawn[:, :6], draw_views(ViewConfig(), 0, index, index)[:, :6])


def test_grey_view_has_no_colour() -> None:
    views = _views(ViewConfig(grey=1.0, tint=0.0), _pixels(3), [0, 1, 2])
    torch.testing.assert_close(views[:, 0], views[:, 1], atol=1e-3, rtol=0)
    torch.testing.assert_close(views[:, 0], views[:, 2], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("degrees", "zoom", "shift"), [(30.0, 1.0, 0.0), (0.0, 1.4, 0.0), (0.0, 1.0, 0.25)])
def test_geometry_equals_torchvision(degrees: float, zoom: float, shift: float) -> None:
    """Rotation, zoom and shift with fixed parameters, on smooth images, within the area that both fill."""
    smooth = F.interpolate(_pixels(2, 6).float(), (64, 64), mode="bicubic").clamp(0, 255).to(torch.uint8)
    drawn = draw_views(IDENTITY, 0, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    drawn[:, 0], drawn[:, 1], drawn[:, 3] = np.radians(degrees), zoom, 2 * shift
    views = apply_views(smooth, drawn, 64)
    expected = tv.affine(
        smooth.float(), -degrees, [-64 * shift, 0], zoom, [0.0, 0.0], interpolation=tv.InterpolationMode.BILINEAR
    )
    inner = slice(20, 44)
    torch.testing.assert_close(views[..., inner, inner], expected[..., inner, inner], atol=5, rtol=0)


def test_hue_equals_torchvision() -> None:
    pixels, index = _pixels(8), torch.arange(8)
    drawn = draw_views(replace(IDENTITY, hue=0.3), 0, index, index)
    assert drawn[:, 14].abs().max() > 0.2
    views = apply_views(pixels, drawn, 24) / 255
    for row in range(8):
        expected = tv.adjust_hue(pixels[row].float() / 255, float(drawn[row, 14]))
        torch.testing.assert_close(views[row], expected, atol=1e-4, rtol=0)


def test_cutout_is_that_of_devries_and_taylor() -> None:
    """The side is fixed, the centre uniform over the image, parts outside are cut off, and half the images have one."""
    index = torch.arange(400)
    config = replace(IDENTITY, cutout=0.5, cutout_size=0.5, cutout_fill=0.0)
    white = torch.full((400, 3, 40, 40), 255, dtype=torch.uint8)
    views = apply_views(white, draw_views(config, 0, index, index), 40)
    holes = (views == 0).all(dim=1)
    assert set(views.round().unique().tolist()) == {0, 255}
    has_hole = holes.any(dim=(1, 2))
    assert has_hole.float().mean().item() == pytest.approx(0.5, abs=0.08)
    sides = torch.stack([holes.any(dim=2).sum(dim=1), holes.any(dim=1).sum(dim=1)])[:, has_hole]
    assert sides.max() == 20
    # With a uniform centre, half of the sides are cut off by an edge.
    assert (sides < 20).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert (sides >= 10).all()
    # The centre of a side of 20 is at pixels 0 to 40: each pixel in the middle is covered by half of the squares.
    assert holes[has_hole][:, 20, 20].float().mean().item() == pytest.approx(0.25, abs=0.08)


def test_smallest_cutout_and_its_fill() -> None:
    index = torch.arange(300)
    drawn = draw_views(replace(IDENTITY, cutout=1.0, cutout_size=0.2, cutout_min_size=0.1), 0, index, index)
    assert 0.1 <= drawn[:, 11].min() < 0.11
    assert 0.19 < drawn[:, 11].max() <= 0.2
    views = apply_views(_pixels(1).expand(300, -1, -1, -1), drawn, 24)
    assert (views == 127.5).any()


def test_border_is_black_or_repeated() -> None:
    white = torch.full((4, 3, 24, 24), 255, dtype=torch.uint8)
    config = replace(IDENTITY, scale=(0.5, 0.5))
    assert _views(config, white, [0, 1, 2, 3]).min() > 254.9
    black = _views(replace(config, border="black"), white, [0, 1, 2, 3])
    assert black[:, :, 0].max() == 0
    assert black[:, :, 12, 12].min() > 254.9


def test_affine_has_its_probability() -> None:
    index = torch.arange(2000)
    drawn = draw_views(ViewConfig(affine=0.7), 0, index, index)
    moved = (drawn[:, 0] != 0).float().mean().item()
    assert moved == pytest.approx(0.7, abs=0.04)
    for column, neutral in ((1, 1.0), (2, 1.0), (3, 0.0), (4, 0.0)):
        assert torch.equal(drawn[:, column] != neutral, drawn[:, 0] != 0)


def test_views_are_cut_from_images_that_are_large_enough() -> None:
    assert IDENTITY.decoded_side(64) == 64
    assert ViewConfig(scale=(0.8, 1.0)).decoded_side(64) == 72  # an eighth more
    assert ViewConfig(scale=(0.5, 1.5)).decoded_side(64) == 108
    assert ViewConfig(scale=(1, 1.2)).decoded_side(33) == 45  # 44.55 rounded up
    assert ViewConfig(scale=(1, 8)).decoded_side(64) == 128  # bounds the memory
    assert ViewConfig(scale=(1, 1.5), affine=0.0).decoded_side(64) == 64


def _gradient(images: np.ndarray | torch.Tensor) -> float:
    x = torch.as_tensor(np.asarray(images)).float()
    return float(x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean())


@pytest.mark.parametrize(("zoom", "share"), [(1.0, 0.9), (1.5, 0.95)])
def test_views_are_as_sharp_as_test_images(zoom: float, share: float, tmp_path: Path) -> None:
    """Compare with Pillow's resize of the same part of the original, on textures with detail at all scales.

    The finest detail is noise, which interpolation of an image that is not magnified blurs a little.
    """
    rng, size = np.random.default_rng(0), 64
    names = []
    for number in range(6):
        layers = [rng.normal(0, 18, (side, side, 3)) for side in (8, 16, 32, 64, 128, 256)]
        upright = [np.kron(layer, np.ones((256 // len(layer), 256 // len(layer), 1))) for layer in layers]
        names.append(tmp_path / f"{number}.png")
        Image.fromarray((128 + sum(upright)).clip(0, 255).astype(np.uint8)).save(names[-1])
    preprocess, views = Preprocess(size=size), ViewConfig(0, (zoom, zoom), 0, 0, 0, 0, 0, 0, 0)
    rows = [{"image": name.name, "product": name.stem, "role": "train", "split": "train"} for name in names]
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path)
    index = torch.arange(len(names))
    drawn = draw_views(replace(views, rotate=5.0, translate=0.02), 0, index, index)
    pixels = ImageDataset(catalog, preprocess, views=[views]).__getitems__(index.tolist())["pixels"]
    viewed = apply_views(pixels, drawn, size)
    margin = 128 - 128 / zoom
    parts = [Image.open(name).crop((margin, margin, 256 - margin, 256 - margin)) for name in names]
    expected = np.stack([preprocess.pixels(part) for part in parts])
    assert _gradient(viewed) >= share * _gradient(expected)
    # Without the larger side the view is blurred: this is what the comparison detects.
    small = ImageDataset(catalog, preprocess).__getitems__(index.tolist())["pixels"]
    if zoom > 1:
        assert _gradient(apply_views(small, drawn, size)) < 0.8 * _gradient(expected)


@pytest.mark.parametrize("zoom", [0.8, 1.0, 1.2, 1.6])
def test_views_of_smaller_zooms_have_no_aliasing(zoom: float) -> None:
    """Compare with Pillow's resize of a texture to the same number of pixels for each part of it."""
    rng, size = np.random.default_rng(0), 64
    layers = [rng.normal(0, 18, (side, side, 3)) for side in (8, 16, 32, 64, 128, 256)]
    upright = [np.kron(layer, np.ones((256 // len(layer), 256 // len(layer), 1))) for layer in layers]
    image = Image.fromarray((128 + sum(upright)).clip(0, 255).astype(np.uint8))
    side, reduced = ViewConfig(scale=(0.8, 1.6)).decoded_side(size), round(size * zoom)
    large, small = (Preprocess(size=pixels).pixels(image) for pixels in (side, reduced))
    index = torch.zeros(1, dtype=torch.int64)
    drawn = draw_views(ViewConfig(5, (zoom, zoom), 0, 0, 0, 0, 0, 0, 0), 0, index, index)
    viewed = apply_views(torch.from_numpy(large[None]), drawn, size)
    width = min(size, reduced) - 8  # without the edge, which is repeated around a reduced image
    start = (size - width) // 2
    inner = viewed[..., start : start + width, start : start + width]
    start = (reduced - width) // 2
    ratio = _gradient(inner) / _gradient(small[..., start : start + width, start : start + width])
    assert 0.9 <= ratio <= 1.1
