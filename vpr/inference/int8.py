"""INT8 scales and ranges: symmetric, weights per output channel, activations per tensor.

QAT fine-tuning and export both use these functions, so a student is fine-tuned with the scales that its export writes.
"""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError

LEVELS = 127
MIN_SCALE = 2.0**-14  # smaller numbers are subnormal in FP16 and lose precision
_MAX_THRESHOLD = LEVELS * float(np.finfo(np.float16).max)  # scales of larger thresholds are infinite in FP16


@dataclass(frozen=True)
class Ranges:
    """Content of a ``ranges`` artifact.

    Attributes:
        thresholds: Magnitude that maps to the largest quantised value, by tensor.
        linears: Linear modules that read each tensor.
        smoothing: (channels,) float32 factors that divide the input of a linear, by its module.
        corrections: (out,) float32 corrections to subtract from the bias of a linear, by its module.
    """

    thresholds: dict[str, float]
    linears: dict[str, list[str]]
    smoothing: dict[str, NDArray[np.float32]]
    corrections: dict[str, NDArray[np.float32]]


def read_ranges(artifact: Artifact) -> Ranges:
    """Read the ranges of an artifact; raise :class:`UserError` for a number that no calibration writes."""
    with reraise_as_artifact_error(artifact):
        entries = json.loads(artifact.file("ranges.json").read_text(encoding="utf-8")).items()
        thresholds = {str(name): float(entry["threshold"]) for name, entry in entries}
        linears = {str(name): [str(linear) for linear in entry.get("linears", ())] for name, entry in entries}
        arrays = load_file(artifact.file("adjustments.safetensors"))
        for name, threshold in thresholds.items():
            if not 0 < threshold <= _MAX_THRESHOLD:
                raise UserError(f"the threshold of '{name}' is {threshold}, not a positive number within FP16's range")
        for name, values in arrays.items():
            low = 0 if name.startswith("smooth:") else -np.inf
            if values.dtype != np.float32 or not (np.isfinite(values) & (values > low)).all():
                raise UserError(f"'{name}' of adjustments.safetensors is not finite float32, or not positive")
    smoothing = {n.removeprefix("smooth:"): values for n, values in arrays.items() if n.startswith("smooth:")}
    corrections = {n.removeprefix("bias:"): values for n, values in arrays.items() if n.startswith("bias:")}
    return Ranges(thresholds, linears, smoothing, corrections)


def activation_scale(threshold: float, levels: float = LEVELS) -> np.float32:
    """Return the scale of an activation, at which magnitude ``threshold`` maps to ``levels``.

    It is rounded to FP16, so that FP16 and FP32 graphs quantise identically.
    """
    return np.float32(np.float16(max(threshold / levels, MIN_SCALE)))


def weight_scales(weight: NDArray[np.float32], axis: int, levels: float = LEVELS) -> NDArray[np.float32]:
    """Return (channels,) scales of a weight, one per channel of ``axis``, rounded to FP16."""
    reduced_axes = tuple(index for index in range(weight.ndim) if index != axis)
    scale = np.abs(weight).max(axis=reduced_axes).astype(np.float64) / levels
    return np.maximum(scale, MIN_SCALE).astype(np.float16).astype(np.float32)
