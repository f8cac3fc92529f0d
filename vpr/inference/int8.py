"""Eight bits as every stage means them: symmetric, weights per output channel, activations per tensor.

One place for the scales and for reading ranges, so that what a student is fine-tuned under is what its export writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError

LEVELS = 127
# Below this, a scale is no normal FP16 number and loses digits.
_SMALLEST_SCALE = 2.0**-14
# Above this, the scale of a threshold is infinite in FP16.
_LARGEST_THRESHOLD = LEVELS * float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Ranges:
    """What a ``ranges`` artifact says.

    Attributes:
        thresholds: magnitude that maps to the largest number, by tensor.
        linears: modules that read each tensor.
        smoothing: (channels,) float32 factors by the module of the linear whose input they divide.
        corrections: (out,) float32 by the module of the linear whose bias they are taken from.
    """

    thresholds: dict[str, float]
    linears: dict[str, list[str]]
    smoothing: dict[str, NDArray[np.float32]]
    corrections: dict[str, NDArray[np.float32]]


def read_ranges(artifact: Artifact) -> Ranges:
    """The ranges of an artifact; :class:`UserError` where a number is one that no calibration writes."""
    with reraise_as_artifact_error(artifact):
        entries = json.loads(artifact.file("ranges.json").read_text(encoding="utf-8")).items()
        thresholds = {str(name): float(entry["threshold"]) for name, entry in entries}
        linears = {str(name): [str(one) for one in entry.get("linears", ())] for name, entry in entries}
        arrays = load_file(artifact.file("adjustments.safetensors"))
        for name, limit in thresholds.items():
            if not 0 < limit <= _LARGEST_THRESHOLD:
                raise UserError(f"the threshold of '{name}' is {limit}, not a positive number within FP16's range")
        for name, values in arrays.items():
            least = 0 if name.startswith("smooth:") else -np.inf
            if values.dtype != np.float32 or not (np.isfinite(values) & (values > least)).all():
                raise UserError(f"'{name}' of adjustments.safetensors are no numbers to fold")
    smoothing = {name.removeprefix("smooth:"): one for name, one in arrays.items() if name.startswith("smooth:")}
    corrections = {name.removeprefix("bias:"): one for name, one in arrays.items() if name.startswith("bias:")}
    return Ranges(thresholds, linears, smoothing, corrections)


def activation_scale(threshold: float, levels: float = LEVELS) -> np.float32:
    """The step of an activation whose magnitude ``threshold`` maps to the largest number, ``levels``.

    FP16 holds it exactly, so that FP16 and FP32 graphs quantise alike.
    """
    return np.float32(np.float16(max(threshold / levels, _SMALLEST_SCALE)))


def weight_scales(weight: NDArray[np.float32], axis: int, levels: float = LEVELS) -> NDArray[np.float32]:
    """(channels,) steps of a matrix or kernel, one per channel of ``axis``; FP16 holds them exactly."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    scale = np.abs(weight).max(axis=others).astype(np.float64) / levels
    return np.maximum(scale, _SMALLEST_SCALE).astype(np.float16).astype(np.float32)
