"""Configuration of the calibration. Imports no heavy library, so help and errors in arguments are instant."""

from dataclasses import dataclass
from typing import Literal

from vpr.common.errors import UserError, check_numbers

Method = Literal["minmax", "moving-average", "percentile", "entropy", "mse", "octav"]

Selection = Literal["stratified", "random", "k-centre"]


@dataclass(frozen=True)
class CalibrateConfig:
    """Options of ``vpr calibrate``.

    Attributes:
        onnx: FP32 ``onnx`` artifact.
        catalog: Catalogue. Only its ``train`` split is used.
        output: Output folder of the ranges.
        count: Number of calibration images.
        selection: ``stratified`` takes products in turn, ``random`` is uniform, ``k-centre`` covers embedding space.
        method: Method that chooses a range; ``auto`` takes that of the smallest error after the linears of a tensor.
        percentile: Percentile of the method ``percentile``, in percent.
        smooth: Move outlying activation channels into the weights (SmoothQuant).
        correct: Correct the bias of each quantised linear by its mean error.
        evaluation: Another catalogue that is scored. Images and products outside its ``train`` split are rejected.
        seed: Seed of the image selection.
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
        check_numbers(self, count=(1, 1 << 24), seed=(0, None))
        if not 0 < self.percentile <= 100:
            raise UserError(f"percentile: expected more than 0 and at most 100, got {self.percentile}.")
