from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from export.config import OnnxConfig
from export.to_onnx import export_onnx, load_onnx
from vpr.data.catalog import Catalog


@pytest.fixture(scope="session")
def fp32(each_student: Path) -> Path:
    """The FP32 graph of each student."""
    return export_onnx(OnnxConfig(model=str(each_student), output=str(each_student.parent / "fp32")))


@pytest.fixture(scope="session")
def graph(fp32: Path) -> onnx.ModelProto:
    return load_onnx(fp32)[0]


@pytest.fixture(scope="session")
def ranges(fp32: Path, catalog: Catalog) -> Path:
    assert catalog.artifact is not None
    output = str(fp32.parent / "ranges")
    return calibrate(CalibrateConfig(onnx=str(fp32), catalog=str(catalog.artifact.path), output=output, count=48))
