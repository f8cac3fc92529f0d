"""Shared images and small models. The fixtures generate everything; nothing is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data._utils import signal_handling

from experiments.random_student import write_random_student
from experiments.teacher.shuffled_split import build_shuffled_catalog
from student.config import StudentConfig
from vpr.common.log import configure_logging
from vpr.common.telemetry import disable_telemetry
from vpr.data.catalog import Catalog, load_catalog

disable_telemetry()
configure_logging()
PRODUCTS, VIEWS, SIDE = 16, 8, 48
# PyTorch installs a SIGCHLD handler for the exit of DataLoader workers. On the kernel of a virtual machine, a process
# that had used AMX was killed when a handled signal arrived. This flag prevents the handler.
signal_handling._SIGCHLD_handler_set = True


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the larger data sets; tests that need it are skipped without VPR_DATA."""
    folder = os.environ.get("VPR_DATA")
    if not folder:
        pytest.skip("VPR_DATA is not set: it is the folder of the larger data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def texture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder per product of JPEGs: a texture per product, a crop and a brightness per view."""
    root = tmp_path_factory.mktemp("textures")
    rng = np.random.default_rng(0)
    for product in range(PRODUCTS):
        coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        texture = np.asarray(Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC), dtype=np.float64)
        folder = root / f"product-{product:02d}"
        folder.mkdir()
        for view in range(VIEWS):
            top, left = rng.integers(0, 96 - SIDE, 2)
            crop = texture[top : top + SIDE, left : left + SIDE] * rng.uniform(0.7, 1.1)
            Image.fromarray(crop.clip(0, 255).astype(np.uint8)).save(folder / f"{view}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory, texture_folder: Path) -> Catalog:
    """Catalogue of the textures, with a quarter of the products each for validation and test."""
    output = tmp_path_factory.mktemp("catalog") / "catalog"
    return load_catalog(build_shuffled_catalog("folder", str(texture_folder), str(output), 0.25, 0.25))


@pytest.fixture(scope="session")
def pairs_catalog(tmp_path_factory: pytest.TempPathFactory, texture_folder: Path) -> Catalog:
    """Catalogue of the textures as many products of two images, a quarter each for validation and test."""
    table = texture_folder / "pairs.csv"
    images = sorted(texture_folder.glob("*/*.jpg"))
    lines = [f"{path.relative_to(texture_folder)},{path.parent.name}-{int(path.stem) // 2}" for path in images]
    table.write_text("\n".join(["image,product", *lines]) + "\n", encoding="utf-8")
    output = tmp_path_factory.mktemp("pairs") / "catalog"
    try:
        return load_catalog(build_shuffled_catalog("csv", str(table), str(output), 0.25, 0.25, seed=1))
    finally:
        table.unlink()


def edit_card(path: Path, **changes: object) -> None:
    """Change fields of an artifact's card, which is not signed."""
    card = json.loads((path / "card.json").read_text())
    (path / "card.json").write_text(json.dumps({**card, **changes}))


def small_student(stem: str) -> StudentConfig:
    """Return the configuration of a student of a few thousand parameters."""
    shape = {"dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "mlp_dim": 128, "embedding_dim": 32}
    return StudentConfig(image_size=32, patch_size=8, stem=stem, **shape)


@pytest.fixture(scope="session", params=["patch", "conv"])
def each_student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small student artifact, one per stem."""
    return write_random_student(tmp_path_factory.mktemp(request.param) / "student", small_student(request.param))


@pytest.fixture(scope="session")
def student_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small student artifact with a convolutional stem."""
    return write_random_student(tmp_path_factory.mktemp("student") / "student", small_student("conv"))
