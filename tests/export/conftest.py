from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import onnx

    from vpr.data.catalog import Catalog


@pytest.fixture(scope="session")
def fp32(each_student: Path) -> Path:
    """The FP32 graph of each student."""
    from export.config import OnnxConfig
    from export.to_onnx import export_onnx

    return export_onnx(OnnxConfig(model=str(each_student), output=str(each_student.parent / "fp32")))


@pytest.fixture(scope="session")
def graph(fp32: Path) -> onnx.ModelProto:
    from export.to_onnx import load_onnx

    return load_onnx(fp32)[0]


@pytest.fixture(scope="session")
def ranges(fp32: Path, catalog: Catalog) -> Path:
    from calibration.calibrate import calibrate
    from calibration.config import CalibrateConfig

    assert catalog.artifact is not None
    output = str(fp32.parent / "ranges")
    return calibrate(CalibrateConfig(onnx=str(fp32), catalog=str(catalog.artifact.path), output=output, count=48))
