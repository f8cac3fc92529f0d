"""INT8 quantisation of an ONNX graph by other tools: this file imports nothing of the project.

``python experiments/external/quantizers.py TOOL GRAPH.onnx PIXELS.npy OUTPUT.onnx``. ``make other-quantisers`` installs
the environments of NNCF and ModelOpt, whose requirements clash with those of the toolkit.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np

_BATCH = 16


def _nncf(graph: str, pixels: np.ndarray, output: str) -> None:
    import nncf
    import onnx

    name = (model := onnx.load(graph)).graph.input[0].name
    batches = [{name: pixels[i : i + _BATCH]} for i in range(0, len(pixels), _BATCH)]
    quantised = nncf.quantize(
        model, nncf.Dataset(batches), subset_size=len(batches), model_type=nncf.ModelType.TRANSFORMER
    )
    onnx.save(quantised, output)


def _modelopt(graph: str, pixels: np.ndarray, output: str, method: str) -> None:
    import onnx
    from modelopt.onnx.quantization import quantize

    name = onnx.load(graph).graph.input[0].name
    quantize(
        graph,
        quantize_mode="int8",
        calibration_data={name: pixels},
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=output,
    )


def _onnxruntime(graph: str, pixels: np.ndarray, output: str, method: str, op_types: list[str] | None = None) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Batches of the images."""

        def __init__(self) -> None:
            self._starts = iter(range(0, len(pixels), _BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            start = next(self._starts, None)
            return None if start is None else {"pixels": pixels[start : start + _BATCH]}

    quantize_static(
        graph,
        output,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        calibrate_method=getattr(CalibrationMethod, method),
        op_types_to_quantize=op_types,
    )


def _onnxruntime_linears(graph: str, pixels: np.ndarray, output: str) -> None:
    """Quantise matrix products only, after preparing the graph as ONNX Runtime's guide advises."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = f"{folder}/prepared.onnx"
        # Symbolic shape inference needs further packages; the batch is the only symbol.
        quant_pre_process(graph, prepared, skip_symbolic_shape=True)
        _onnxruntime(prepared, pixels, output, "MinMax", ["MatMul", "Gemm"])


TOOLS: dict[str, Callable[..., None]] = {
    "nncf": _nncf,
    "modelopt-max": partial(_modelopt, method="max"),
    "modelopt-entropy": partial(_modelopt, method="entropy"),
    "onnxruntime-minmax": partial(_onnxruntime, method="MinMax"),
    "onnxruntime-entropy": partial(_onnxruntime, method="Entropy"),
    "onnxruntime-percentile": partial(_onnxruntime, method="Percentile"),
    "onnxruntime-linears": _onnxruntime_linears,
}

if __name__ == "__main__":
    tool, graph_file, pixels_file, output_file = sys.argv[1:]
    TOOLS[tool](graph_file, np.load(pixels_file, allow_pickle=False), output_file)
