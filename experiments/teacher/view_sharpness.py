"""Sharpness of magnified training views against scored images, and what the larger images cost.

``python -m experiments.teacher.view_sharpness FOLDER`` prints both for the JPEGs in a folder.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher.config import TowerConfig
from teacher.model import build_teacher, read_tower
from vpr.common.errors import UserError
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.config import ViewConfig
from vpr.imaging.decode import decode
from vpr.imaging.preprocess import Preprocess

_PLAIN = ViewConfig(rotate=0, stretch=0, translate=0, brightness=0, contrast=0, saturation=0, tint=0)
_SIZE, _IMAGES = 64, 64
ZOOMS = (1.0, 1.2, 1.5)


def gradient(images: NDArray[np.uint8] | Tensor) -> float:
    """Return the mean absolute difference of neighbouring pixels, in grey levels."""
    x = torch.as_tensor(images).float()
    return float(x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()) / 2


def view_sharpness(files: list[Path], zoom: float, largest: float = 0.0) -> float:
    """Return the gradient of turned views of one zoom over that of the same part of the images, as it is scored.

    Args:
        files: Images.
        zoom: Zoom of the views.
        largest: Largest zoom of the training, for which the images are decoded; 0 decodes them at the size of a view.
    """
    preprocess, views = Preprocess(size=_SIZE), replace(_PLAIN, scale=(zoom, zoom), rotate=15, translate=0.05)
    side = replace(views, scale=(zoom, largest)).decoded_side(_SIZE) if largest else _SIZE
    images = [decode(file) for file in files]
    large = np.stack([preprocess.model_copy(update={"size": side}).pixels(image) for image in images])
    index = torch.arange(len(files))
    viewed = apply_views(torch.from_numpy(large), draw_views(views, 0, index, index), _SIZE)
    parts = []
    for image in images:
        x, y = (side * (1 - 1 / zoom) / 2 for side in image.size)
        parts.append(
            preprocess.pixels(image.crop((round(x), round(y), round(image.width - x), round(image.height - y))))
        )
    return gradient(viewed) / gradient(np.stack(parts))


def epoch_seconds(files: list[Path], views: ViewConfig, is_enlarged: bool) -> float:
    """Return processor seconds per image of decoding, views, and the sample tower's forward and backward pass.

    Images are decoded for views as sharp as scored images (``is_enlarged``), or at the side of a view. One thread.
    """
    torch.set_num_threads(1)
    teacher, preprocess = build_teacher(TowerConfig("sample", "", _SIZE), read_tower("sample"), False)
    side = views.decoded_side(_SIZE) if is_enlarged else _SIZE
    enlarged, index = preprocess.model_copy(update={"size": side}), torch.arange(len(files))
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        pixels = np.stack([enlarged.pixels(decode(file, shortest=_SIZE)) for file in files])
        viewed = apply_views(torch.from_numpy(pixels), draw_views(views, 0, index, index), _SIZE)
        teacher(torch.from_numpy(preprocess.normalise(viewed.numpy()))).sum().backward()
        best = min(best, (time.process_time() - start) / len(files))
    return best


def sample_files(folder: Path) -> list[Path]:
    """Return evenly spaced JPEGs of a folder.

    Raises:
        UserError: There are none.
    """
    files = sorted(folder.rglob("*.jpg"))
    if not files:
        raise UserError(f"{folder}: it holds no JPEGs. Name a folder of photographs.")
    return files[:: max(1, len(files) // _IMAGES)][:_IMAGES]


def sharpness_by_zoom(files: list[Path]) -> dict[float, tuple[float, float, float]]:
    """Return sharpness by zoom: decoded at the size of a view, for this zoom, and for zooms up to 1.6."""
    return {
        zoom: (view_sharpness(files, zoom), view_sharpness(files, zoom, zoom), view_sharpness(files, zoom, 1.6))
        for zoom in ZOOMS
    }


def main(folder: str) -> None:
    """Print sharpness by zoom and the ratio of the epoch's time, with the larger images and without."""
    files = sample_files(Path(folder))
    for zoom, (before, after, mixed) in sharpness_by_zoom(files).items():
        print(f"zoom {zoom}: sharpness {before:.2f} without, {after:.2f} with the larger side")
        print(f"zoom {zoom} among zooms up to 1.6: sharpness {mixed:.2f}")
    for views in (ViewConfig(), ViewConfig(scale=(0.75, 1.5))):
        before, after = (epoch_seconds(files, views, is_enlarged) for is_enlarged in (False, True))
        print(
            f"largest zoom {views.scale[1]}: {1e3 * after:.2f} ms per image, {after / before:.2f} times the time before"
        )


if __name__ == "__main__":
    main(sys.argv[1])
