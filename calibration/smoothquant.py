"""SmoothQuant and bias correction: changes of the float weights before quantisation."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from calibration.activation_stats import Activations
from calibration.onnx_layers import Linear, find_linears, replace_bias, replace_constant
from calibration.ranges import MagnitudeHistogram, threshold
from vpr.common.errors import UserError
from vpr.inference.int8 import LEVELS, activation_scale, weight_scales
from vpr.inference.onnx_graph import reraise_as_graph_error

ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))
_MIN_MAGNITUDE = 1e-5


@dataclass(frozen=True)
class Smoothing:
    """Smoothing of a linear: the channels of its input are divided, its weight rows multiplied by the same factors."""

    linear: str  # module whose input is smoothed
    source: str  # node that absorbs the division: a LayerNormalization, or the linear that computes attention's values
    alpha: float | None  # migration strength from activations to weights; None if no strength lowers the error
    error_ratio: float  # error of the linear's output after smoothing, divided by the error before
    factors: NDArray[np.float32]  # (channels,) float32


def search_smoothing(graph: onnx.ModelProto, activations: dict[str, Activations]) -> list[Smoothing]:
    """Find the alpha of least output error for each linear of an FP32 graph whose input scale another node can absorb.

    ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (Xiao et al., "SmoothQuant", ICML 2023, eq. 4). A
    LayerNormalization absorbs the scale of the linear after it. The linear that computes attention's values absorbs
    that of the output projection, because attention mixes tokens and not channels.
    """
    smoothings = []
    for linear, source in find_foldable(graph):
        inputs = activations[linear.input]
        unsmoothed = output_error(inputs.rows, linear.weight, octav_threshold(inputs.rows))
        best = Smoothing(linear.module, source, None, 1.0, np.ones(len(linear.weight), np.float32))
        for alpha in ALPHAS:
            divisors = smoothing_factors(inputs.channel_max, linear.weight, alpha)
            rows, weight = inputs.rows / divisors, linear.weight * divisors[:, None]
            error_ratio = output_error(rows, weight, octav_threshold(rows)) / max(unsmoothed, 1e-30)
            if error_ratio < best.error_ratio:
                best = Smoothing(linear.module, source, alpha, error_ratio, divisors)
        smoothings.append(best)
    return smoothings


def smoothing_by_module(smoothings: list[Smoothing]) -> dict[str, NDArray[np.float32]]:
    """Return the factors that lower the error, by the module of their linear."""
    return {smoothing.linear: smoothing.factors for smoothing in smoothings if smoothing.alpha is not None}


def smoothing_factors(
    channel_max: NDArray[np.float32], weight: NDArray[np.float32], alpha: float
) -> NDArray[np.float32]:
    """Compute s of equation 4 as (channels,) float32, from (channels,) and (channels, out) float32.

    The factors are scaled to a geometric mean of 1, which changes no quantised value and stays in FP16's range.
    """
    weight_max = np.maximum(np.abs(weight).max(axis=1), _MIN_MAGNITUDE).astype(np.float64)
    factors = np.maximum(channel_max, _MIN_MAGNITUDE).astype(np.float64) ** alpha / weight_max ** (1 - alpha)
    return (factors / np.exp(np.log(factors).mean())).astype(np.float32)


@reraise_as_graph_error("smoothing")
def smooth(graph: onnx.ModelProto, factors: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """Return a copy of an FP32 graph with smoothing factors folded in; it computes the same embeddings.

    The factors, (channels,) float32, divide the input of a linear, by the linear's module. :class:`UserError` if they
    do not fit this graph.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    foldable = {linear.module: (linear, source) for linear, source in find_foldable(graph)}
    for module, divisors in factors.items():
        if module not in foldable or divisors.shape != (len(foldable[module][0].weight),):
            raise UserError(f"ranges: the smoothing of '{module}' does not fit this graph. Run `vpr calibrate` on it.")
        linears = {linear.module: linear for linear in find_linears(model)}
        linear = linears[module]
        scaled = linear.weight * divisors[:, None]
        replace_constant(model, linear.node, linear.matrix, scaled.T if linear.axis == 0 else scaled)
        source = next(node for node in model.graph.node if node.name == foldable[module][1])
        if source.op_type == "LayerNormalization":
            constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
            for name in list(source.input)[1:]:
                replace_constant(model, source.name, name, (constants[name] / divisors).astype(np.float32))
        else:
            values = next(other for other in linears.values() if other.node == source.name)
            divided = values.weight.copy()
            divided[:, -len(divisors) :] /= divisors
            replace_constant(model, values.node, values.matrix, divided.T if values.axis == 0 else divided)
            if values.bias is not None:
                bias = values.bias.copy()
                bias[-len(divisors) :] /= divisors
                replace_bias(model, values, bias)
    return model


def output_error(rows: NDArray[np.float32], weight: NDArray[np.float32], limit: float) -> float:
    """Compute the mean squared difference between a linear's output in INT8 and in FP32.

    Inputs are (n, in) float32, the weight is (in, out) float32, and the input magnitude ``limit`` maps to 127.
    """
    quantised = fake_quantise_activation(rows, limit) @ fake_quantise_weight(weight)
    return float(((quantised - rows @ weight) ** 2).mean())


def correct_bias(rows: NDArray[np.float32], weight: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    """Compute the (out,) float32 to subtract from a bias, so that the mean output equals that of FP32.

    ``E[Q(x)] Q(W) - E[x] W`` (Nagel et al., "Data-free quantization", ICCV 2019, eq. 17, measured).
    """
    expected = rows.mean(axis=0, dtype=np.float64) @ weight.astype(np.float64)
    mean_input = fake_quantise_activation(rows, limit).mean(axis=0, dtype=np.float64)
    actual = mean_input @ fake_quantise_weight(weight).astype(np.float64)
    return (actual - expected).astype(np.float32)


def fake_quantise_activation(values: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    """Quantise and dequantise activations as the graph does."""
    scale = activation_scale(limit)
    return (np.clip(np.rint(values / scale), -LEVELS - 1, LEVELS) * scale).astype(np.float32)


def fake_quantise_weight(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Quantise and dequantise an (in, out) weight as the graph does, with one scale per output channel."""
    scales = weight_scales(weight, axis=1)
    return (np.clip(np.rint(weight / scales), -LEVELS, LEVELS) * scales).astype(np.float32)


def octav_threshold(rows: NDArray[np.float32]) -> float:
    """Compute the threshold that smoothed inputs are compared with: fast, and close to the optimum."""
    histogram = MagnitudeHistogram()
    histogram.add(rows)
    return threshold(histogram, "octav")


def find_foldable(graph: onnx.ModelProto) -> list[tuple[Linear, str]]:
    """Return the linears whose input scale another node can absorb, each with the name of that node."""
    linears = find_linears(graph)
    producers = {output: node for node in graph.graph.node for output in node.output}
    readers = Counter(name for node in graph.graph.node for name in node.input)
    modules = {linear.module: linear for linear in linears}
    foldable = []
    for linear in linears:
        producer = producers.get(linear.input)
        block = linear.module.removesuffix(".to_out.0")
        values = modules.get(f"{block}.to_qkv")
        if producer is not None and producer.op_type == "LayerNormalization" and readers[linear.input] == 1:
            foldable.append((linear, producer.name))
            continue
        if values is None or block == linear.module:
            continue
        # The last third of to_qkv computes the values, in the order in which to_out reads them.
        if values.weight.shape[1] == 3 * len(linear.weight):
            foldable.append((linear, values.node))
    return foldable
