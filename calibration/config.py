"""Configuration of the calibration. Imports no heavy library, so help and errors in arguments are quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vpr.common.errors import UserError, check_numbers

Method = Literal["minmax", "moving-average", "percentile", "entropy", "mse", "octav"]

Selection = Literal["stratified", "random", "k-centre"]


@dataclass(frozen=True)
class CalibrateConfig:
    """A calibration.

    Attributes:
        onnx: FP32 ``onnx`` artifact.
        catalog: catalogue artifact; only its ``train`` split is used.
        output: where the ranges are written.
        count: images.
        selection: how they are drawn, see :func:`calibration.sampling.select_images`.
        method: how a range is chosen from what was seen; ``auto`` takes for each tensor the method whose
            range leaves the least error at the output of its linear.
        percentile: in percent, for the method of that name.
        smooth: move the difficulty of activations with outlying channels into the weights (SmoothQuant).
        correct: take the mean error of each quantised linear from its bias.
        evaluation: catalogue artifact that is scored, if another: images and products of all but its ``train``
            split are refused.
        seed: of the draw of images.
    """

    onnx: str
    catalog: str
    output: str
    count: int = 256
    selection: Selection = "stratified"
    method: Literal[Method, "auto"] = "mse"
    percentile: float = 99.99
    smooth: bool = False
    correct: bool = False
    evaluation: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, seed=(0, None))
        if not 0 < self.percentile <= 100:
            raise UserError(f"percentile: {self.percentile}: give more than 0 and at most 100")
