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


WHEELS = (
    Wheel("annotated_types", "0.8.0", 13_427),
    Wheel("docstring_parser", "0.18.0", 22_484),
    Wheel("einops", "0.8.2", 65_638),
    Wheel("ftfy", "6.3.1", 44_821),
    Wheel("jsonargparse", "4.53.0", 177_603),
    Wheel("open_clip_torch", "3.3.0", 1_547_268),
    Wheel("pydantic", "2.14.3", 494_071),
    Wheel("pydantic_core", "2.50.4", 2_261_727),
    Wheel("timm", "1.0.31", 2_798_714),
    Wheel("typeshed_client", "2.15.0", 808_045),
    Wheel("typing_extensions", "4.16.0", 45_571),
    Wheel("typing_inspection", "0.4.5", 14_874),
    Wheel("vit-pytorch", "1.26.11", 228_130),
    Wheel("wcwidth", "0.9.4", 785_946),
)


def wheel_rows() -> list[Row]:
    """Return a row for each wheel, and the sum."""
    rows = [{"package": w.package, "version": w.version, "KB": f"{w.size / 1000:.0f}"} for w in WHEELS]
    return [*rows, {"package": "together", "version": "", "KB": f"{sum(w.size for w in WHEELS) / 1000:.0f}"}]
