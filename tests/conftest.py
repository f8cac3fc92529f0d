"""Shared images and small models. The fixtures generate everything; nothing is downloaded.

`pytest -m gpu` also runs on a machine that lacks most packages: this file imports them in the fixtures, files without
such tests are not read, and a test whose package or GPU is missing is skipped with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vpr.common.gpus import list_gpus
from vpr.common.log import configure_logging
from vpr.common.telemetry import disable_telemetry

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from student.config import StudentConfig
    from vpr.data.catalog import Catalog

disable_telemetry()
configure_logging()
PRODUCTS, VIEWS, SIDE = 16, 8, 48
# PyTorch installs a SIGCHLD handler for the exit of DataLoader workers. On the kernel of a virtual machine, a process
# that had used AMX was killed when a handled signal arrived. This flag prevents the handler.
with suppress(ImportError):
    from torch.utils.data._utils import signal_handling

    signal_handling._SIGCHLD_handler_set = True


def pytest_configure() -> None:
    """Give each process of pytest-xdist its share of the cores, before libraries count them.

    Two processes with threads for both cores each took four times as long: threads spin while they wait.
    """
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers] or cores)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not read files and folders without GPU tests if only GPU tests run."""
    if config.option.markexpr != "gpu" or collection_path.name == "conftest.py":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("pytest.mark.gpu" in file.read_text(encoding="utf-8") for file in files) else True


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a file of GPU tests that imports a missing package."""
    report = yield
    error = report.call.excinfo.value.__cause__ if report.failed and report.call.excinfo else None  # type: ignore[attr-defined]
    if isinstance(error, ImportError) and collector.config.option.markexpr == "gpu":
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {error}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Skip a GPU test without a GPU, or if a fixture needs a missing package."""
    is_gpu_test = item.get_closest_marker("gpu") is not None
    if is_gpu_test and not list_gpus().gpus:
        pytest.skip(f"needs an NVIDIA GPU; this machine {list_gpus().problem}")
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if is_gpu_test:
            pytest.skip(str(error))
        raise


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
    import numpy as np
    from PIL import Image

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
    from experiments.teacher.shuffled_split import build_shuffled_catalog
    from vpr.data.catalog import load_catalog

    output = tmp_path_factory.mktemp("catalog") / "catalog"
    return load_catalog(build_shuffled_catalog("folder", str(texture_folder), str(output), 0.25, 0.25))


@pytest.fixture(scope="session")
def pairs_catalog(tmp_path_factory: pytest.TempPathFactory, texture_folder: Path) -> Catalog:
    """Catalogue of the textures as many products of two images, a quarter each for validation and test."""
    from experiments.teacher.shuffled_split import build_shuffled_catalog
    from vpr.data.catalog import load_catalog

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
    from student.config import StudentConfig

    shape: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "mlp_dim": 128, "embedding_dim": 32}
    return StudentConfig(image_size=32, patch_size=8, stem=stem, **shape)


@pytest.fixture(scope="session")
def stem_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder for each stem. It stays when pytest goes on to another stem, so that exports are made once."""
    return {stem: tmp_path_factory.mktemp(stem) for stem in ("patch", "conv")}


@pytest.fixture(scope="session", params=["patch", "conv"])
def each_student(request: pytest.FixtureRequest, stem_folders: dict[str, Path]) -> Path:
    """Small student artifact, one per stem."""
    return _write_student(stem_folders[request.param] / "student", request.param)


@pytest.fixture(scope="session")
def student_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small student artifact with a convolutional stem."""
    return _write_student(tmp_path_factory.mktemp("student") / "student", "conv")


def _write_student(path: Path, stem: str) -> Path:
    from experiments.random_student import write_random_student

    return path if path.exists() else write_random_student(path, small_student(stem))


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """Export a network of the same weights, size and opset once in all test processes: torch.export takes 3 seconds.

    ``tests/export/test_to_onnx.py`` exports each time. Every export is compared with PyTorch, kept or not.
    """
    try:
        import onnx

        from export import to_onnx
    except ImportError:  # the tests of GPUs run without every package
        yield
        return
    base, trace = tmp_path_factory.getbasetemp(), to_onnx.trace
    kept = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "graphs"
    kept.mkdir(exist_ok=True)

    def trace_once(model: nn.Module, size: int, opset: int) -> onnx.ModelProto:
        if sum(parameter.numel() for parameter in model.parameters()) > 1 << 23:
            return trace(model, size, opset)
        path = kept / f"{_hash_network(model, size, opset)}.onnx"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            onnx.save(trace(model, size, opset), partial)
            partial.rename(path)
        return onnx.load(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "trace", trace_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def without_entropy() -> Generator[None]:
    """Leave the method ``entropy`` out, which takes most of a calibration; ``tests/calibration`` has all methods."""
    try:
        from calibration.ranges import METHODS
    except ImportError:  # the tests of GPUs run without every package
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.calibrate.METHODS", tuple(method for method in METHODS if method != "entropy"))
        yield


def _hash_network(model: nn.Module, *values: int) -> str:
    """Return a hash of weights, buffers, plain attributes and structure of a network."""
    digest = hashlib.sha256(repr((model, values)).encode())
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, tuple))}
        digest.update(f"{name} {type(module)} {plain} {getattr(module, 'config', '')}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().numpy().tobytes())
    return digest.hexdigest()
