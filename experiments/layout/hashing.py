"""How often one distillation hashes each file of its inputs, on a tiny catalogue and a tiny teacher."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from export.config import OnnxConfig
from export.to_onnx import export_onnx
from student.config import DistillConfig, QuantiseConfig, StudentConfig
from student.distill import distill
from teacher.config import HeadConfig, StageConfig, TowerConfig, TrainConfig
from teacher.train import train
from vpr.artifacts import store
from vpr.data.build_catalog import build_catalog
from vpr.data.config import CatalogConfig, LoaderConfig
from vpr.inference.config import DEFAULT_EXCLUDED_LAYERS

_SHAPE = StudentConfig(image_size=32, patch_size=8, dim=64, depth=1, heads=2, dim_head=32, mlp_dim=64, stem="conv")
_LOADER = LoaderConfig(batch_size=8)


def count_hashes(folder: Path) -> Counter[str]:
    """Return the number of hashes per input file during ``vpr student distill`` with ``start`` and ranges.

    Args:
        folder: Empty folder for the inputs and the output.
    """
    config = _make_inputs(folder)
    time.sleep(0.2)  # a file changed a moment ago is hashed again, because its time stamp proves nothing yet
    store._verified.clear()  # as in a new process
    counts = Counter[str]()
    original = store.file_sha256

    def counting(path: Path) -> str:
        counts[str(path.absolute().relative_to(folder.absolute()))] += 1
        return original(path)

    with mock.patch.object(store, "file_sha256", counting):
        distill(config)
    return counts


def _make_inputs(folder: Path) -> DistillConfig:
    rng = np.random.default_rng(0)
    for product in range(8):
        (folder / "images" / str(product)).mkdir(parents=True)
        for view in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(product) / f"{view}.png")

    def at(name: str) -> str:
        return str(folder / name)

    build_catalog(CatalogConfig("folder", at("catalog"), at("images"), validation=0.25, test=0.25, seed=2))
    stages = (StageConfig("all", 1, lr_head=1e-3, lr_tower=1e-3),)
    tower, head = TowerConfig("sample", "", 32), HeadConfig(scale=16.0, margin=0.0, margin_end=0.1)
    train(TrainConfig(at("catalog"), at("teacher"), tower=tower, head=head, stages=stages, loader=_LOADER))
    config = DistillConfig((at("teacher"),), at("catalog"), at("first"), model=_SHAPE, epochs=1, loader=_LOADER)
    distill(config)
    export_onnx(OnnxConfig(at("first"), at("fp32")))
    calibrate(CalibrateConfig(at("fp32"), at("catalog"), at("ranges"), count=8))
    quantise = QuantiseConfig(at("ranges"), DEFAULT_EXCLUDED_LAYERS)
    return DistillConfig(
        (at("teacher"),),
        at("catalog"),
        at("second"),
        start=at("first"),
        model=_SHAPE,
        quantise=quantise,
        epochs=1,
        loader=_LOADER,
    )
