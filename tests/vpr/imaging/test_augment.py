from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.config import ViewConfig

IDENTITY = ViewConfig(0, (1, 1), 0, 0, 0, 0, 0, 0, 0)


def _pixels(n: int, size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _views(config: ViewConfig, pixels: torch.Tensor, rows: list[int], view: int = 0, seed: int = 0) -> torch.Tensor:
    index = torch.tensor(rows)
    return apply_views(pixels[index], draw_views(config, seed, index, torch.full_like(index, view)))


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
    views = apply_views(pixels, drawn) / 255
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
        in_autocast = apply_views(pixels, drawn)
    assert torch.equal(in_autocast, apply_views(pixels, drawn))


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
