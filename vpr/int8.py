"""Eight bits as every stage means them: symmetric, weights per output channel, activations per tensor.

One place for the scales, so that what a student is fine-tuned under is what its export writes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 127
# Linears that stay in the base precision unless asked otherwise: the first and the last.
KEEP = ("vit.to_patch_embedding", "vit.mlp_head")
# Below this, a scale is no normal FP16 number and loses digits.
_SMALLEST_SCALE = 2.0**-14


def activation_scale(threshold: float, levels: float = LEVELS) -> np.float32:
    """The step of an activation whose magnitude ``threshold`` maps to the largest number, ``levels``.

    FP16 holds it exactly, so that FP16 and FP32 graphs quantise alike.
    """
    return np.float32(np.float16(max(threshold / levels, _SMALLEST_SCALE)))


def weight_scales(weight: NDArray[np.float32], axis: int, levels: float = LEVELS) -> NDArray[np.float32]:
    """(channels,) steps of a (rows, columns) matrix, one per channel of ``axis``; FP16 holds them exactly."""
    scale = np.abs(weight).max(axis=1 - axis).astype(np.float64) / levels
    return np.maximum(scale, _SMALLEST_SCALE).astype(np.float16).astype(np.float32)
