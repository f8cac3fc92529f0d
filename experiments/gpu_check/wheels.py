"""Packages that the check needs on a machine that has PyTorch and its usual companions, but no network."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.figures import Row

LIMIT_MIB = 64  # of all wheels together
# Installed there already, at any version: PyTorch's own packages, and common ones of an image for training.
PRESENT = (
    "torch", "torchvision", "triton", "lightning", "torchmetrics", "numpy", "scipy", "pillow", "pyarrow", "safetensors",
    "huggingface_hub", "tqdm", "regex", "pyyaml", "tensorboard", "onnx", "onnxscript", "onnxruntime", "rich", "jinja2",
    "matplotlib", "setuptools", "packaging",
)  # fmt: skip


@dataclass(frozen=True)
class Wheel:
    """A wheel for Python 3.12 on x86-64 Linux, and its size in bytes."""

    package: str
    version: str
    size: int


WHEELS = (Wheel("open_clip_torch", "3.3.0", 0),)


def wheel_rows() -> list[Row]:
    """Return a row for each wheel, and the sum."""
    rows = [{"package": w.package, "version": w.version, "KB": f"{w.size / 1000:.0f}"} for w in WHEELS]
    return [*rows, {"package": "together", "version": "", "KB": f"{sum(w.size for w in WHEELS) / 1000:.0f}"}]
